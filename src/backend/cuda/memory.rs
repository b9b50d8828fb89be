//! Device memory of a step: parts laid out before anything is allocated, in one block that grows and is kept.

use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::driver::Driver;
use super::stream::checked;
use crate::error::{Error, Result, shape};

/// Parts start at multiples of this, as the widest loads and the copy engines like.
pub(super) const ALIGNMENT: usize = 256;

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

/// Where a layout begins: the address of its first part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Base(u64);

impl Base {
    /// Where nothing is allocated yet, no part may look like the null pointer: plans ask.
    pub(super) const PLANNED: Base = Base(ALIGNMENT as u64);

    /// Device address of a part; 0, the null pointer, of one that is not there.
    pub(super) fn address(self, part: Part) -> u64 {
        if part.bytes == 0 { 0 } else { self.0 + part.offset as u64 }
    }
}

/// A workspace of the caller's, checked for its alignment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct GivenWorkspace {
    pub(super) address: u64,
    pub(super) bytes: usize,
}

/// Device memory, freed in the order of the stream that it was allocated in.
#[derive(Debug)]
struct Block {
    driver: Driver,
    base: u64,
    bytes: usize,
}

impl Block {
    fn new(driver: &Driver, bytes: usize) -> Result<Self> {
        driver.refuse_every_capture()?;
        let base = match allocate(driver, bytes) {
            Err(OUT_OF_MEMORY) => {
                give_back(driver);
                allocate(driver, bytes)
            }
            other => other,
        };
        match base {
            Ok(base) => Ok(Block { driver: driver.clone(), base, bytes }),
            Err(OUT_OF_MEMORY) => {
                let (free, _) = checked("cuMemGetInfo", result::mem_get_info())?;
                Err(Error::DeviceMemory { needed: bytes, free })
            }
            Err(error) => checked("cuMemAllocAsync", Err(error)),
        }
    }
}

const OUT_OF_MEMORY: DriverError = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);

/// In the order of the stream where the device has memory pools, as nearly all have.
fn allocate(driver: &Driver, bytes: usize) -> std::result::Result<u64, DriverError> {
    if driver.context().has_async_alloc() {
        // SAFETY: the stream is live, its context bound, and the size not 0. Whoever uses the memory on another stream
        // makes that one wait (`Uses`).
        unsafe { result::malloc_async(driver.stream().cu_stream(), bytes) }
    } else {
        // SAFETY: as above.
        unsafe { result::malloc_sync(bytes) }
    }
}

/// Makes the device's pool return what it keeps for later allocations: memory that was freed in the order of a stream,
/// too, once the stream has come there. If it fails, nothing changes, and the allocation that follows fails.
fn give_back(driver: &Driver) {
    let _ = result::ctx::synchronize();
    // SAFETY: the device is that of a live context, and the pool is the device's.
    let _ = unsafe {
        result::device::get_mem_pool(driver.context().cu_device()).and_then(|pool| result::mem_pool::trim_to(pool, 0))
    };
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.driver.bind().is_err() {
            return;
        }
        // An error in what follows is that of a device that has failed, with all its memory.
        if self.driver.context().has_async_alloc() {
            // SAFETY: `base` came from `malloc_async` and is freed once. What used it on this stream was submitted
            // before, and what used it on others, this stream was made to wait for (`Uses`).
            let _ = unsafe { result::free_async(self.base, self.driver.stream().cu_stream()) };
        } else if self.driver.synchronize().is_ok() {
            // SAFETY: as above; the stream was waited for.
            let _ = unsafe { result::free_sync(self.base) };
        }
    }
}

/// One block that grows, or none yet.
#[derive(Debug, Default)]
pub(super) struct Arena {
    block: Option<Arc<Block>>,
    /// Blocks that graphs of the caller's may use.
    outgrown: Vec<Arc<Block>>,
}

/// Keeps an arena's block as it is now.
#[derive(Debug, Clone)]
pub(super) struct Keep(Option<Arc<Block>>);

impl Keep {
    /// Of a graph whose workspace is the caller's.
    pub(super) const NOTHING: Keep = Keep(None);

    pub(super) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |block| block.bytes)
    }
}

impl Arena {
    pub(super) fn bytes(&self) -> usize {
        self.block.iter().chain(&self.outgrown).map(|block| block.bytes).sum()
    }

    /// Makes room for a layout. What the block held is lost where it grows; graphs that use it keep it.
    pub(super) fn reserve(&mut self, driver: &Driver, layout: Layout) -> Result<()> {
        if layout.bytes <= self.block.as_ref().map_or(0, |block| block.bytes) {
            return Ok(());
        }
        // First, so that its memory can be had again.
        self.release(driver);
        self.block = Some(Arc::new(Block::new(driver, layout.bytes)?));
        Ok(())
    }

    /// Where a layout lies: in the caller's workspace if there is one, else here, where this makes room for it.
    pub(super) fn place(&mut self, driver: &Driver, layout: Layout, given: Option<GivenWorkspace>) -> Result<Base> {
        let Some(GivenWorkspace { address, bytes }) = given else {
            self.reserve(driver, layout)?;
            return Ok(self.base());
        };
        if bytes < layout.bytes {
            let rule = format!("at least {} bytes, which a plan says", layout.bytes);
            return Err(shape("workspace", format!("{bytes} bytes"), rule));
        }
        Ok(Base(address))
    }

    /// Frees the block in the order of its stream, or keeps it for graphs of the caller's.
    pub(super) fn release(&mut self, driver: &Driver) {
        let block = self.block.take();
        if driver.capture_allowed {
            self.outgrown.extend(block);
        }
    }

    /// What a graph keeps that was captured now.
    pub(super) fn keep(&self) -> Keep {
        Keep(self.block.clone())
    }

    pub(super) fn base(&self) -> Base {
        self.block.as_ref().map_or(Base::PLANNED, |block| Base(block.base))
    }

    /// Device address of a part.
    pub(super) fn address(&self, part: Part) -> u64 {
        self.base().address(part)
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
}
