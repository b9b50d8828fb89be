//! CUDA graphs of steps: captured once, replayed on the same memory.

use cudarc::driver::{result, sys};

use super::Cuda;
use super::device_batch::DeviceBatch;
use super::device_output::{DeviceOutput, GivenPlaces};
use super::driver::Driver;
use super::memory::{Base, Keep};
use super::problem::Problem;
use super::step::ReadyStep;
use super::stream::checked;
use super::uses::Uses;
use crate::error::{Result, value};
use crate::problem::loss::Loss;

/// A step as a CUDA graph: one launch in place of many. [`Cuda::capture`] makes it and [`Cuda::replay`] runs it.
///
/// A graph holds addresses, sizes and options as they were when it was captured: the loss with its temperature, and
/// whether tf32 and Hopper's kernels were allowed. It keeps the part of the backend that it uses (kernels and
/// workspace), so that larger steps between replays do no harm; [`device_bytes`](StepGraph::device_bytes) says how much
/// memory that is. It does not keep the caller's memory. Each replay takes views of that memory again, as a step does,
/// and compares them with those of the capture. Between replays you may therefore write inputs and read results, and
/// memory that was freed cannot be used.
#[derive(Debug)]
pub struct StepGraph {
    exec: Exec,
    problem: Problem,
    given: GivenPlaces,
    loss: Loss,
    workspace: Keep,
}

/// An instantiated graph.
#[derive(Debug)]
struct Exec {
    driver: Driver,
    handle: sys::CUgraphExec,
}

// SAFETY: launches of a graph are not safe from several threads at once; `replay` has the backend for itself.
unsafe impl Send for Exec {}
// SAFETY: as above.
unsafe impl Sync for Exec {}

impl Drop for Exec {
    fn drop(&mut self) {
        if self.driver.bind().is_ok() {
            // SAFETY: the handle is destroyed once. The driver lets launches that still run finish.
            let _ = unsafe { result::graph::exec_destroy(self.handle) };
        }
    }
}

impl StepGraph {
    /// Bytes of device memory that this graph uses beside the caller's. They are the backend's own while it has not
    /// grown since the capture.
    pub fn device_bytes(&self) -> usize {
        self.workspace.bytes()
    }
}

impl Cuda {
    /// Makes a graph of a step, without running it. Allocates the step's memory if it is not reserved yet.
    ///
    /// A training loop captures once and then replays; eager steps on other batches may come in between. A graph keeps
    /// the temperature of its capture. If your temperature changes from step to step, call
    /// [`compute_on_device`](Cuda::compute_on_device) instead. cudarc's event tracking may be on.
    ///
    /// ```no_run
    /// use catalog_softmax::cuda::{Cuda, DeviceBatch, DeviceOutput};
    /// # use catalog_softmax::Loss;
    /// # trait Memory {
    /// #     fn batch(&self) -> DeviceBatch<'_>;
    /// #     fn output(&mut self) -> DeviceOutput<'_>;
    /// #     fn fill_from_towers(&mut self);
    /// # }
    /// # fn example<M: Memory>(
    /// #     mut cuda: Cuda, loss: Loss, mut training: M, mut results: M, validation: M, mut scores: M,
    /// # ) -> Result<(), catalog_softmax::Error> {
    /// let graph = cuda.capture(&training.batch(), &loss, &mut results.output())?;
    /// for step in 0..10_000 {
    ///     training.fill_from_towers();
    ///     cuda.replay(&graph, &training.batch(), &mut results.output())?;
    ///     if step % 1000 == 999 {
    ///         cuda.compute_on_device(&validation.batch(), &loss, &mut scores.output())?;
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`compute_on_device`](Cuda::compute_on_device).
    pub fn capture(
        &mut self,
        batch: &DeviceBatch<'_>,
        loss: &Loss,
        output: &mut DeviceOutput<'_>,
    ) -> Result<StepGraph> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let ready = self.ready(batch, loss, output, self.tf32, &mut uses)?;
        let base = self.arena.place(&driver, ready.memory.layout, ready.given.workspace)?;
        let exec = Capture::of(self)?.step(loss, &ready, base)?;
        let ReadyStep { problem, given, .. } = ready;
        let workspace = if given.workspace.is_some() { Keep::NOTHING } else { self.arena.keep() };
        Ok(StepGraph { exec, problem, given, loss: *loss, workspace })
    }

    /// Queues a captured step, on the memory that it was captured with. The results are those of
    /// [`compute_on_device`](Cuda::compute_on_device) with the graph's loss.
    ///
    /// # Errors
    /// A graph of another backend; views of other memory than the capture's, or of other sizes; a driver that refuses.
    /// Nothing has been submitted then, except in the last case.
    pub fn replay(&mut self, graph: &StepGraph, batch: &DeviceBatch<'_>, output: &mut DeviceOutput<'_>) -> Result<()> {
        if !graph.exec.driver.is(&self.driver) {
            return Err(value("graph", "of another backend", "captured by the backend that replays it"));
        }
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let problem = batch.checked(&graph.loss, graph.problem.tf32, &mut uses)?;
        if problem != graph.problem {
            return Err(value("batch", "other memory or sizes", "those that the graph was captured with"));
        }
        if output.checked(&problem, &mut uses)? != graph.given {
            return Err(value("output", "other places", "those that the graph was captured with"));
        }
        uses.start()?;
        // SAFETY: the graph is live. Its addresses are those of the views just checked, of the workspace and kernels
        // that it keeps, and of this backend's fault record.
        let launched = unsafe { result::graph::launch(graph.exec.handle, driver.stream().cu_stream()) };
        uses.finish(checked("cuGraphLaunch", launched))
    }

    /// Lets the caller capture the backend's stream, so that steps, searches and enqueues become part of a larger graph
    /// of the caller's: a whole training step, for example. Without this call they are refused while the stream is
    /// being captured.
    ///
    /// From now on the backend frees no workspace that it outgrows. What an operation needs has to be reserved before
    /// the capture. A capture refuses to wait for events from outside. Event tracking of cudarc therefore has to be
    /// off, and all memory has to belong to the backend's stream.
    ///
    /// # Safety
    /// Graphs that were captured with work of this backend are launched in the order of its stream, only while the
    /// backend and all memory that its work was given live, and only while nothing else writes that memory.
    pub unsafe fn allow_capture(&mut self) {
        self.driver.capture_allowed = true;
    }
}

/// A capture of work that the backend submits, on a stream of its own that nothing else can submit to.
struct Capture<'a> {
    cuda: &'a mut Cuda,
    backend: Driver,
    stream: sys::CUstream,
}

impl<'a> Capture<'a> {
    fn of(cuda: &'a mut Cuda) -> Result<Self> {
        let backend = cuda.driver.clone();
        let stream = checked("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        cuda.driver = backend.submitting_to(stream);
        Ok(Capture { cuda, backend, stream })
    }

    fn step(self, loss: &Loss, ready: &ReadyStep, base: Base) -> Result<Exec> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live.
        checked("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream, mode) })?;
        let submitted = self.cuda.submit(loss, ready, base);
        // SAFETY: as above.
        let ended = checked("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream) });
        submitted?;
        let graph = ended?;
        // SAFETY: the graph is live until it is destroyed, once; what was made of it does not need it.
        let (made, _) = unsafe {
            (result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)), result::graph::destroy(graph))
        };
        Ok(Exec { driver: self.backend.clone(), handle: checked("cuGraphInstantiate", made)? })
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.cuda.driver = self.backend.clone();
        // SAFETY: the stream is destroyed once, and the driver that submitted to it is gone.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}
