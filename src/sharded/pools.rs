//! Pools of candidates from all ranks.

use super::collective::{Collective, gather_results};
use super::elements::Received;
use crate::error::{Error, Result};
use crate::problem::arrays::Ids;
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::pool::Pool;

/// One pool of all ranks, in the order of ranks.
pub(super) struct GatheredPool {
    candidates: Received,
    ids: Option<Vec<u64>>,
    log_q: Option<Vec<f32>>,
    /// Candidates of each rank.
    pub(super) lengths: Vec<usize>,
}

impl GatheredPool {
    pub(super) fn len(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Where a rank's candidates begin.
    pub(super) fn start_of(&self, rank: usize) -> usize {
        self.lengths[..rank].iter().sum()
    }

    pub(super) fn view(&self, gradient: bool) -> Pool<'_> {
        let pool = Pool::new(self.candidates.view());
        Pool { ids: self.ids.as_ref().map(Ids::from), log_q: self.log_q.as_deref(), gradient, ..pool }
    }
}

/// The pools of all ranks, whose batches have pools of the same kinds.
pub(super) fn gather_pools(collective: &mut impl Collective, batch: &Batch<'_>) -> Result<Vec<GatheredPool>> {
    let (dim, dtype) = (batch.dim(), batch.dtype());
    let gather = |pool: &Pool<'_>| {
        let Some(candidates) = pool.candidates() else { unreachable!("a batch over a table is rejected") };
        let all = gather_results(collective, Ok(contiguous(&candidates)))?;
        let lengths: Vec<usize> = all.iter().map(|bytes| bytes.len() / (dim * dtype.size())).collect();
        let ids = pool.ids_slice().map(|ids| gather_array(collective, ids, &lengths)).transpose()?;
        let log_q = pool.log_q.map(|log_q| gather_array(collective, log_q, &lengths)).transpose()?;
        Ok(GatheredPool { candidates: Received::from_bytes(&all.concat(), dim, dtype), ids, log_q, lengths })
    };
    batch.matrix.pools.iter().map(gather).collect()
}

/// The rows without what lies between them.
fn contiguous(embeddings: &Embeddings<'_>) -> Vec<u8> {
    let size = embeddings.dtype().size();
    let row = |row: usize| {
        let start = row * embeddings.stride() * size;
        &embeddings.bytes()[start..start + embeddings.dim() * size]
    };
    (0..embeddings.rows()).flat_map(row).copied().collect()
}

/// An array with one element for each candidate.
fn gather_array<T: bytemuck::Pod>(collective: &mut impl Collective, values: &[T], lengths: &[usize]) -> Result<Vec<T>> {
    let all = gather_results(collective, Ok(bytemuck::cast_slice(values).to_vec()))?;
    if let Some(rank) = (0..all.len()).find(|&rank| all[rank].len() != lengths[rank] * size_of::<T>()) {
        let reason = format!("rank {rank} gave {} bytes for {} candidates", all[rank].len(), lengths[rank]);
        return Err(Error::Collective { collective: "all_gather", rank: collective.rank(), reason });
    }
    Ok(bytemuck::pod_collect_to_vec(&all.concat()))
}
