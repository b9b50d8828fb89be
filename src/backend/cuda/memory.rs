//! Device memory of a step: parts laid out before anything is allocated, in one block that grows and is kept.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result};

use super::driver::{Driver, checked};
use crate::error::{Error, Result};

/// Parts start at multiples of this, as the widest loads and the copy engines like.
const ALIGNMENT: usize = 256;

/// Counts bytes while parts are laid out.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    bytes: usize,
}

/// A stretch of a block; 0 bytes for what a step does not need.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Part {
    offset: usize,
    bytes: usize,
}

impl Layout {
    pub(super) fn part(&mut self, count: usize, element: usize) -> Part {
        let part = Part { offset: self.bytes, bytes: count * element };
        self.bytes += part.bytes.next_multiple_of(ALIGNMENT);
        part
    }

    /// [`part`](Layout::part) where `needed`, else none.
    pub(super) fn part_if(&mut self, needed: bool, count: usize, element: usize) -> Part {
        if needed { self.part(count, element) } else { Part::default() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A block of device memory.
#[derive(Debug)]
pub(super) struct Arena {
    context: Arc<CudaContext>,
    base: u64,
    bytes: usize,
}

impl Arena {
    pub(super) fn new(context: Arc<CudaContext>) -> Self {
        // Nothing is there yet, but no part that will be may look like the null pointer: plans ask.
        Arena { context, base: ALIGNMENT as u64, bytes: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Makes room for a layout. What the block held is lost where it grows.
    pub(super) fn reserve(&mut self, driver: &Driver, layout: Layout) -> Result<()> {
        if layout.bytes <= self.bytes {
            return Ok(());
        }
        // Work that uses the old block may still run.
        driver.synchronize()?;
        self.free();
        let (free, _) = checked("cuMemGetInfo", self.context.mem_get_info())?;
        if free < layout.bytes {
            return Err(Error::DeviceMemory { needed: layout.bytes, free });
        }
        // SAFETY: the context is bound to this thread (Driver::bind), and the size is not 0.
        self.base = checked("cuMemAlloc", unsafe { result::malloc_sync(layout.bytes) })?;
        self.bytes = layout.bytes;
        Ok(())
    }

    /// Device address of a part; 0, the null pointer, of one that is not there.
    pub(super) fn address(&self, part: Part) -> u64 {
        if part.bytes == 0 { 0 } else { self.base + part.offset as u64 }
    }

    pub(super) fn upload<T: bytemuck::NoUninit>(&self, driver: &Driver, part: Part, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(bytes.len() <= part.bytes, "a part has room for what is uploaded");
        if bytes.is_empty() { Ok(()) } else { driver.upload(self.address(part), bytes) }
    }

    /// Fills `values` from the start of a part. Waits for the device.
    pub(super) fn download<T: bytemuck::Pod>(&self, driver: &Driver, part: Part, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        assert!(bytes.len() <= part.bytes, "a part holds what is downloaded");
        if bytes.is_empty() { Ok(()) } else { driver.download(bytes, self.address(part)) }
    }

    fn free(&mut self) {
        if self.bytes != 0 && self.context.bind_to_thread().is_ok() {
            // SAFETY: `base` came from `malloc_sync`, is freed once, and nothing that uses it is pending (`reserve` waited,
            // and cuMemFree itself waits). An error here has been reported by an earlier call already.
            let _ = unsafe { result::free_sync(self.base) };
        }
        (self.base, self.bytes) = (ALIGNMENT as u64, 0);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.free();
    }
}
