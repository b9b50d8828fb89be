//! NCCL between GPUs, on the caller's communicator and stream.

use cudarc::driver::DeviceRepr;
use cudarc::driver::DriverError;
use cudarc::nccl::result::NcclError;
use cudarc::nccl::{Comm, NcclType, ReduceOp};

use super::collective::{Collective, Numbers};
use super::threads::own_part;
use crate::error::{Error, Result};

/// A rank of an NCCL communicator of the caller's, with the feature `nccl`.
///
/// Operations run on the communicator's stream. What a rank gives is copied to the device, and the results back to the host,
/// so each operation waits for the stream. With one algorithm and one topology NCCL sums in the same order in every run; the
/// variables `NCCL_ALGO` and `NCCL_PROTO` fix them.
///
/// NCCL does not return while a rank is missing. To be told of one, let the caller watch its ranks and abort the
/// communicator; the operation then returns [`Error::Collective`].
///
/// The tests of this crate compile this type and do not run it, because they have no two GPUs. [`Threads`](super::Threads)
/// has the same contract and is tested.
///
/// ```no_run
/// use catalog_softmax::cuda::Cuda;
/// use catalog_softmax::cuda::cudarc::driver::CudaContext;
/// use catalog_softmax::cuda::cudarc::nccl::{Comm, Id};
/// use catalog_softmax::sharded::{Nccl, Sharded};
/// # let (rank, num_ranks, shard_rows) = (0, 2, 1000);
/// # fn id_from_rank_zero() -> Id { Id::uninit([0; 128]) }
/// let stream = CudaContext::new(rank)?.new_stream()?;
/// let communicator = Comm::from_rank(stream.clone(), rank, num_ranks, id_from_rank_zero()).expect("a communicator");
/// let sharded = Sharded::new(Cuda::on_stream(stream)?, Nccl::new(&communicator), shard_rows)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Nccl<'c> {
    communicator: &'c Comm,
}

impl<'c> Nccl<'c> {
    /// This rank of the communicator.
    pub fn new(communicator: &'c Comm) -> Self {
        Nccl { communicator }
    }

    /// Gathers equally many bytes of each rank.
    fn gather_equal(&self, mine: &[u8]) -> Result<Vec<u8>, Failed> {
        let stream = self.communicator.stream();
        let given = stream.clone_htod(mine)?;
        let mut all = stream.alloc_zeros::<u8>(mine.len() * self.communicator.world_size())?;
        self.communicator.all_gather(&given, &mut all)?;
        Ok(stream.clone_dtoh(&all)?)
    }

    /// Gathers the lengths, then as many bytes of each rank as the longest has.
    fn gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Failed> {
        let lengths = self.gather_equal(&(mine.len() as u64).to_le_bytes())?;
        let length = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes")) as usize;
        let lengths: Vec<usize> = lengths.chunks_exact(8).map(length).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return Ok(vec![Vec::new(); lengths.len()]);
        }
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let all = self.gather_equal(&padded)?;
        Ok(all.chunks_exact(longest).zip(lengths).map(|(bytes, len)| bytes[..len].to_vec()).collect())
    }

    fn sum_all<T: NcclType + DeviceRepr>(&self, numbers: &mut [T]) -> Result<(), Failed> {
        if numbers.is_empty() {
            return Ok(());
        }
        let stream = self.communicator.stream();
        let mut on_device = stream.clone_htod(numbers)?;
        self.communicator.all_reduce_in_place(&mut on_device, &ReduceOp::Sum)?;
        stream.memcpy_dtoh(&on_device, numbers)?;
        Ok(stream.synchronize()?)
    }

    /// Reduces each rank's part to that rank. NCCL's own reduce_scatter has equal parts alone.
    fn sum_own_part<T: NcclType + DeviceRepr>(&self, numbers: &mut [T], lengths: &[usize]) -> Result<(), Failed> {
        if numbers.is_empty() {
            return Ok(());
        }
        let stream = self.communicator.stream();
        let mut on_device = stream.clone_htod(numbers)?;
        let mut start = 0;
        for (root, &len) in lengths.iter().enumerate().filter(|(_, len)| **len > 0) {
            let mut part = on_device.slice_mut(start..start + len);
            self.communicator.reduce_in_place(&mut part, &ReduceOp::Sum, root as i32)?;
            start += len;
        }
        stream.memcpy_dtoh(&on_device, numbers)?;
        Ok(stream.synchronize()?)
    }

    fn error(&self, collective: &'static str) -> impl Fn(Failed) -> Error {
        let rank = self.communicator.rank();
        move |Failed(reason)| Error::Collective { collective, rank, reason }
    }
}

impl Collective for Nccl<'_> {
    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    fn num_ranks(&self) -> usize {
        self.communicator.world_size()
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gather(mine).map_err(self.error("all_gather"))
    }

    fn sum(&mut self, numbers: Numbers<'_>) -> Result<()> {
        let summed = match numbers {
            Numbers::F32(numbers) => self.sum_all(numbers),
            Numbers::F64(numbers) => self.sum_all(numbers),
        };
        summed.map_err(self.error("sum"))
    }

    fn reduce_scatter(&mut self, numbers: Numbers<'_>, lengths: &[usize]) -> Result<()> {
        own_part(self.rank(), self.num_ranks(), numbers.len(), lengths)?;
        let summed = match numbers {
            Numbers::F32(numbers) => self.sum_own_part(numbers, lengths),
            Numbers::F64(numbers) => self.sum_own_part(numbers, lengths),
        };
        summed.map_err(self.error("reduce_scatter"))
    }
}

/// Why a call of NCCL or of the driver failed.
struct Failed(String);

impl From<NcclError> for Failed {
    fn from(error: NcclError) -> Self {
        Failed(format!("NCCL returned {:?}", error.0))
    }
}

impl From<DriverError> for Failed {
    fn from(error: DriverError) -> Self {
        Failed(format!("the CUDA driver returned error {}", error.0 as i32))
    }
}
