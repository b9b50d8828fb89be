//! The CUDA backend: tensor-core streams for compute capability 8.0 and later.
//!
//! ```text
//! probe.rs → driver.rs   a device that can be used, its kernels and its stream
//! problem.rs             a batch as device addresses
//! tiling.rs, workspace.rs, memory.rs
//!                        how it is cut, and what memory that takes, before anything is allocated
//! passes.rs              the passes as launches; params.rs mirrors the kernels' arguments
//! host.rs                batches in host memory: upload, passes, download
//! ```

mod driver;
mod host;
mod image;
mod memory;
mod params;
mod passes;
mod probe;
mod problem;
mod tiling;
mod workspace;

use crate::backend::Backend;
use crate::error::{Error, Unavailable};
use driver::Driver;
use memory::Arena;

/// The CUDA backend, on a stream of its own. Keeps its device memory between calls.
///
/// Products of embeddings are those of the tensor cores: `f16` and `bf16` with sums in `f32`, `f32` as three tf32 products
/// (as exact as an `f32` matmul). Probabilities that multiply embeddings are rounded to the embeddings' type; per-row
/// results are merged in `f64`.
#[derive(Debug)]
pub struct Cuda {
    driver: Driver,
    arena: Arena,
}

impl Cuda {
    /// Opens the device of that ordinal.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] with the reason: no driver, a driver too old, no such device, a compute capability
    /// below 8.0, or a crate built without kernels.
    ///
    /// ```
    /// use catalog_softmax::{Cuda, Error};
    /// match Cuda::new(0) {
    ///     Ok(cuda) => println!("on {}", cuda.name()?),
    ///     Err(Error::DeviceUnavailable { reason, .. }) => println!("no GPU: {reason}"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        let unavailable = |reason| Error::DeviceUnavailable { device: format!("cuda:{ordinal}"), reason };
        probe::probe(ordinal).map_err(unavailable)?;
        let driver = Driver::open(ordinal).map_err(unavailable)?;
        Ok(Cuda { arena: Arena::new(driver.context.clone()), driver })
    }

    /// Bytes of device memory that this backend holds now: those of the largest step so far, as its plan said.
    pub fn device_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The device's name, as the driver has it.
    ///
    /// # Errors
    /// [`Error::Driver`] where the driver refuses.
    pub fn name(&self) -> Result<String, Error> {
        driver::checked("cuDeviceGetName", self.driver.context.name())
    }
}

impl Backend for Cuda {}

/// Whether [`Cuda::new`] will find driver, device and kernels.
pub(crate) fn check(ordinal: usize) -> Result<(), Unavailable> {
    probe::probe(ordinal)
}
