//! A device older than the kernels: it opens, says what it is, and refuses their PTX. A process of its own, since the
//! driver reads its environment once.
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUresult;
use cudarc::nvrtc::Ptx;
use cudarc_client::SIMPLE_PTX;

#[test]
fn ptx_of_a_newer_capability_is_refused() {
    // SAFETY: the only test of this process, before the first call of the driver.
    unsafe { std::env::set_var("CUDA_EMULATOR_CC", "75") };
    let context = CudaContext::new(0).unwrap();
    assert_eq!(context.compute_capability().unwrap(), (7, 5));
    assert!(context.name().unwrap().starts_with("CUDA emulator"));
    let refused = context.load_module(Ptx::from_src(SIMPLE_PTX)).unwrap_err();
    assert_eq!(refused.0, CUresult::CUDA_ERROR_INVALID_PTX);
}
