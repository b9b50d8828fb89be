//! CUDA_EMULATOR_COUNT: what each kernel did, said when the process ends. The test starts itself once more, as a
//! process that launches.
use std::process::Command;

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use cudarc_client::SIMPLE_PTX;

/// What the other tests start; it has nothing to check itself.
#[test]
#[ignore = "a part of the other tests"]
fn three_launches() {
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let module = context.load_module(Ptx::from_src(SIMPLE_PTX)).unwrap();
    let f = module.load_function("store_at").unwrap();
    let mut data = stream.alloc_zeros::<i32>(32).unwrap();
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    for _ in 0..3 {
        unsafe { stream.launch_builder(&f).arg(&mut data).arg(&0i64).launch(shape) }.unwrap();
    }
    stream.synchronize().unwrap();
}

/// What that process wrote to stderr.
fn launch_with(count: &str) -> String {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["three_launches", "--exact", "--ignored"]).env("CUDA_EMULATOR_COUNT", count);
    let done = program.output().unwrap();
    assert!(done.status.success());
    String::from_utf8(done.stderr).unwrap()
}

/// Launches and instructions of the only kernel in a table.
fn only_line(table: &str) -> (u64, u64) {
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(lines[0], ["kernel", "launches", "instructions", "loaded", "fetched", "stored"]);
    assert_eq!((lines.len(), lines[1][0]), (2, "store_at"));
    // Of each launch, the lanes of a warp store 32 numbers side by side.
    assert_eq!(lines[1][3..], ["0", "0", "384"]);
    (lines[1][1].parse().unwrap(), lines[1][2].parse().unwrap())
}

#[test]
fn counts_are_said_at_the_end() {
    let (launches, instructions) = only_line(&launch_with("1"));
    assert_eq!(launches, 3);
    // One warp, and no loop in that kernel.
    assert!(instructions.is_multiple_of(3) && (9..300).contains(&instructions), "{instructions}");

    let file = std::env::temp_dir().join(format!("cuda-emulator-counts-{}", std::process::id()));
    let stderr = launch_with(file.to_str().unwrap());
    assert!(!stderr.contains("instructions"), "{stderr}");
    assert_eq!(only_line(&std::fs::read_to_string(&file).unwrap()), (launches, instructions));
    std::fs::remove_file(file).unwrap();

    assert!(!launch_with("0").contains("instructions"));
}
