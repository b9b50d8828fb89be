//! What build.rs concludes from the answers of different nvccs. `scripts/test_build.sh` runs the whole of it on stubs.

#[allow(dead_code, missing_docs)]
#[path = "../build/nvcc.rs"]
mod nvcc;

use catalog_softmax::{NotBuilt, Unavailable};
use nvcc::{Choice, Nvcc, excerpt, gencode};

const VERSION: &str = "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2024 NVIDIA Corporation\n\
    Built on Thu_Mar_28_02:18:24_PDT_2024\nCuda compilation tools, release 12.4, V12.4.131\nBuild cuda_12.4.r12.4/0\n";
const ARCHITECTURES: &str = "compute_50\ncompute_52\ncompute_53\ncompute_60\ncompute_61\ncompute_62\ncompute_70\n\
    compute_72\ncompute_75\ncompute_80\ncompute_86\ncompute_87\ncompute_89\ncompute_90\n";
const HELP: &str = "--no-compress   (-no-compress)\n        Do not compress device code in fatbinary.\n";

fn nvcc_12_4() -> Nvcc {
    Nvcc::parse(VERSION, ARCHITECTURES, HELP).expect("these are an nvcc's answers")
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn an_older_nvcc_drops_what_it_does_not_know() {
    let nvcc = nvcc_12_4();
    assert_eq!(nvcc.version, (12, 4));
    assert!(!nvcc.compresses);
    let expected = Choice {
        portable: strings(&["sm_80", "sm_86", "sm_89", "sm_90", "compute_80"]),
        hopper: strings(&["sm_90a"]),
        dropped: strings(&["sm_100", "sm_120"]),
    };
    assert_eq!(nvcc.choose(None), expected);
}

#[test]
fn a_newer_nvcc_drops_nothing() {
    let (version, help) = (VERSION.replace("12.4", "13.0"), "--compress-mode [default,size]  (-compress-mode)");
    let nvcc = Nvcc::parse(&version, "compute_80 compute_86 compute_89 compute_90 compute_100 compute_120", help);
    let nvcc = nvcc.expect("these are an nvcc's answers");
    assert_eq!(nvcc.version, (13, 0));
    assert!(nvcc.compresses);
    let choice = nvcc.choose(None);
    assert_eq!(choice.portable, strings(nvcc::PORTABLE));
    assert_eq!(choice.hopper, strings(nvcc::HOPPER));
    assert!(choice.dropped.is_empty());
}

#[test]
fn an_nvcc_before_hopper_has_no_kernels_for_it() {
    let version = VERSION.replace("12.4", "11.8");
    let nvcc = Nvcc::parse(&version, ARCHITECTURES, HELP).expect("these are an nvcc's answers");
    assert_eq!(nvcc.choose(Some("sm_90,sm_90a")).dropped, ["sm_90a"]);
}

#[test]
fn wanted_architectures_take_the_place_of_the_default_ones() {
    let choice = nvcc_12_4().choose(Some(" compute_80, compute_90a,sm_8O,sm_90b,sm_100a,80,,"));
    assert_eq!(choice.portable, ["compute_80"]);
    assert_eq!(choice.hopper, ["compute_90a"]);
    assert_eq!(choice.dropped, ["sm_8O", "sm_90b", "sm_100a", "80"]);
    assert!(nvcc_12_4().choose(Some("sm_120")).portable.is_empty());
}

#[test]
fn answers_of_something_else_are_errors() {
    let error = |version, list| Nvcc::parse(version, list, HELP).expect_err("this is no nvcc's answer");
    assert!(error(VERSION, "").contains("--list-gpu-arch"));
    assert!(error(VERSION, "usage: false\n").contains("--list-gpu-arch"));
    assert!(error("gcc 12", ARCHITECTURES).contains("--version"));
}

#[test]
fn options_and_excerpts() {
    assert_eq!(gencode("sm_90a"), "arch=compute_90a,code=sm_90a");
    assert_eq!(gencode("compute_80"), "arch=compute_80,code=compute_80");
    assert_eq!(excerpt("\n nvcc fatal : a\nb\n\nc\nd"), "nvcc fatal : a | b | c");
    assert_eq!(excerpt(" \n"), "it printed nothing");
}

#[test]
fn the_error_says_why_there_are_no_kernels_and_what_to_do() {
    let why = NotBuilt::CompilerFailed("/usr/bin/nvcc failed on kernels/rows/rows.cu".into());
    let message = Unavailable::KernelsNotBuilt(why).to_string();
    for part in ["/usr/bin/nvcc failed on kernels/rows/rows.cu", "NVCC", "CUDA_HOME", "CATALOG_SOFTMAX_REQUIRE_NVCC=1"]
    {
        assert!(message.contains(part), "{message}");
    }
}
