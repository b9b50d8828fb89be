//! The CUDA backend: tensor-core kernels for compute capability 8.0 and later, and special ones for 9.0.
//!
//! ```text
//! probe.rs → driver.rs   a device that can be used; kernels.rs lists its kernels, loaded.rs has them; stream.rs its stream
//! problem.rs             a batch as device addresses
//! tiling.rs, workspace.rs, memory.rs
//!                        how it is cut, and what memory that takes, before anything is allocated
//! passes.rs              the passes as launches: prepare.rs, finish.rs, wide.rs; params.rs mirrors the kernels' arguments
//! host.rs, host_layout.rs
//!                        batches in host memory: upload, passes, download
//! table.rs               what tables, several positives and filters add to the passes
//! device_memory.rs, view.rs, device_search.rs, device_table.rs, device_batch.rs, device_output.rs, step.rs
//!                        batches in the caller's device memory: checks, passes; fault.rs: what only the device sees
//! accumulate.rs          gradients added to what is there
//! uses.rs                the order of that memory's streams and the backend's
//! graph.rs               steps as CUDA graphs
//! topk.rs                searches, in host memory and in the caller's device memory
//! queue.rs               past candidates in device memory, as further pools
//! ```

mod accumulate;
mod device_batch;
mod device_memory;
mod device_output;
mod device_search;
mod device_table;
mod driver;
mod fault;
mod few;
mod finish;
mod graph;
mod host;
mod host_layout;
mod image;
mod kernels;
mod loaded;
mod memory;
mod params;
mod passes;
mod prepare;
mod probe;
mod problem;
mod queue;
mod step;
mod stream;
mod table;
mod tiling;
mod topk;
mod uses;
mod view;
mod wide;
mod workspace;

use std::sync::Arc;

use cudarc::driver::CudaStream;

pub use device_batch::DeviceBatch;
pub use device_memory::{DeviceMemory, DeviceMemoryMut};
pub use device_output::{DeviceGradients, DeviceMoments, DeviceOutput, DeviceRank, DeviceStatistics, DeviceUpstream};
pub use device_search::{DevicePool, DeviceSearch, DeviceTopK};
pub use device_table::{DeviceRowNegatives, DeviceTable, DeviceTableGradient};
pub use graph::StepGraph;
pub use queue::DeviceQueue;
pub use view::{DeviceElement, DeviceEmbeddings, DeviceSlice, DeviceSliceMut};

use crate::backend::Backend;
use crate::error::{Error, Unavailable, value};
use driver::Driver;
use fault::FaultRecord;
use memory::{Arena, Base};
use passes::Step;
use prepare::Swap;
use problem::Problem;
use stream::{PER_THREAD_RULE, is_per_thread};
use workspace::Workspace;

/// The CUDA backend, on a stream of its own. Keeps its device memory between calls.
///
/// Embeddings are multiplied on the tensor cores: `f16` and `bf16` with sums in `f32`, `f32` as three tf32 products (as
/// exact as an `f32` matmul). On compute capability 8.6, 8.9 and 12.x, where these take longer, `f32` is multiplied by
/// plain multiply-adds. Probabilities that multiply embeddings are rounded to the embeddings' type; per-row
/// results are merged in `f64`.
///
/// All work goes to one stream. Methods of [`Backend`] return numbers and therefore wait for it. Methods on device
/// memory, such as [`compute_on_device`](Cuda::compute_on_device), do not wait. Dropping a backend waits for its
/// stream.
///
/// Under [`Similarity::Cosine`](crate::Similarity::Cosine), products are formed before they are divided by the lengths.
/// An embedding of length 2^63 = 9.2e18 or more could overflow them, so it is treated as not finite: every result that
/// depends on it is NaN, and a search never returns it.
#[derive(Debug)]
pub struct Cuda {
    driver: Driver,
    arena: Arena,
    fault: FaultRecord,
    tf32: bool,
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
        Self::with_driver(Driver::open(ordinal).map_err(|error| match error {
            Error::Driver { call, code } => unavailable(Unavailable::Driver { call, code }),
            other => other,
        })?)
    }

    /// A backend on the caller's stream and in that stream's context. Steps run in the order of the stream.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] for a compute capability below 8.0 or a crate built without kernels,
    /// [`Error::Driver`] where the driver refuses to load them, [`Error::Value`] for the per-thread default stream,
    /// which is another stream on each thread.
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self, Error> {
        let ordinal = stream.context().ordinal();
        let unavailable = |reason| Error::DeviceUnavailable { device: format!("cuda:{ordinal}"), reason };
        probe::probe(ordinal).map_err(unavailable)?;
        Self::with_driver(Driver::on_stream(stream)?)
    }

    fn with_driver(driver: Driver) -> Result<Self, Error> {
        let (arena, fault) = (Arena::default(), FaultRecord::new(&driver)?);
        Ok(Cuda { driver, arena, fault, tf32: false })
    }

    /// Goes over to another stream of the same context, with the kernels that are loaded: for a library that has a current
    /// stream, such as PyTorch. Does not wait, and orders nothing between the two streams but the release of the memory that
    /// the backend holds: on the new stream it begins with none. Steps that are given a workspace
    /// ([`DeviceOutput::workspace`]) hold none anyway, so that for them this costs an event. A graph is replayed on the stream
    /// that it was captured for.
    ///
    /// ```no_run
    /// use catalog_softmax::Cuda;
    /// use cudarc::driver::CudaContext;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let context = CudaContext::new(0)?;
    /// let (training, validation) = (context.new_stream()?, context.new_stream()?);
    /// let mut cuda = Cuda::on_stream(training)?;
    /// cuda.move_to(validation)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for a stream of another context or the per-thread default stream, [`Error::Driver`] where the driver
    /// refuses. The backend then stays where it is.
    pub fn move_to(&mut self, stream: Arc<CudaStream>) -> Result<(), Error> {
        if stream.cu_stream() == self.driver.stream().cu_stream() {
            return Ok(());
        }
        if is_per_thread(&stream) {
            return Err(value("stream", "the per-thread default stream", PER_THREAD_RULE));
        }
        if stream.context().cu_ctx() != self.driver.context().cu_ctx() {
            return Err(value("the CUDA context of stream", "another one", "the context of the backend's stream"));
        }
        self.driver.bind()?;
        self.driver.leave()?;
        self.arena.release(&self.driver);
        self.driver = self.driver.moved_to(stream);
        Ok(())
    }

    /// The stream that all work runs on. Slices that are allocated on it are in order with the backend's work, and a
    /// read on it after a step sees the step's result.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.driver.stream()
    }

    /// Whether products of `f32` embeddings may round them to tf32 (11 bits of mantissa instead of 24), which is faster. Off
    /// by default.
    pub fn allow_tf32(&mut self, allow: bool) {
        self.tf32 = allow;
    }

    /// Whether steps on a device of compute capability 9.0 use the kernels made for it: for f16 and bf16 embeddings
    /// whose rows start at multiples of 16 bytes. On by default. If it is off, such a device runs the portable kernels.
    pub fn allow_hopper(&mut self, allow: bool) {
        self.driver.allow_hopper(allow);
    }

    /// A step whose workspace begins at `base`.
    fn step_of<'a>(&'a self, problem: &'a Problem, workspace: &'a Workspace, base: Base) -> Step<'a> {
        let (driver, fault) = (&self.driver, self.fault.address());
        Step { driver, base, problem, workspace, fault, swap: Swap::default() }
    }

    /// Number of kernels that this backend has launched so far. Those of a graph count once, at the capture. For tests.
    #[doc(hidden)]
    pub fn launches(&self) -> u64 {
        self.driver.launches()
    }

    /// Bytes of device memory that this backend holds now: the plan of the largest step so far, and after
    /// [`allow_capture`](Cuda::allow_capture) also the workspaces that it outgrew.
    pub fn device_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The device's name, as the driver has it.
    ///
    /// # Errors
    /// [`Error::Driver`] where the driver refuses.
    pub fn name(&self) -> Result<String, Error> {
        stream::checked("cuDeviceGetName", cudarc::driver::result::device::get_name(self.driver.context().cu_device()))
    }
}

impl Backend for Cuda {}

impl Drop for Cuda {
    fn drop(&mut self) {
        // An error is that of a device that has failed, and runs nothing any more.
        let _ = self.driver.bind().and_then(|()| self.driver.leave());
    }
}

/// Whether [`Cuda::new`] will find driver, device and kernels.
pub(crate) fn check(ordinal: usize) -> Result<(), Unavailable> {
    probe::probe(ordinal)
}
