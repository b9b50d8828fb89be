//! Compiles `kernels/*/*.cu` with nvcc into one fat binary each, which the crate embeds. Where that is not possible, the
//! images are empty, the build goes on, and opening a CUDA device is an error that says why (`NotBuilt`).
//!
//! | variable | meaning |
//! |---|---|
//! | `CATALOG_SOFTMAX_CUDA_ARCHS` | architectures in place of the default ones: `sm_80,sm_90a` or `compute_80` (PTX) |
//! | `CATALOG_SOFTMAX_REQUIRE_NVCC=1` | a build without kernels is an error |
//! | `CATALOG_SOFTMAX_DENY_WARNINGS=1` | nvcc's warnings are errors |
//! | `CATALOG_SOFTMAX_LINEINFO=1` | kernels carry line numbers for profilers and sanitizers |
//! | `CATALOG_SOFTMAX_PTXAS_REPORT` | a folder that gets ptxas's report of each file, and each image with its size |
//! | `CATALOG_SOFTMAX_IMAGES` | a folder for images that builds with other profiles and target folders share |
//! | `NVCC`, `CUDA_HOME`, `CUDA_PATH` | where nvcc is; else `PATH`, `/usr/local/cuda`, and `.cuda` of this checkout |

#[path = "build/nvcc.rs"]
mod nvcc;

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, SystemTime};
use std::{env, fs, thread};

use nvcc::Nvcc;

/// Files whose name ends so use what only that architecture has.
const HOPPER_SUFFIX: &str = "_sm90a";
/// Where toolkits are beside the places that variables name; the last is scripts/install_nvcc.sh's.
const FIXED_PLACES: [&str; 2] = ["/usr/local/cuda/bin", ".cuda/nvidia/cu13/bin"];

fn main() {
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "DOCS_RS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for variable in ["CUDA_ARCHS", "REQUIRE_NVCC", "DENY_WARNINGS", "LINEINFO", "PTXAS_REPORT", "IMAGES"] {
        println!("cargo::rerun-if-env-changed=CATALOG_SOFTMAX_{variable}");
    }
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let docs = env::var_os("DOCS_RS").is_some();
    let built = if docs { Err(NotBuilt::NoCompiler("DOCS_RS is set".to_owned())) } else { build(&out) };
    if let Err(reason) = &built {
        // The next build with a compiler must not take the empty images for its own.
        let _ = fs::remove_file(out.join("stamp"));
        for source in kernel_files() {
            fs::write(image(&source, &out), []).expect("OUT_DIR can be written");
        }
        if own("REQUIRE_NVCC").as_deref() == Some("1") {
            println!("cargo::error=CATALOG_SOFTMAX_REQUIRE_NVCC=1, and no CUDA kernels are built: {}", reason.text());
        } else if !docs {
            println!("cargo::warning=built without CUDA kernels: {}", reason.text());
        }
    }
    fs::write(out.join("built.rs"), record(&built)).expect("OUT_DIR can be written");
}

/// Why there are no kernels, as `catalog_softmax::NotBuilt` has it.
#[derive(Debug)]
enum NotBuilt {
    NoCompiler(String),
    NoArchitecture(String),
    CompilerFailed(String),
}

impl NotBuilt {
    fn text(&self) -> &str {
        let (NotBuilt::NoCompiler(text) | NotBuilt::NoArchitecture(text) | NotBuilt::CompilerFailed(text)) = self;
        text
    }
}

/// What the kernels were built with.
struct Built {
    version: (u32, u32),
    compressed: bool,
    choice: nvcc::Choice,
}

/// The source of two constants that `src/backend/cuda/image.rs` includes.
fn record(built: &Result<Built, NotBuilt>) -> String {
    match built {
        Ok(Built { version, compressed, choice }) => format!(
            "pub(super) const NOT_BUILT: Option<NotBuilt> = None;\n\
             pub(super) const KERNELS: Kernels = Kernels {{ nvcc: {version:?}, compressed: {compressed}, \
             portable: &{:?}, hopper: &{:?} }};\n",
            choice.portable, choice.hopper
        ),
        Err(reason) => {
            let variant = match reason {
                NotBuilt::NoCompiler(_) => "NoCompiler",
                NotBuilt::NoArchitecture(_) => "NoArchitecture",
                NotBuilt::CompilerFailed(_) => "CompilerFailed",
            };
            format!(
                "pub(super) const NOT_BUILT: Option<NotBuilt> = \
                 Some(NotBuilt::{variant}(std::borrow::Cow::Borrowed({:?})));\n\
                 pub(super) const KERNELS: Kernels = Kernels {{ nvcc: (0, 0), compressed: false, portable: &[], hopper: &[] }};\n",
                reason.text()
            )
        }
    }
}

/// A variable of this crate.
fn own(name: &str) -> Option<String> {
    env::var(format!("CATALOG_SOFTMAX_{name}")).ok().filter(|value| !value.is_empty())
}

// ---- the compiler

/// Compiles every file, or takes what the same build left.
fn build(out: &Path) -> Result<Built, NotBuilt> {
    let program = find_nvcc(out)?;
    let nvcc = ask(&program).map_err(|why| NotBuilt::CompilerFailed(format!("{}: {why}", program.display())))?;
    let choice = nvcc.choose(own("CUDA_ARCHS").as_deref());
    if !choice.dropped.is_empty() {
        let (major, minor) = nvcc.version;
        let names = choice.dropped.join(", ");
        println!("cargo::warning=nvcc {major}.{minor} does not know {names}: kernels are built without them");
    }
    if choice.portable.is_empty() {
        let wanted = own("CUDA_ARCHS").unwrap_or_else(|| nvcc::PORTABLE.join(","));
        let why = format!("{} knows none of {wanted} for the portable kernels", program.display());
        return Err(NotBuilt::NoArchitecture(why));
    }
    let mut jobs: Vec<Job> = kernel_files().iter().map(|source| Job::new(source, out, &choice)).collect();
    // Files of several architectures take all threads. A file of one architecture before them would leave threads idle.
    jobs.sort_by_key(|job| std::cmp::Reverse(job.targets.len()));
    let flags = flags(&nvcc);
    let stamp = stamp(&program, &nvcc, &flags, &jobs);
    let stamp_file = out.join("stamp");
    if own("PTXAS_REPORT").is_some() || fs::read_to_string(&stamp_file).ok().as_ref() != Some(&stamp) {
        let _ = fs::remove_file(&stamp_file);
        let kept = own("IMAGES").map(|folder| Kept::new(Path::new(&folder), &stamp));
        if !kept.as_ref().is_some_and(|kept| kept.give(&jobs)) {
            compile_all(&program, &flags, &jobs).map_err(NotBuilt::CompilerFailed)?;
            if let Some(kept) = &kept {
                kept.take(&jobs)
                    .map_err(|error| NotBuilt::CompilerFailed(format!("CATALOG_SOFTMAX_IMAGES: {error}")))?;
            }
        }
        fs::write(&stamp_file, stamp).expect("OUT_DIR can be written");
    }
    Ok(Built { version: nvcc.version, compressed: nvcc.compresses, choice })
}

/// The places are searched in this order: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, and the fixed ones.
fn find_nvcc(out: &Path) -> Result<PathBuf, NotBuilt> {
    let executable = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let mut places = Vec::new();
    let mut wrong = Vec::new();
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) else { continue };
        let value = PathBuf::from(value);
        let place = if variable == "NVCC" { value.clone() } else { value.join("bin").join(&executable) };
        if !place.is_file() {
            wrong.push(format!("{variable}={}: there is no file {}", value.display(), place.display()));
        }
        places.push(place);
    }
    let here = env::current_dir().expect("cargo sets the current folder");
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(FIXED_PLACES.map(PathBuf::from));
    places.extend(folders.map(|folder| here.join(folder).join(&executable)));
    let found = places.iter().position(|place| place.is_file());
    watch(&places, found, out);
    let used = found.map(|found| format!("{} is used", places[found].display()));
    for wrong in &wrong {
        println!("cargo::warning={wrong}; {}", used.as_deref().unwrap_or("no other nvcc was found"));
    }
    let all = [wrong.as_slice(), &["PATH and /usr/local/cuda have no nvcc".to_owned()]].concat();
    found.map(|found| places.swap_remove(found)).ok_or_else(|| NotBuilt::NoCompiler(all.join("; ")))
}

/// Makes cargo run this script again when nvcc changes or comes to one of the places that were searched in vain.
///
/// Cargo takes a watched file that is missing for changed each time. A link to such a file, in a folder that is
/// watched, does not count until the file is there; then the link counts, which is newer than this run.
fn watch(places: &[PathBuf], found: Option<usize>, out: &Path) {
    if let Some(found) = found {
        println!("cargo::rerun-if-changed={}", places[found].display());
    }
    let folder = out.join("missing");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("OUT_DIR can be written");
    wait_for_the_clock_of_files(out);
    #[cfg(unix)]
    for (index, place) in places[..found.unwrap_or(places.len())].iter().enumerate() {
        std::os::unix::fs::symlink(place, folder.join(index.to_string())).expect("OUT_DIR can be written");
    }
    // The folder itself is new too, and must not look so.
    let old = fs::File::open(&folder).and_then(|folder| folder.set_modified(SystemTime::UNIX_EPOCH));
    if old.is_ok() {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
}

/// Waits until a new file has a later time than those that cargo wrote before it started this script: some file systems
/// count in steps of several milliseconds, and to cargo a link of the same time is no newer than this run.
fn wait_for_the_clock_of_files(out: &Path) {
    let probe = out.join("clock");
    let now = || {
        fs::write(&probe, []).expect("OUT_DIR can be written");
        fs::metadata(&probe).and_then(|data| data.modified()).ok()
    };
    let start = now();
    // Three seconds: the coarsest clock of a file system that is in use counts in steps of two.
    for _ in 0..600 {
        if now() != start {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn ask(program: &Path) -> Result<Nvcc, String> {
    let answer = |option: &str| {
        let output = Command::new(program).arg(option).output().map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &text;
        Err(format!("`nvcc {option}` failed ({}): {}", output.status, nvcc::excerpt(&said)))
    };
    Nvcc::parse(&answer("--version")?, &answer("--list-gpu-arch")?, &answer("--help")?)
}

fn flags(nvcc: &Nvcc) -> Vec<&'static str> {
    let mut flags = vec!["-fatbin", "-std=c++17", "-O3", "-Ikernels"];
    let asked = |variable| own(variable).as_deref() == Some("1");
    flags.extend(nvcc.compresses.then_some("-compress-mode=size"));
    flags.extend(asked("LINEINFO").then_some("-lineinfo"));
    flags.extend(asked("DENY_WARNINGS").then_some("-Werror=all-warnings"));
    if own("PTXAS_REPORT").is_some() {
        flags.extend(["-Xptxas", "-v"]);
    }
    flags
}

// ---- the files

/// All files below `kernels/`.
fn all_sources() -> Vec<PathBuf> {
    let entries =
        |folder: &Path| fs::read_dir(folder).map(|all| all.flatten().map(|entry| entry.path()).collect::<Vec<_>>());
    let mut folders = vec![PathBuf::from("kernels")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        let found: Vec<PathBuf> = entries(&folder).expect("the package has kernels/");
        let (inner, here): (Vec<_>, Vec<_>) = found.into_iter().partition(|path| path.is_dir());
        folders.extend(inner);
        files.extend(here);
    }
    files.sort();
    files
}

fn kernel_files() -> Vec<PathBuf> {
    let mut files = all_sources();
    files.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    // The slowest first, so that they do not come last alone.
    files.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).map_or(0, |data| data.len())));
    files
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a file has a name").to_string_lossy().into_owned()
}

fn image(source: &Path, out: &Path) -> PathBuf {
    out.join(format!("{}.fatbin", stem(source)))
}

/// Says what images are made of. A change of `PATH` runs this script again, which must not compile for ten minutes.
fn stamp(program: &Path, nvcc: &Nvcc, flags: &[&str], jobs: &[Job]) -> String {
    let mut hasher = DefaultHasher::new();
    for file in all_sources() {
        (&file, fs::read(&file).expect("kernels can be read")).hash(&mut hasher);
    }
    fs::metadata(program).and_then(|data| data.modified()).ok().hash(&mut hasher);
    let mut text = format!("{} {nvcc:?} {flags:?} {:x}\n", program.display(), hasher.finish());
    for job in jobs {
        writeln!(text, "{} {:?}", job.source.display(), job.targets).expect("strings can be written");
    }
    text
}

/// Images that builds with other profiles and target folders share: `CATALOG_SOFTMAX_IMAGES` is a folder for them. A
/// build whose stamp is the same takes them from there.
struct Kept<'a> {
    folder: PathBuf,
    stamp: &'a str,
}

impl<'a> Kept<'a> {
    fn new(folder: &Path, stamp: &'a str) -> Self {
        let mut hasher = DefaultHasher::new();
        stamp.hash(&mut hasher);
        Kept { folder: folder.join(format!("{:x}", hasher.finish())), stamp }
    }

    /// Copies all images to where this build has them, if they are there. A report is not: its build compiles.
    fn give(&self, jobs: &[Job]) -> bool {
        let is_whole = fs::read_to_string(self.folder.join("stamp")).is_ok_and(|stamp| stamp == self.stamp);
        let give = |job: &Job| fs::copy(self.folder.join(job.image.file_name()?), &job.image).ok();
        is_whole && own("PTXAS_REPORT").is_none() && jobs.iter().all(|job| give(job).is_some())
    }

    fn take(&self, jobs: &[Job]) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        for job in jobs {
            fs::copy(&job.image, self.folder.join(job.image.file_name().expect("an image has a name")))?;
        }
        // Last, since it says that all are there.
        fs::write(self.folder.join("stamp"), self.stamp)
    }
}

/// One file to compile.
struct Job {
    source: PathBuf,
    image: PathBuf,
    /// `-gencode` values; where there are none, the image is empty.
    targets: Vec<String>,
}

impl Job {
    fn new(source: &Path, out: &Path, choice: &nvcc::Choice) -> Self {
        let names = if stem(source).ends_with(HOPPER_SUFFIX) { &choice.hopper } else { &choice.portable };
        let targets = names.iter().map(|name| nvcc::gencode(name)).collect();
        Job { source: source.to_owned(), image: image(source, out), targets }
    }

    fn compile(&self, program: &Path, flags: &[&str], threads: usize) -> Result<(), String> {
        if self.targets.is_empty() {
            return fs::write(&self.image, []).map_err(|error| format!("{}: {error}", self.image.display()));
        }
        let mut command = Command::new(program);
        command.args(flags).arg(format!("--threads={threads}"));
        for target in &self.targets {
            command.args(["-gencode", target]);
        }
        let result = command.arg("-o").arg(&self.image).arg(&self.source).output();
        let output = result.map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let (program, said) = (program.display(), nvcc::excerpt(&text));
            return Err(format!("{program} failed on {} ({}): {said}", self.source.display(), output.status));
        }
        let size = fs::metadata(&self.image).map_or(0, |data| data.len());
        if size == 0 {
            return Err(format!("{} made nothing of {}", program.display(), self.source.display()));
        }
        match own("PTXAS_REPORT") {
            Some(folder) => self.report(Path::new(&folder), &text, size),
            None => Ok(()),
        }
    }

    fn report(&self, folder: &Path, text: &str, size: u64) -> Result<(), String> {
        let file = |extension| folder.join(stem(&self.source)).with_extension(extension);
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(file("txt"), text))
            .and_then(|()| fs::write(file("bytes"), format!("{size} {}\n", stem(&self.source))))
            .and_then(|()| fs::copy(&self.image, file("fatbin")).map(drop))
            .map_err(|error| format!("{}: {error}", folder.display()))
    }
}

/// Compiles with at most as many threads as cargo allows (`NUM_JOBS`). After a failure no further file is begun.
fn compile_all(program: &Path, flags: &[&str], jobs: &[Job]) -> Result<(), String> {
    let limit: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).max(1);
    let (free, changed, failure) = (Mutex::new(limit), Condvar::new(), Mutex::new(None));
    let failed = || failure.lock().expect("no thread panics").is_some();
    thread::scope(|scope| {
        for job in jobs {
            // nvcc works on the architectures of a file at the same time.
            let threads = job.targets.len().clamp(1, limit);
            let mut slots = free.lock().expect("no thread panics");
            while *slots < threads {
                slots = changed.wait(slots).expect("no thread panics");
            }
            *slots -= threads;
            drop(slots);
            if failed() {
                break;
            }
            let (free, changed, failure) = (&free, &changed, &failure);
            scope.spawn(move || {
                if let Err(problem) = job.compile(program, flags, threads) {
                    failure.lock().expect("no thread panics").get_or_insert(problem);
                }
                *free.lock().expect("no thread panics") += threads;
                changed.notify_one();
            });
        }
    });
    failure.into_inner().expect("no thread panics").map_or(Ok(()), Err)
}
