//! The shape of a batch and of a search, and the rules about it. Host and device memory describe their shapes by the
//! same traits, so the same functions check both. Values are checked elsewhere.

use super::arrays::check_len;
use super::embeddings::DType;
use super::table::{RowNegatives, check_table_ids};
use crate::error::{Argument, Result, does_not_apply, missing, shape, value};

/// A matrix of embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MatrixShape {
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) dtype: DType,
}

/// A pool: its candidates, and the lengths of the arrays that it has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolShape {
    pub(crate) candidates: MatrixShape,
    /// Whether the candidates are rows of the table.
    pub(crate) of_table: bool,
    pub(crate) ids: Option<usize>,
    pub(crate) log_q: Option<usize>,
    pub(crate) gradient: bool,
}

/// Negatives of each row's own: the lengths of their arrays, and K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowNegativesShape {
    pub(crate) rows: usize,
    pub(crate) per_row: usize,
    pub(crate) log_q: Option<usize>,
}

/// Positives: a number of indices of candidates, separate embeddings, or a number of rows of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PositivesShape {
    Index(usize),
    Separate(MatrixShape),
    Rows(usize),
}

impl PositivesShape {
    /// P, the number of pairs of a query and a positive.
    pub(crate) fn len(&self) -> usize {
        match self {
            PositivesShape::Index(len) | PositivesShape::Rows(len) => *len,
            PositivesShape::Separate(embeddings) => embeddings.rows,
        }
    }
}

/// Queries, table, pools, negatives of a row's own, and exclusions.
pub(crate) trait ScoreMatrixShape {
    fn queries(&self) -> MatrixShape;
    /// The table's shape and the length of its ids.
    fn table(&self) -> Option<(MatrixShape, Option<usize>)> {
        None
    }
    fn num_pools(&self) -> usize;
    fn pool(&self, index: usize) -> PoolShape;
    fn row_negatives(&self) -> Option<RowNegativesShape> {
        None
    }
    /// Lengths of `exclude_offsets` and `exclude_ids`.
    fn excluded(&self) -> Option<[usize; 2]>;

    /// N, over all pools.
    fn num_candidates(&self) -> usize {
        all_pools(self).map(|pool| pool.candidates.rows).fold(0, usize::saturating_add)
    }
}

/// A score matrix with positives and weights; lengths of the arrays that there are.
pub(crate) trait BatchShape {
    type Matrix: ScoreMatrixShape;

    fn matrix(&self) -> &Self::Matrix;
    fn positives(&self) -> PositivesShape;
    fn positive_offsets(&self) -> Option<usize> {
        None
    }
    fn positive_weight(&self) -> Option<usize> {
        None
    }
    fn positive_ids(&self) -> Option<usize>;
    fn positive_log_q(&self) -> Option<usize>;
    fn row_weight(&self) -> Option<usize>;
}

fn all_pools<S: ScoreMatrixShape + ?Sized>(matrix: &S) -> impl Iterator<Item = PoolShape> + '_ {
    (0..matrix.num_pools()).map(|index| matrix.pool(index))
}

/// The positives of a batch that was given one kind of them.
pub(crate) fn given_positives<P>(positives: Option<P>, given_twice: bool) -> Result<P> {
    if given_twice {
        let rule = "a batch has one of: the diagonal of in_batch, positives, positive_embeddings";
        return Err(does_not_apply("a second kind of positives", rule));
    }
    positives.ok_or_else(|| missing("positives", "every row has one: positives (B) or positive_embeddings (B, D)"))
}

/// A length of B.
pub(crate) fn check_rows(argument: &'static str, found: usize, num_queries: usize) -> Result<()> {
    check_len(argument, found, num_queries, "the number of queries")
}

/// The rules about queries, pools and exclusions.
pub(crate) fn check_score_matrix(matrix: &impl ScoreMatrixShape) -> Result<()> {
    let (queries, pools) = (matrix.queries(), matrix.num_pools());
    if let Some((table, ids)) = matrix.table() {
        check_as_queries("table", table, queries)?;
        check_table_ids(ids, table.rows)?;
        if table.rows > MAX_TABLE_ROWS {
            return Err(shape("table", format!("{} rows", table.rows), "at most 2^31 - 1 rows"));
        }
    }
    for (p, pool) in all_pools(matrix).enumerate() {
        let argument = Argument::OfPool { pool: p, pools, field: "candidates" };
        if pool.candidates.rows == 0 {
            return Err(shape(argument, "0 rows", "at least 1 row"));
        }
        check_as_queries(argument, pool.candidates, queries)?;
    }
    let (b, n) = (queries.rows, matrix.num_candidates());
    if b > u32::MAX as usize || n > u32::MAX as usize {
        return Err(shape("batch", format!("{b} queries and {n} candidates"), "at most 2^32 - 1 of each"));
    }
    check_candidate_ids(matrix)?;
    let own_log_q = matrix.row_negatives().and_then(|negatives| negatives.log_q).is_some();
    check_pool_arrays(matrix, "log_q", |pool| pool.log_q, own_log_q, ALL_OR_NO_LOG_Q)?;
    if let Some(negatives) = matrix.row_negatives() {
        check_row_negatives(negatives, b)?;
        if pools > 0 && matrix.pool(0).log_q.is_some() && !own_log_q {
            return Err(missing("row_negatives_log_q", ALL_OR_NO_LOG_Q));
        }
    }
    if let Some([offsets, _]) = matrix.excluded() {
        check_ids_to_compare(matrix)?;
        check_len("exclude_offsets", offsets, b + 1, "one more than there are queries")?;
    }
    Ok(())
}

const ALL_OR_NO_LOG_Q: &str = "either all pools and row_negatives have log_q or none of them";

/// The largest M: kernels and sorts hold a table's row in 31 bits.
const MAX_TABLE_ROWS: usize = (1 << 31) - 1;

/// The largest P, and the largest B * K.
const MAX_PAIRS: usize = (1 << 31) - 1;

/// Candidates that are rows of the table have its ids. Beside them, other pools must say which items they hold.
fn check_candidate_ids(matrix: &impl ScoreMatrixShape) -> Result<()> {
    for (p, pool) in all_pools(matrix).enumerate().filter(|(_, pool)| pool.of_table) {
        if pool.ids.is_some() {
            let argument = Argument::OfPool { pool: p, pools: matrix.num_pools(), field: "candidate_ids" };
            return Err(does_not_apply(argument, "candidates that are rows of the table have its ids: Table::ids"));
        }
    }
    let rule = match matrix.table() {
        Some(_) => "a pool of its own embeddings needs the ids of its items beside a table",
        None => "either all pools have ids or none of them",
    };
    let needed = matrix.table().is_some();
    check_pool_arrays(
        matrix,
        "candidate_ids",
        |pool| if pool.of_table { Some(pool.candidates.rows) } else { pool.ids },
        needed,
        rule,
    )
}

fn check_row_negatives(negatives: RowNegativesShape, num_queries: usize) -> Result<()> {
    let RowNegativesShape { rows, per_row, log_q } = negatives;
    if per_row == 0 || per_row > RowNegatives::MAX_PER_ROW {
        return Err(value("row_negatives.per_row", per_row, "at least 1 and at most 4096"));
    }
    let expected = num_queries.saturating_mul(per_row);
    if expected > MAX_PAIRS {
        return Err(shape("row_negatives", format!("shape ({num_queries}, {per_row})"), "at most 2^31 - 1 elements"));
    }
    check_len("row_negatives", rows, expected, "K for each query")?;
    log_q.map_or(Ok(()), |len| check_len("row_negatives_log_q", len, expected, "K for each query"))
}

fn check_as_queries(argument: impl Into<Argument>, found: MatrixShape, queries: MatrixShape) -> Result<()> {
    let argument = argument.into();
    if found.dim != queries.dim {
        let rule = format!("the dim of queries, which is {}", queries.dim);
        return Err(shape(argument, format!("dim {}", found.dim), rule));
    }
    if found.dtype != queries.dtype {
        let rule = format!("the element type of queries, which is {:?}", queries.dtype);
        return Err(shape(argument, format!("elements of type {:?}", found.dtype), rule));
    }
    Ok(())
}

/// Checks an array that either all pools have or none, with one element for each candidate. All must have it where it is
/// `needed`.
fn check_pool_arrays(
    matrix: &impl ScoreMatrixShape,
    field: &'static str,
    length: impl Fn(&PoolShape) -> Option<usize>,
    needed: bool,
    all_or_none: &'static str,
) -> Result<()> {
    if !needed && all_pools(matrix).all(|pool| length(&pool).is_none()) {
        return Ok(());
    }
    for (p, pool) in all_pools(matrix).enumerate() {
        let argument = Argument::OfPool { pool: p, pools: matrix.num_pools(), field };
        let Some(found) = length(&pool) else { return Err(missing(argument, all_or_none)) };
        check_len(argument, found, pool.candidates.rows, "the number of candidates in the pool")?;
    }
    Ok(())
}

fn has_ids(matrix: &impl ScoreMatrixShape) -> bool {
    matrix.table().is_some() || matrix.num_pools() > 0 && matrix.pool(0).ids.is_some()
}

fn check_ids_to_compare(matrix: &impl ScoreMatrixShape) -> Result<()> {
    match has_ids(matrix) {
        true => Ok(()),
        false => Err(missing("candidate_ids", "positive_ids and excluded_ids are compared with them")),
    }
}

/// The rules about a batch, its score matrix included.
pub(crate) fn check_batch(batch: &impl BatchShape) -> Result<()> {
    let matrix = batch.matrix();
    check_score_matrix(matrix)?;
    let (b, positives) = (matrix.queries().rows, batch.positives());
    let (argument, pairs) = match positives {
        PositivesShape::Separate(embeddings) => {
            check_as_queries("positive_embeddings", embeddings, matrix.queries())?;
            ("positive_embeddings", embeddings.rows)
        }
        PositivesShape::Index(len) | PositivesShape::Rows(len) => ("positives", len),
    };
    match batch.positive_offsets() {
        None => check_rows(argument, pairs, b)?,
        Some(offsets) => check_len("positive_offsets", offsets, b + 1, "one more than there are queries")?,
    }
    if pairs > MAX_PAIRS {
        return Err(shape(argument, format!("length {pairs}"), "at most 2^31 - 1 positives"));
    }
    check_positive_arrays(batch, pairs)?;
    batch.row_weight().map_or(Ok(()), |len| check_rows("row_weight", len, b))
}

/// The arrays that have one element for each positive.
fn check_positive_arrays(batch: &impl BatchShape, pairs: usize) -> Result<()> {
    let (matrix, positives) = (batch.matrix(), batch.positives());
    const PAIRS: &str = "the number of positives";
    if let Some(ids) = batch.positive_ids() {
        check_ids_to_compare(matrix)?;
        match positives {
            PositivesShape::Index(_) => return Err(does_not_apply("positive_ids", OF_CANDIDATES)),
            PositivesShape::Rows(_) => return Err(does_not_apply("positive_ids", "rows of a table have its ids")),
            PositivesShape::Separate(_) => check_len("positive_ids", ids, pairs, PAIRS)?,
        }
    }
    if let Some(log_q) = batch.positive_log_q() {
        if let PositivesShape::Index(_) = positives {
            return Err(does_not_apply("positive_log_q", OF_CANDIDATES));
        }
        check_len("positive_log_q", log_q, pairs, PAIRS)?;
    }
    if let (PositivesShape::Separate(_), true, None) = (positives, has_ids(matrix), batch.positive_ids()) {
        return Err(missing("positive_ids", "separate positives need ids where candidates have them"));
    }
    match (batch.positive_weight(), batch.positive_offsets()) {
        (Some(_), None) => Err(does_not_apply("positive_weight", "a row's one positive has weight 1: use row_weight")),
        (Some(len), Some(_)) => check_len("positive_weight", len, pairs, PAIRS),
        (None, _) => Ok(()),
    }
}

const OF_CANDIDATES: &str = "positives given by index have the ids and log_q of their candidates";

/// Checks what a symmetric loss needs of a valid batch. Code that sees the indices also checks that no candidate is the
/// positive of two queries.
pub(crate) fn check_symmetric(batch: &impl BatchShape) -> Result<()> {
    let matrix = batch.matrix();
    if let PositivesShape::Separate(_) = batch.positives() {
        return Err(does_not_apply("positive_embeddings", SYMMETRIC));
    }
    if batch.positive_offsets().is_some() {
        return Err(does_not_apply("positive_offsets", SYMMETRIC));
    }
    if matrix.table().is_some() {
        return Err(does_not_apply("table", SYMMETRIC));
    }
    if matrix.num_pools() != 1 {
        return Err(shape("candidates", format!("{} pools", matrix.num_pools()), SYMMETRIC));
    }
    if !matrix.pool(0).gradient {
        return Err(does_not_apply("candidates.without_gradient", "a symmetric loss has a gradient for both sides"));
    }
    let (b, n) = (matrix.queries().rows, matrix.num_candidates());
    if b != n {
        return Err(shape("candidates", format!("{n} rows for {b} queries"), SYMMETRIC));
    }
    if matrix.excluded().is_some() {
        let rule = "they name candidates; in a symmetric loss queries are candidates";
        return Err(does_not_apply("excluded_ids", rule));
    }
    Ok(())
}

/// The rule that symmetric losses have for positives.
pub(crate) const SYMMETRIC: &str =
    "a symmetric loss needs one pool in which each candidate is the positive of one query";
