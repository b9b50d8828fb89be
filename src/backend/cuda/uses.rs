//! The caller's memory that work is about to use, and its order with everything else that uses that memory.
//!
//! ```text
//! admit, read, write   while a batch is checked: the backend's stream waits for what cudarc has recorded of each slice
//! start                it waits for the streams that own the memory
//! ...                  the work is submitted
//! finish               cudarc records that the backend's stream uses the slices; their owners wait for it
//! ```
//!
//! cudarc's events alone are not enough. Without `CudaContext::new_stream` a context ignores them, and cudarc frees a
//! slice in the order of its owner, which is the stream that it was allocated on.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, SyncOnDrop};

use super::device_memory::{Readable, Writable};
use super::driver::Driver;
use super::few::Few;
use super::stream::{PER_THREAD_RULE, checked, is_per_thread};
use crate::error::{Argument, Result, value};

/// What one submission uses.
pub(super) struct Uses<'a> {
    driver: &'a Driver,
    /// They record the use of a slice when they are dropped.
    guards: Few<SyncOnDrop<'a>, 32>,
    /// Streams beside the backend's that own some of the memory, once each.
    owners: Few<Arc<CudaStream>, 2>,
    /// Errors that cudarc noted before, by context: they are not this work's, and cudarc would not wait because of
    /// them.
    noted: Few<(Arc<CudaContext>, Option<DriverError>), 2>,
    started: bool,
}

impl<'a> Uses<'a> {
    /// An empty list of uses. Binds the context.
    pub(super) fn new(driver: &'a Driver) -> Result<Self> {
        driver.bind()?;
        driver.refuse_capture(driver.stream())?;
        let (guards, owners, noted) = (Few::default(), Few::default(), Few::default());
        let mut uses = Uses { driver, guards, owners, noted, started: false };
        uses.set_errors_aside(driver.context());
        Ok(uses)
    }

    /// Checks memory of the stream `owner`: it has to be in this backend's context, and other streams must be able to
    /// wait for `owner`.
    pub(super) fn admit(&mut self, argument: impl Into<Argument>, owner: &Arc<CudaStream>) -> Result<()> {
        let (argument, mine, found) = (argument.into(), self.driver.context(), owner.context());
        if found.ordinal() != mine.ordinal() {
            let argument = format!("the device of {argument}");
            return Err(value(argument, format!("cuda:{}", found.ordinal()), "the device of the backend's stream"));
        }
        if found.cu_ctx() != mine.cu_ctx() {
            let argument = format!("the CUDA context of {argument}");
            return Err(value(argument, "another one", "the context of the backend's stream"));
        }
        if owner.cu_stream() == self.driver.stream().cu_stream() || self.owners.iter().any(|known| known == owner) {
            return Ok(());
        }
        if is_per_thread(owner) {
            let argument = format!("the stream of {argument}");
            return Err(value(argument, "the per-thread default stream", PER_THREAD_RULE));
        }
        self.driver.refuse_capture(owner)?;
        self.set_errors_aside(found);
        self.owners.push(owner.clone());
        Ok(())
    }

    /// The address of memory that the work reads. It was admitted.
    pub(super) fn read(&mut self, memory: &'a dyn Readable) -> u64 {
        let (address, guard) = memory.read(self.driver.stream());
        self.guards.push(guard);
        address
    }

    /// The address of memory that the work writes. It was admitted.
    pub(super) fn write(&mut self, memory: &'a mut dyn Writable) -> u64 {
        let (address, guard) = memory.write(self.driver.stream());
        self.guards.push(guard);
        address
    }

    /// After the last check and before the first launch.
    pub(super) fn start(&mut self) -> Result<()> {
        checked("cuStreamWaitEvent", self.driver.context().check_err())?;
        // To wait for work that is being captured is to become part of the capture.
        self.driver.refuse_capture(self.driver.stream())?;
        self.owners.iter().try_for_each(|owner| self.driver.order(owner, self.driver.stream()))?;
        self.started = true;
        Ok(())
    }

    /// After the last launch, whether or not all were submitted.
    pub(super) fn finish(mut self, submitted: Result<()>) -> Result<()> {
        submitted.and(self.release())
    }

    fn release(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.started) {
            return Ok(());
        }
        self.guards.drain().for_each(drop);
        let recorded = checked("cuEventRecord", self.driver.context().check_err());
        let ordered = self.owners.iter().try_for_each(|owner| self.driver.order(self.driver.stream(), owner));
        let released = recorded.and(ordered);
        if released.is_err() {
            // Others would not wait for the work, so that it has to be over now.
            let _ = self.driver.synchronize();
        }
        released
    }

    fn set_errors_aside(&mut self, context: &Arc<CudaContext>) {
        if !self.noted.iter().any(|(known, _)| Arc::ptr_eq(known, context)) {
            self.noted.push((context.clone(), context.check_err().err()));
        }
    }
}

impl Drop for Uses<'_> {
    fn drop(&mut self) {
        let _ = self.release();
        // Of work that was not submitted there is nothing to record.
        self.guards.drain().for_each(std::mem::forget);
        for (context, error) in self.noted.drain() {
            if let Some(error) = error {
                context.record_err::<()>(Err(error));
            }
        }
    }
}
