//! What an executing instruction may reach: global memory, its CTA, the CTAs of its cluster.
use super::cluster::{Cluster, Launch};
use super::shared::Shared;
use crate::memory::Region;

/// Generic addresses outside the host's range. The low 32 bits of a shared one are the 32-bit shared address.
pub const SHARED_WINDOW: u64 = 0x1000_0000_0000_0000;
/// The low 32 bits are the byte in the thread's own local memory.
pub const LOCAL_WINDOW: u64 = 0x2000_0000_0000_0000;
/// Bits that tell the windows apart; 0 there means global.
pub const WINDOW_MASK: u64 = 0xF000_0000_0000_0000;

pub struct Machine<'a> {
    pub launch: &'a Launch<'a>,
    pub cluster: &'a mut Cluster,
    /// Rank of the executing CTA in its cluster: `cluster.blocks[block]`.
    pub block: usize,
    /// The region that the last global access hit.
    pub region: Region,
    /// PTX line of the executing instruction.
    pub line: u32,
}

impl Machine<'_> {
    /// The CTA and the offset that a 32-bit shared address (shared::cta or shared::cluster) names.
    #[inline(always)]
    pub fn shared_place(&self, address: u32) -> Result<(usize, u32), String> {
        let rank = address >> 24;
        if rank == 0 {
            return Ok((self.block, address));
        }
        let rank = rank as usize - 1;
        if rank >= self.cluster.blocks.len() {
            return Err(format!(
                "shared::cluster address {address:#x} names CTA {rank} of a cluster of {}",
                self.cluster.blocks.len()
            ));
        }
        Ok((rank, address & 0x00FF_FFFF))
    }

    /// Shared memory and offset for a 32-bit shared address.
    #[inline(always)]
    pub fn shared(&mut self, address: u32) -> Result<(&mut Shared, u32), String> {
        let (rank, offset) = self.shared_place(address)?;
        Ok((&mut self.cluster.blocks[rank].shared, offset))
    }

    /// The 32-bit address by which any CTA of the cluster reaches `offset` of the CTA `rank` (mapa).
    pub fn cluster_address(rank: usize, offset: u32) -> u32 {
        ((rank as u32 + 1) << 24) | (offset & 0x00FF_FFFF)
    }

    #[inline(always)]
    fn check_global(&mut self, at: u64, len: usize, verb: &str) -> Result<(), String> {
        if !self.region.holds(at, len as u64) {
            self.region = self.launch.view.locate(at, len as u64).ok_or_else(|| self.outside(at, len, verb))?;
        }
        Ok(())
    }

    #[cold]
    fn outside(&self, at: u64, len: usize, verb: &str) -> String {
        format!("{verb} of {len} bytes at global address {at:#x}: {}", self.launch.view.describe(at))
    }

    /// A checked pointer to `len` bytes that may be read at once.
    #[inline(always)]
    pub fn readable_global(&mut self, at: u64, len: usize) -> Result<*const u8, String> {
        self.check_global(at, len, "read")?;
        if self.region.shadowed() && !self.region.written(at, len as u64) {
            return Err(self.unwritten(at, len));
        }
        Ok(at as *const u8)
    }

    #[cold]
    fn unwritten(&self, at: u64, len: usize) -> String {
        format!("read of {len} bytes at global address {at:#x}, which nothing wrote: {}", self.launch.view.describe(at))
    }

    /// Checked read of global memory.
    #[inline(always)]
    pub fn read_global(&mut self, at: u64, out: &mut [u8]) -> Result<(), String> {
        let from = self.readable_global(at, out.len())?;
        // SAFETY: the range lies in a live allocation; races with other CTAs are the program's, as on a GPU.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Checked write of global memory.
    #[inline(always)]
    pub fn write_global(&mut self, at: u64, data: &[u8]) -> Result<(), String> {
        self.check_global(at, data.len(), "write")?;
        self.region.mark_written(at, data.len() as u64);
        // SAFETY: as in `read_global`. Known lengths become single moves, so that no other CTA sees half a value.
        unsafe {
            let (from, to) = (data.as_ptr(), at as *mut u8);
            match data.len() {
                4 => to.cast::<u32>().write_unaligned(from.cast::<u32>().read_unaligned()),
                8 => to.cast::<u64>().write_unaligned(from.cast::<u64>().read_unaligned()),
                16 => to.cast::<u128>().write_unaligned(from.cast::<u128>().read_unaligned()),
                n => std::ptr::copy_nonoverlapping(from, to, n),
            }
        }
        Ok(())
    }

    /// A checked pointer for an atomic of `len` bytes.
    pub fn global_slot(&mut self, at: u64, len: usize) -> Result<*mut u8, String> {
        self.check_global(at, len, "atomic")?;
        if self.region.shadowed() && !self.region.written(at, len as u64) {
            return Err(format!("atomic on {len} bytes at global address {at:#x}, which nothing wrote"));
        }
        Ok(at as *mut u8)
    }

    /// Read through a generic address that is global or shared (local is a lane's own: see `access`).
    pub fn read_generic(&mut self, at: u64, out: &mut [u8]) -> Result<(), String> {
        match at & WINDOW_MASK {
            SHARED_WINDOW => {
                let (shared, offset) = self.shared(at as u32)?;
                out.copy_from_slice(shared.read(offset, out.len())?);
                Ok(())
            }
            _ => self.read_global(at, out),
        }
    }

    pub fn write_generic(&mut self, at: u64, data: &[u8]) -> Result<(), String> {
        match at & WINDOW_MASK {
            SHARED_WINDOW => {
                let (shared, offset) = self.shared(at as u32)?;
                shared.write(offset, data)
            }
            _ => self.write_global(at, data),
        }
    }
}
