//! Whether a device can be used, asked of the driver without a panic: cudarc panics where there is no driver.

use libloading::{Library, Symbol};

use crate::error::Unavailable;

/// Driver version that the kernels will be built against (CUDA 13.0), as the driver reports versions.
const DRIVER_VERSION: i32 = 13000;

/// Checks, in this order: driver library, its version, the device, the kernels.
pub(super) fn probe(ordinal: usize) -> Result<(), Unavailable> {
    let count = device_count()?;
    if i32::try_from(ordinal).map_or(true, |ordinal| ordinal >= count) {
        return Err(Unavailable::NoSuchDevice { count });
    }
    if super::image::STREAM_SM80.is_empty() { Err(Unavailable::KernelsNotBuilt) } else { Ok(()) }
}

fn device_count() -> Result<i32, Unavailable> {
    // SAFETY: opening the driver runs its initialisers, which the CUDA driver supports from any thread.
    let driver = unsafe { Library::new("libcuda.so.1") }.map_err(|error| Unavailable::NoDriver(error.to_string()))?;
    let (mut version, mut count) = (0, 0);
    // SAFETY: the three functions have these signatures in every version of the driver API (cuda.h), the pointers are to
    // live integers, and the library stays open until after the calls.
    unsafe {
        let init: Symbol<'_, unsafe extern "C" fn(u32) -> i32> = symbol(&driver, "cuInit")?;
        check("cuInit", init(0))?;
        let get_version: Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> = symbol(&driver, "cuDriverGetVersion")?;
        check("cuDriverGetVersion", get_version(&mut version))?;
        if version < DRIVER_VERSION {
            return Err(Unavailable::DriverTooOld { found: version, needed: DRIVER_VERSION });
        }
        let get_count: Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> = symbol(&driver, "cuDeviceGetCount")?;
        check("cuDeviceGetCount", get_count(&mut count))?;
    }
    // Closing a driver that was initialised is not supported everywhere: keep it for the life of the process.
    std::mem::forget(driver);
    Ok(count)
}

/// # Safety
/// `T` must be the function's type.
unsafe fn symbol<'a, T>(driver: &'a Library, name: &str) -> Result<Symbol<'a, T>, Unavailable> {
    // SAFETY: the caller vouches for the type.
    unsafe { driver.get(name.as_bytes()) }.map_err(|error| Unavailable::NoDriver(error.to_string()))
}

fn check(call: &'static str, code: i32) -> Result<(), Unavailable> {
    if code == 0 { Ok(()) } else { Err(Unavailable::Driver { call, code }) }
}
