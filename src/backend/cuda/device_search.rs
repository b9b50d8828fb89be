//! Queries, candidates and exclusions in the caller's device memory. That is all of a search, and a part of a batch.

use super::device_table::{DeviceRowNegatives, DeviceTable};
use super::few::Few;
use super::memory::GivenWorkspace;
use super::problem::{GivenRows, Problem, ProblemPool, ProblemPositives, ProblemRowNegatives, Rows};
use super::uses::Uses;
use super::view::{DeviceEmbeddings, DeviceSlice, DeviceSliceMut};
use crate::error::{Argument, Result, does_not_apply, missing};
use crate::problem::loss::Similarity;
use crate::problem::search::check_k;
use crate::problem::shape::{MatrixShape, PoolShape, RowNegativesShape, ScoreMatrixShape, check_score_matrix};

/// Candidates in device memory, as [`Pool`](crate::Pool) in host memory.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct DevicePool<'a> {
    pub(super) candidates: DeviceCandidates<'a>,
    pub(super) ids: Option<DeviceSlice<'a, u64>>,
    pub(super) log_q: Option<DeviceSlice<'a, f32>>,
    pub(super) gradient: bool,
}

/// Where a pool's candidates are.
#[derive(Debug, Clone, Copy)]
pub(super) enum DeviceCandidates<'a> {
    Embeddings(DeviceEmbeddings<'a>),
    /// (N) rows of the batch's table.
    Rows(DeviceSlice<'a, u32>),
    WholeTable,
}

impl<'a> DevicePool<'a> {
    /// (N, D) candidates.
    pub fn new(candidates: DeviceEmbeddings<'a>) -> Self {
        Self::of(DeviceCandidates::Embeddings(candidates))
    }

    /// (N): candidates by reference, rows of the batch's table.
    pub fn rows(candidate_rows: DeviceSlice<'a, u32>) -> Self {
        Self::of(DeviceCandidates::Rows(candidate_rows))
    }

    /// Every row of the batch's table, in order.
    pub fn whole_table() -> Self {
        Self::of(DeviceCandidates::WholeTable)
    }

    fn of(candidates: DeviceCandidates<'a>) -> Self {
        DevicePool { candidates, ids: None, log_q: None, gradient: true }
    }

    /// (N) item ids.
    pub fn ids(mut self, candidate_ids: DeviceSlice<'a, u64>) -> Self {
        self.ids = Some(candidate_ids);
        self
    }

    /// (N) log of each candidate's sampling probability.
    pub fn log_q(mut self, log_q: DeviceSlice<'a, f32>) -> Self {
        self.log_q = Some(log_q);
        self
    }

    /// The candidates receive no gradient.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }
}

/// A search in device memory, with the names and shapes of a [`Search`](crate::Search) in host memory.
///
/// Shapes, alignment and devices of the views are checked when a search is planned or run. Only the device sees whether
/// offsets ascend from 0 to the number of ids. If they do not, the search stays in bounds, and
/// [`Cuda::fault`](super::Cuda::fault) reports it.
#[derive(Debug, Clone)]
#[must_use]
pub struct DeviceSearch<'a> {
    pub(super) queries: DeviceEmbeddings<'a>,
    /// Whose rows the candidates are, where it is over a table.
    pub(super) table: Option<DeviceTable<'a>>,
    pub(super) row_negatives: Option<DeviceRowNegatives<'a>>,
    pub(super) pools: Few<DevicePool<'a>, 2>,
    pub(super) excluded: Option<(DeviceSlice<'a, i64>, DeviceSlice<'a, u64>)>,
}

impl<'a> DeviceSearch<'a> {
    /// (B, D) queries, and candidates without log_q: a search ranks by similarity alone.
    pub fn new(queries: DeviceEmbeddings<'a>, pool: DevicePool<'a>) -> Self {
        DeviceSearch { pools: [pool].into_iter().collect(), ..Self::of_queries(queries) }
    }

    /// (B, D) queries against rows of a `table` (M, D): those of [`DevicePool::rows`], or with no pool all of them. An item that has no
    /// id is its row.
    pub fn of_table(queries: DeviceEmbeddings<'a>, table: DeviceTable<'a>) -> Self {
        DeviceSearch { table: Some(table), ..Self::of_queries(queries) }
    }

    pub(super) fn of_queries(queries: DeviceEmbeddings<'a>) -> Self {
        DeviceSearch { queries, table: None, row_negatives: None, pools: Few::default(), excluded: None }
    }

    /// A further pool of candidates.
    pub fn pool(mut self, pool: DevicePool<'a>) -> Self {
        self.pools.push(pool);
        self
    }

    /// Per row, ids that must not be returned, as CSR: row i has `ids[offsets[i]..offsets[i + 1]]`.
    pub fn excluded_ids(mut self, offsets: DeviceSlice<'a, i64>, ids: DeviceSlice<'a, u64>) -> Self {
        self.excluded = Some((offsets, ids));
        self
    }
}

/// The caller's device memory that a search writes, with the contents of a [`TopK`](crate::TopK).
#[derive(Debug)]
pub struct DeviceTopK<'a> {
    /// (B, K) index over the candidates of all pools, best first. A row with fewer than K ends with
    /// [`TopK::NONE`](crate::TopK::NONE).
    pub indices: DeviceSliceMut<'a, u32>,
    /// (B, K) similarity, not divided by a temperature. A row with fewer than K ends with −∞.
    pub scores: DeviceSliceMut<'a, f32>,
    /// Memory to work in, in place of the backend's own: at least the bytes that
    /// [`Cuda::plan_top_k_on_device`](super::Cuda::plan_top_k_on_device) says, from a multiple of 256 on.
    pub workspace: Option<DeviceSliceMut<'a, u8>>,
}

impl<'a> DeviceSearch<'a> {
    /// Checks the search and returns its addresses.
    pub(super) fn checked(&self, similarity: Similarity, k: usize, tf32: bool, uses: &mut Uses<'a>) -> Result<Problem> {
        if self.table.is_some() && self.pools.len() == 0 {
            return self.clone().pool(DevicePool::whole_table()).checked(similarity, k, tf32, uses);
        }
        if self.pools.iter().any(|pool| pool.log_q.is_some()) {
            return Err(does_not_apply("log_q", "a search ranks all candidates by similarity alone"));
        }
        self.check_views()?;
        check_score_matrix(self)?;
        let problem = self.problem(similarity, 1.0, tf32, uses)?;
        check_k(k, problem.num_candidates())?;
        problem.check_pairs()?;
        Ok(problem)
    }

    pub(super) fn check_views(&self) -> Result<()> {
        self.queries.check("queries")?;
        let pools = self.pools.len();
        let mut all = self.pools.iter().enumerate();
        self.table.map_or(Ok(()), |table| table.embeddings.check("table"))?;
        all.try_for_each(|(pool, p)| match p.candidates {
            DeviceCandidates::Embeddings(rows) => rows.check(Argument::OfPool { pool, pools, field: "candidates" }),
            DeviceCandidates::Rows(_) | DeviceCandidates::WholeTable if self.table.is_none() => Err(missing(
                "table",
                "DevicePool::rows and whole_table name its rows: use of_table of a batch or a search",
            )),
            DeviceCandidates::Rows(_) | DeviceCandidates::WholeTable => Ok(()),
        })
    }

    /// Queries, pools and exclusions by their addresses, with no positives; `scale` multiplies similarities. Their shapes
    /// have been checked.
    pub(super) fn problem(
        &self,
        similarity: Similarity,
        scale: f32,
        tf32: bool,
        uses: &mut Uses<'a>,
    ) -> Result<Problem> {
        let queries = self.queries.address("queries", uses)?;
        let table = self.table.map(|table| table.embeddings.address("table", uses)).transpose()?;
        let table_ids = self.table.and_then(|table| table.ids);
        let (pools, mut given_rows) = checked_pools(self, table, uses)?;
        let own = self.row_negatives.map(|own| own.checked(uses)).transpose()?;
        if let Some(own) = own {
            let (address, count) = (own.rows, own.per_row * queries.rows);
            given_rows.push(GivenRows { address, count, kind: FAULT_ROW_NEGATIVES, allows_none: true });
        }
        let (exclude_offsets, exclude_ids, excluded) = checked_excluded(self, uses)?;
        Ok(Problem {
            dtype: self.queries.dtype(),
            tf32,
            dim: self.queries.dim(),
            cosine: similarity == Similarity::Cosine,
            scale,
            queries,
            pools,
            table,
            table_ids: table_ids.map_or(Ok(0), |ids| ids.address("table ids", uses))?,
            table_gradient: self.table.is_some_and(|table| table.gradient),
            given_rows,
            row_negatives: own,
            positives: ProblemPositives::None,
            pairs: 0,
            positive_offsets: 0,
            positive_ids: 0,
            positive_log_q: 0,
            positive_weight: 0,
            filter: None,
            row_weight: 0,
            exclude_offsets,
            exclude_ids,
            excluded,
            log_q_range: None,
        })
    }
}

impl DeviceTopK<'_> {
    /// Checks the memory for `b` rows and returns the addresses of indices and scores, and the caller's workspace.
    pub(super) fn checked<'u>(
        &'u mut self,
        b: usize,
        k: usize,
        uses: &mut Uses<'u>,
    ) -> Result<(u64, u64, Option<GivenWorkspace>)> {
        let indices = self.indices.checked("indices", b * k, uses)?;
        let scores = self.scores.checked("scores", b * k, uses)?;
        Ok((indices, scores, self.workspace.as_mut().map(|slice| slice.workspace(uses)).transpose()?))
    }
}

/// As in `fault.cuh`.
const FAULT_CANDIDATE_ROWS: u32 = 8;
const FAULT_ROW_NEGATIVES: u32 = 9;
pub(super) const FAULT_POSITIVE_ROWS: u32 = 10;

impl<'a> DeviceRowNegatives<'a> {
    fn checked(&self, uses: &mut Uses<'a>) -> Result<ProblemRowNegatives> {
        Ok(ProblemRowNegatives {
            rows: self.rows.address("row_negatives", uses)?,
            log_q: self.log_q.map_or(Ok(0), |log_q| log_q.address("row_negatives_log_q", uses))?,
            per_row: self.per_row,
        })
    }
}

/// The pools, and the rows of the table that they name.
fn checked_pools<'a>(
    search: &DeviceSearch<'a>,
    table: Option<Rows>,
    uses: &mut Uses<'a>,
) -> Result<(Few<ProblemPool, 2>, Few<GivenRows, 4>)> {
    let (mut pools, mut given, mut start) = (Few::default(), Few::default(), 0);
    let table_ids = search.table.and_then(|table| table.ids);
    let table_gradient = search.table.is_some_and(|table| table.gradient);
    for (p, pool) in search.pools.iter().enumerate() {
        let name = |field| Argument::OfPool { pool: p, pools: search.pools.len(), field };
        let (candidates, of_table) = match (pool.candidates, table) {
            (DeviceCandidates::Embeddings(rows), _) => (rows.address(name("candidates"), uses)?, false),
            (DeviceCandidates::Rows(rows), Some(table)) => {
                let (address, count) = (rows.address(name("candidate_rows"), uses)?, rows.len());
                given.push(GivenRows { address, count, kind: FAULT_CANDIDATE_ROWS, allows_none: false });
                (table.by_reference(address, count), true)
            }
            (DeviceCandidates::WholeTable, Some(table)) => (table, true),
            (DeviceCandidates::Rows(_) | DeviceCandidates::WholeTable, None) => unreachable!("check_views"),
        };
        let ids = if of_table { table_ids } else { pool.ids };
        pools.push(ProblemPool {
            candidates,
            start,
            ids: ids.map_or(Ok(0), |ids| ids.address(name("candidate_ids"), uses))?,
            log_q: pool.log_q.map_or(Ok(0), |log_q| log_q.address(name("log_q"), uses))?,
            gradient: pool.gradient && (!of_table || table_gradient),
            of_table,
        });
        start += candidates.rows;
    }
    Ok((pools, given))
}

fn checked_excluded<'a>(search: &DeviceSearch<'a>, uses: &mut Uses<'a>) -> Result<(u64, u64, usize)> {
    let Some((offsets, ids)) = &search.excluded else { return Ok((0, 0, 0)) };
    let count = ids.len();
    let ids = if count == 0 { 0 } else { ids.address("exclude_ids", uses)? };
    Ok((offsets.address("exclude_offsets", uses)?, ids, count))
}

impl ScoreMatrixShape for DeviceSearch<'_> {
    fn queries(&self) -> MatrixShape {
        self.queries.shape()
    }
    fn table(&self) -> Option<(MatrixShape, Option<usize>)> {
        self.table.map(|table| (table.embeddings.shape(), table.ids.map(|ids| ids.len())))
    }
    fn row_negatives(&self) -> Option<RowNegativesShape> {
        let DeviceRowNegatives { rows, per_row, log_q } = self.row_negatives?;
        Some(RowNegativesShape { rows: rows.len(), per_row, log_q: log_q.map(|log_q| log_q.len()) })
    }
    fn num_pools(&self) -> usize {
        self.pools.len()
    }
    fn pool(&self, index: usize) -> PoolShape {
        let pool = &self.pools[index];
        let table = || self.table.map_or(self.queries.shape(), |table| table.embeddings.shape());
        let (candidates, of_table) = match pool.candidates {
            DeviceCandidates::Embeddings(rows) => (rows.shape(), false),
            DeviceCandidates::Rows(rows) => (MatrixShape { rows: rows.len(), ..table() }, true),
            DeviceCandidates::WholeTable => (table(), true),
        };
        PoolShape {
            candidates,
            of_table,
            ids: pool.ids.map(|ids| ids.len()),
            log_q: pool.log_q.map(|log_q| log_q.len()),
            gradient: pool.gradient,
        }
    }
    fn excluded(&self) -> Option<[usize; 2]> {
        self.excluded.map(|(offsets, ids)| [offsets.len(), ids.len()])
    }
}
