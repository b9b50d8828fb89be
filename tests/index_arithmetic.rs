//! The kernels' index arithmetic (`kernels/shared/layout.h`), checked on the host by `tests/index_arithmetic.cpp`. With no C++ compiler
//! it is ignored, and says so.

use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("index_arithmetic");
    let trials = match compiler() {
        None => {
            println!("index arithmetic is not checked: no C++ compiler (CXX, c++, g++, clang++)");
            vec![Trial::test("every_check", || Ok(())).with_ignored_flag(true)]
        }
        Some(compiler) => {
            compile(&compiler, &program);
            let names = Command::new(&program).output().expect("the checks list themselves");
            let names = String::from_utf8(names.stdout).expect("names");
            assert!(names.lines().count() > 0, "there are checks");
            names.lines().map(|name| trial(&program, name)).collect()
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `exit` runs no destructors.
    drop(folder);
    conclusion.exit();
}

fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let candidates = named.into_iter().chain(["c++", "g++", "clang++"].map(str::to_owned));
    // One that is there and does not work, such as a placeholder that wants to be installed, is none.
    let works = |compiler: &String| {
        Command::new(compiler).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    candidates.into_iter().find(works)
}

fn compile(compiler: &str, program: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/index_arithmetic.cpp");
    let output = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .args([program, &source])
        .output()
        .expect("the compiler runs");
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
}

fn trial(program: &Path, name: &str) -> Trial {
    let (program, check): (PathBuf, String) = (program.to_owned(), name.to_owned());
    Trial::test(name, move || {
        let output = Command::new(program).arg(check).output()?;
        if output.status.success() { Ok(()) } else { Err(Failed::from(String::from_utf8_lossy(&output.stdout))) }
    })
}
