//! Whether a device can be used, asked of the driver without a panic: cudarc panics where there is no driver.

use libloading::{Library, Symbol};

use super::image::{KERNELS, NOT_BUILT};
use crate::error::Unavailable;

/// The driver's names, in the order in which cudarc tries them: both must open the same one.
#[cfg(not(windows))]
const LIBRARIES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
#[cfg(windows)]
const LIBRARIES: [&str; 1] = ["nvcuda.dll"];
/// `CUDA_ERROR_STUB_LIBRARY`: the toolkit's folder `stubs` has a library that only links.
const STUB: i32 = 34;
/// `CUdevice_attribute` of the compute capability, major and minor.
const CAPABILITY: [i32; 2] = [75, 76];

/// Checks, in this order: driver library, the device, the kernels, its capability, the driver's version.
pub(super) fn probe(ordinal: usize) -> Result<(), Unavailable> {
    let driver = open()?;
    let found = ask(&driver, ordinal);
    // Closing a driver that was initialised is not supported everywhere: keep it for the life of the process.
    std::mem::forget(driver);
    let (version, capability) = found?;
    if let Some(reason) = NOT_BUILT {
        return Err(Unavailable::KernelsNotBuilt(reason));
    }
    let (major, minor) = capability;
    if major < 8 {
        return Err(Unavailable::ComputeCapability { major, minor });
    }
    let needed = KERNELS.driver_version(capability);
    if version < needed { Err(Unavailable::DriverTooOld { found: version, needed }) } else { Ok(()) }
}

fn open() -> Result<Library, Unavailable> {
    let mut problem = String::new();
    for name in LIBRARIES {
        // SAFETY: opening the driver runs its initialisers, which the CUDA driver supports from any thread.
        match unsafe { Library::new(name) } {
            Ok(driver) => return Ok(driver),
            Err(error) => problem = error.to_string(),
        }
    }
    Err(Unavailable::NoDriver(problem))
}

/// The driver's version and the device's compute capability.
fn ask(driver: &Library, ordinal: usize) -> Result<(i32, (i32, i32)), Unavailable> {
    let (mut version, mut count, mut device, mut capability) = (0, 0, 0, [0; 2]);
    // SAFETY: the functions have these signatures in every version of the driver API (cuda.h), the pointers are to live
    // integers, and the library stays open until after the calls.
    unsafe {
        let init: Symbol<'_, unsafe extern "C" fn(u32) -> i32> = symbol(driver, "cuInit")?;
        check("cuInit", init(0))?;
        let get_version: Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> = symbol(driver, "cuDriverGetVersion")?;
        check("cuDriverGetVersion", get_version(&mut version))?;
        let get_count: Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> = symbol(driver, "cuDeviceGetCount")?;
        check("cuDeviceGetCount", get_count(&mut count))?;
        let number = i32::try_from(ordinal).ok().filter(|number| *number < count);
        let number = number.ok_or(Unavailable::NoSuchDevice { count })?;
        let get: Symbol<'_, unsafe extern "C" fn(*mut i32, i32) -> i32> = symbol(driver, "cuDeviceGet")?;
        check("cuDeviceGet", get(&mut device, number))?;
        let attribute: Symbol<'_, unsafe extern "C" fn(*mut i32, i32, i32) -> i32> =
            symbol(driver, "cuDeviceGetAttribute")?;
        for (value, which) in capability.iter_mut().zip(CAPABILITY) {
            check("cuDeviceGetAttribute", attribute(value, which, device))?;
        }
    }
    Ok((version, (capability[0], capability[1])))
}

/// # Safety
/// `T` must be the function's type.
unsafe fn symbol<'a, T>(driver: &'a Library, name: &str) -> Result<Symbol<'a, T>, Unavailable> {
    // SAFETY: the caller vouches for the type.
    unsafe { driver.get(name.as_bytes()) }.map_err(|error| Unavailable::NoDriver(error.to_string()))
}

fn check(call: &'static str, code: i32) -> Result<(), Unavailable> {
    match code {
        0 => Ok(()),
        STUB => Err(Unavailable::NoDriver(format!(
            "{} is the CUDA toolkit's stub for linking, not a driver: take its folder off the loader's path",
            LIBRARIES[0]
        ))),
        code => Err(Unavailable::Driver { call, code }),
    }
}
