//! Which scores a call computes. The B x N matrix itself is never stored.

use super::arrays::{Excluded, Indices, check_all, check_csr};
use super::embeddings::{DType, Embeddings, Real};
use super::pool::{Candidates, Pool};
use super::shape::{MatrixShape, PoolShape, RowNegativesShape, ScoreMatrixShape, check_score_matrix};
use super::table::{RowNegatives, Table, check_rows_of_table};
use crate::error::{Argument, Result, missing};

/// Queries (B, D) against the candidates of all pools (N, D together) and against each row's own negatives (B, K), less
/// the ids that each row excludes.
#[derive(Debug, Clone)]
pub(crate) struct ScoreMatrix<'a> {
    pub(crate) queries: Embeddings<'a>,
    pub(crate) table: Option<Table<'a>>,
    pub(crate) pools: Vec<Pool<'a>>,
    pub(crate) row_negatives: Option<RowNegatives<'a>>,
    pub(crate) excluded: Option<Excluded<'a>>,
}

/// The candidates of one pool, wherever they are: candidate j is row `row(j)` of `embeddings`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CandidateRows<'a> {
    /// `None` where the batch knows only the shape of its table.
    embeddings: Option<Embeddings<'a>>,
    rows: Option<Indices<'a>>,
    len: usize,
}

impl<'a> CandidateRows<'a> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn row(&self, candidate: usize) -> usize {
        self.rows.map_or(candidate, |rows| rows.at(candidate))
    }

    /// The matrix that holds the candidates. Whoever streams has checked that it is there.
    pub(crate) fn embeddings(&self) -> Embeddings<'a> {
        self.embeddings.expect("a batch with the shape of a table only is rejected before it is streamed")
    }

    pub(crate) fn widen<T: Real>(&self, candidate: usize, out: &mut [T]) {
        self.embeddings().widen_row(self.row(candidate), out);
    }
}

impl<'a> ScoreMatrix<'a> {
    pub(crate) fn new(queries: Embeddings<'a>, candidates: Pool<'a>) -> Self {
        ScoreMatrix { queries, table: None, pools: vec![candidates], row_negatives: None, excluded: None }
    }

    pub(crate) fn of_table(queries: Embeddings<'a>, table: Table<'a>) -> Self {
        ScoreMatrix { queries, table: Some(table), pools: Vec::new(), row_negatives: None, excluded: None }
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

    /// Where the candidates of pool `index` are.
    pub(crate) fn candidates(&self, index: usize) -> CandidateRows<'a> {
        let table = self.table.as_ref();
        let of_table = table.and_then(|table| table.embeddings);
        match self.pools[index].candidates {
            Candidates::Embeddings(embeddings) => {
                CandidateRows { embeddings: Some(embeddings), rows: None, len: embeddings.rows() }
            }
            Candidates::Rows(rows) => CandidateRows { embeddings: of_table, rows: Some(rows), len: rows.len() },
            Candidates::WholeTable => {
                CandidateRows { embeddings: of_table, rows: None, len: table.map_or(0, |table| table.shape.rows) }
            }
        }
    }

    /// The pools, each with the index over all pools of its first candidate.
    pub(crate) fn pools_with_start(&self) -> impl Iterator<Item = (usize, &Pool<'a>)> + Clone {
        let mut start = 0;
        self.pools.iter().enumerate().map(move |(index, pool)| {
            let first = start;
            start += self.candidates(index).len();
            (first, pool)
        })
    }

    /// The embedding of candidate `index`, as its pool and row there.
    pub(crate) fn locate(&self, index: usize) -> (usize, usize) {
        let mut row = index;
        for p in 0..self.pools.len() {
            match row.checked_sub(self.candidates(p).len()) {
                None => return (p, row),
                Some(rest) => row = rest,
            }
        }
        unreachable!("positives were checked against the number of candidates when the batch was built")
    }

    /// The id of candidate `candidate` of pool `pool`. Ids are those of the table for its rows; `None` where candidates
    /// have none.
    pub(crate) fn candidate_id(&self, pool: usize, candidate: usize) -> Option<u64> {
        match (&self.pools[pool].candidates, &self.table) {
            (Candidates::Rows(rows), Some(table)) => Some(table.id(rows.at(candidate))),
            (Candidates::WholeTable, Some(table)) => Some(table.id(candidate)),
            _ => self.pools[pool].ids_slice().map(|ids| ids[candidate]),
        }
    }

    /// Whether candidates have ids, by which masks tell them apart.
    pub(crate) fn has_ids(&self) -> bool {
        self.table.is_some() || self.pools.first().is_some_and(|pool| pool.ids.is_some())
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
        self.table.as_ref().map_or(Ok(()), Table::check)?;
        for (p, pool) in self.pools.iter().enumerate() {
            match (pool.candidates, &self.table) {
                (Candidates::Embeddings(embeddings), _) => embeddings.check(self.argument(p, "candidates"))?,
                (Candidates::Rows(_) | Candidates::WholeTable, None) => {
                    return Err(missing(
                        "table",
                        "Pool::rows and Pool::whole_table name its rows: use Batch::of_table",
                    ));
                }
                (Candidates::Rows(_) | Candidates::WholeTable, Some(_)) => {}
            }
        }
        match (&self.row_negatives, &self.table) {
            (Some(_), None) => Err(missing("table", "row_negatives are rows of it: use Batch::of_table")),
            _ => Ok(()),
        }
    }

    fn argument(&self, pool: usize, field: &'static str) -> Argument {
        Argument::OfPool { pool, pools: self.pools.len(), field }
    }

    pub(super) fn check_values(&self) -> Result<()> {
        for (p, pool) in self.pools.iter().enumerate() {
            if let (Candidates::Rows(rows), Some(table)) = (pool.candidates, &self.table) {
                check_rows_of_table(self.argument(p, "candidate_rows"), rows, table.shape.rows)?;
            }
            if let Some(log_q) = pool.log_q {
                check_all(self.argument(p, "log_q"), log_q, "finite", f32::is_finite)?;
            }
        }
        if let (Some(negatives), Some(table)) = (&self.row_negatives, &self.table) {
            negatives.check_values(table.shape.rows)?;
            if let Some(log_q) = negatives.log_q {
                check_all("row_negatives_log_q", log_q, "finite", f32::is_finite)?;
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
    fn table(&self) -> Option<(MatrixShape, Option<usize>)> {
        self.table.as_ref().map(|table| (table.shape, table.ids.as_ref().map(|ids| ids.0.len())))
    }
    fn num_pools(&self) -> usize {
        self.pools.len()
    }
    fn pool(&self, index: usize) -> PoolShape {
        let pool = &self.pools[index];
        let (candidates, of_table) = match (pool.candidates, &self.table) {
            (Candidates::Embeddings(embeddings), _) => (embeddings.shape(), false),
            (_, Some(table)) => (MatrixShape { rows: self.candidates(index).len(), ..table.shape }, true),
            (_, None) => unreachable!("pools of a table are checked to have one before their shapes"),
        };
        PoolShape {
            candidates,
            of_table,
            ids: pool.ids_slice().map(<[u64]>::len),
            log_q: pool.log_q.map(<[f32]>::len),
            gradient: pool.gradient,
        }
    }
    fn row_negatives(&self) -> Option<RowNegativesShape> {
        self.row_negatives.map(|negatives| negatives.shape())
    }
    fn excluded(&self) -> Option<[usize; 2]> {
        self.excluded.as_ref().map(|excluded| [excluded.offsets.len(), excluded.ids.0.len()])
    }
}
