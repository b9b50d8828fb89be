//! What build.rs decides without running anything: how nvcc's answers read, and which architectures are compiled.
//! `tests/build_script.rs` includes this file too.

/// Machine code for every family that the portable kernels support, and PTX for those to come.
pub const PORTABLE: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80"];
/// The kernels in `*_sm90a.cu` use instructions that only this architecture has.
pub const HOPPER: &[&str] = &["sm_90a"];

/// What an nvcc says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nvcc {
    /// Major and minor version of its toolkit.
    pub version: (u32, u32),
    /// Architectures that it lists, as `compute_80`.
    pub listed: Vec<String>,
    /// Whether it can compress fat binaries for size.
    pub compresses: bool,
}

/// Architectures to compile for, and those of the wanted ones that this nvcc does not know.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Choice {
    pub portable: Vec<String>,
    pub hopper: Vec<String>,
    pub dropped: Vec<String>,
}

impl Nvcc {
    /// Reads what `nvcc --version`, `nvcc --list-gpu-arch` and `nvcc --help` print. The error says what is missing.
    pub fn parse(version: &str, architectures: &str, help: &str) -> Result<Self, String> {
        let listed: Vec<String> =
            architectures.split_whitespace().filter(|name| number(name).is_some()).map(str::to_owned).collect();
        if listed.is_empty() {
            return Err("`nvcc --list-gpu-arch` lists no architecture".to_owned());
        }
        let version = parse_version(version).ok_or("`nvcc --version` names no release")?;
        Ok(Nvcc { version, listed, compresses: help.contains("--compress-mode") })
    }

    /// Architectures for the kernels: `wanted` (`CATALOG_SOFTMAX_CUDA_ARCHS`, a list with commas) or the default ones.
    pub fn choose(&self, wanted: Option<&str>) -> Choice {
        let mut choice = Choice::default();
        let wanted: Vec<&str> = match wanted {
            Some(list) => list.split(',').map(str::trim).filter(|name| !name.is_empty()).collect(),
            None => PORTABLE.iter().chain(HOPPER).copied().collect(),
        };
        for name in wanted {
            let list = match name {
                _ if !self.knows(name) => &mut choice.dropped,
                _ if name.ends_with("_90a") => &mut choice.hopper,
                _ => &mut choice.portable,
            };
            list.push(name.to_owned());
        }
        choice
    }

    /// The list has 90 and leaves out 90a, which came with CUDA 12.0. No kernel uses another architecture with a
    /// letter.
    fn knows(&self, name: &str) -> bool {
        let base = if name.ends_with("_90a") { &name[..name.len() - 1] } else { name };
        let listed = number(base).is_some() && self.listed.iter().any(|known| number(known) == number(base));
        listed && (base == name || self.version >= (12, 0))
    }
}

/// 80 of `sm_80` or `compute_80`.
fn number(name: &str) -> Option<u32> {
    name.strip_prefix("sm_").or_else(|| name.strip_prefix("compute_"))?.parse().ok()
}

/// (12, 4) of "Cuda compilation tools, release 12.4, V12.4.131".
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let release = text.split_once("release ")?.1;
    let (major, minor) = release.split([',', ' ', '\n']).next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// nvcc's `-gencode` value of an architecture.
pub fn gencode(name: &str) -> String {
    format!("arch={},code={name}", name.replace("sm_", "compute_"))
}

/// The first lines of what a compiler printed, as one.
pub fn excerpt(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    if lines.is_empty() { "it printed nothing".to_owned() } else { lines.join(" | ") }
}
