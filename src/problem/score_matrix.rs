//! Which scores a call computes. The B x N matrix itself is never stored.

use super::arrays::{Excluded, check_all, check_csr};
use super::embeddings::{DType, Embeddings};
use super::pool::Pool;
use super::shape::{MatrixShape, PoolShape, ScoreMatrixShape, check_score_matrix};
use crate::error::{Argument, Result};

/// Queries (B, D) against the candidates of all pools (N, D together), less the ids that each row excludes.
#[derive(Debug, Clone)]
pub(crate) struct ScoreMatrix<'a> {
    pub(crate) queries: Embeddings<'a>,
    pub(crate) pools: Vec<Pool<'a>>,
    pub(crate) excluded: Option<Excluded<'a>>,
}

impl<'a> ScoreMatrix<'a> {
    pub(crate) fn new(queries: Embeddings<'a>, candidates: Pool<'a>) -> Self {
        ScoreMatrix { queries, pools: vec![candidates], excluded: None }
    }

    /// B.
    pub(crate) fn num_queries(&self) -> usize {
        self.queries.rows()
    }

    /// N, over all pools.
    pub(crate) fn num_candidates(&self) -> usize {
        ScoreMatrixShape::num_candidates(self)
    }

    /// D.
    pub(crate) fn dim(&self) -> usize {
        self.queries.dim()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.queries.dtype()
    }

    /// The pools with the index of each one's first candidate.
    pub(crate) fn pools_with_start(&self) -> impl Iterator<Item = (usize, &Pool<'a>)> {
        self.pools.iter().scan(0, |start, pool| {
            let first = *start;
            *start += pool.candidates.rows();
            Some((first, pool))
        })
    }

    /// Checks the shapes of queries, pools and exclusions. Checks also that views lie within their slices and that
    /// values are allowed, which is possible for host memory only.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_views()?;
        check_score_matrix(self)?;
        self.check_values()
    }

    pub(super) fn check_views(&self) -> Result<()> {
        self.queries.check("queries")?;
        let mut pools = self.pools.iter().enumerate();
        pools.try_for_each(|(p, pool)| pool.candidates.check(self.argument(p, "candidates")))
    }

    fn argument(&self, pool: usize, field: &'static str) -> Argument {
        Argument::OfPool { pool, pools: self.pools.len(), field }
    }

    pub(super) fn check_values(&self) -> Result<()> {
        for (p, pool) in self.pools.iter().enumerate() {
            if let Some(log_q) = pool.log_q {
                check_all(self.argument(p, "log_q"), log_q, "finite", f32::is_finite)?;
            }
        }
        let Some(Excluded { offsets, ids }) = &self.excluded else { return Ok(()) };
        check_csr(("exclude_offsets", offsets), ("exclude_ids", ids.0.len()), self.num_queries())
    }
}

impl ScoreMatrixShape for ScoreMatrix<'_> {
    fn queries(&self) -> MatrixShape {
        self.queries.shape()
    }
    fn num_pools(&self) -> usize {
        self.pools.len()
    }
    fn pool(&self, index: usize) -> PoolShape {
        self.pools[index].shape()
    }
    fn excluded(&self) -> Option<[usize; 2]> {
        self.excluded.as_ref().map(|excluded| [excluded.offsets.len(), excluded.ids.0.len()])
    }
}
