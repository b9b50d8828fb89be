//! The shape of a batch and of a search, and the rules about it. Host and device memory describe their shapes by the
//! same traits, so the same functions check both. Values are checked elsewhere.

use super::arrays::check_len;
use super::embeddings::DType;
use crate::error::{Argument, Result, does_not_apply, missing, shape};

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
    pub(crate) ids: Option<usize>,
    pub(crate) log_q: Option<usize>,
    pub(crate) gradient: bool,
}

/// Positives: a number of indices, or separate embeddings.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PositivesShape {
    Index(usize),
    Separate(MatrixShape),
}

/// Queries, pools and exclusions.
pub(crate) trait ScoreMatrixShape {
    fn queries(&self) -> MatrixShape;
    fn num_pools(&self) -> usize;
    fn pool(&self, index: usize) -> PoolShape;
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
    for (p, pool) in all_pools(matrix).enumerate() {
        check_as_queries(Argument::OfPool { pool: p, pools, field: "candidates" }, pool.candidates, queries)?;
    }
    let (b, n) = (queries.rows, matrix.num_candidates());
    if b > u32::MAX as usize || n > u32::MAX as usize {
        return Err(shape("batch", format!("{b} queries and {n} candidates"), "at most 2^32 - 1 of each"));
    }
    check_pool_arrays(matrix, "candidate_ids", |pool| pool.ids, "either all pools have ids or none of them")?;
    check_pool_arrays(matrix, "log_q", |pool| pool.log_q, "either all pools have log_q or none of them")?;
    if let Some([offsets, _]) = matrix.excluded() {
        check_ids_to_compare(matrix)?;
        check_len("exclude_offsets", offsets, b + 1, "one more than there are queries")?;
    }
    Ok(())
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

/// Checks an array that either all pools have or none, with one element for each candidate.
fn check_pool_arrays(
    matrix: &impl ScoreMatrixShape,
    field: &'static str,
    length: impl Fn(&PoolShape) -> Option<usize>,
    all_or_none: &'static str,
) -> Result<()> {
    if all_pools(matrix).all(|pool| length(&pool).is_none()) {
        return Ok(());
    }
    for (p, pool) in all_pools(matrix).enumerate() {
        let argument = Argument::OfPool { pool: p, pools: matrix.num_pools(), field };
        let Some(found) = length(&pool) else { return Err(missing(argument, all_or_none)) };
        check_len(argument, found, pool.candidates.rows, "the number of candidates in the pool")?;
    }
    Ok(())
}

fn check_ids_to_compare(matrix: &impl ScoreMatrixShape) -> Result<()> {
    match matrix.pool(0).ids {
        Some(_) => Ok(()),
        None => Err(missing("candidate_ids", "positive_ids and excluded_ids are compared with them")),
    }
}

/// The rules about a batch, its score matrix included.
pub(crate) fn check_batch(batch: &impl BatchShape) -> Result<()> {
    let matrix = batch.matrix();
    check_score_matrix(matrix)?;
    let (queries, pool) = (matrix.queries(), matrix.pool(0));
    match batch.positives() {
        PositivesShape::Index(len) => check_rows("positives", len, queries.rows)?,
        PositivesShape::Separate(embeddings) => {
            check_rows("positive_embeddings", embeddings.rows, queries.rows)?;
            check_as_queries("positive_embeddings", embeddings, queries)?;
        }
    }
    if batch.positive_ids().is_some() {
        check_ids_to_compare(matrix)?;
    }
    let given = [("positive_ids", batch.positive_ids()), ("positive_log_q", batch.positive_log_q())];
    for (argument, len) in given.into_iter().filter_map(|(argument, len)| Some((argument, len?))) {
        if let PositivesShape::Index(_) = batch.positives() {
            return Err(does_not_apply(
                argument,
                "positives given by index have the ids and log_q of their candidates",
            ));
        }
        check_rows(argument, len, queries.rows)?;
    }
    if let (PositivesShape::Separate(_), Some(_), None) = (batch.positives(), pool.ids, batch.positive_ids()) {
        return Err(missing("positive_ids", "separate positives need ids where candidates have them"));
    }
    batch.row_weight().map_or(Ok(()), |len| check_rows("row_weight", len, queries.rows))
}

/// Checks what a symmetric loss needs of a valid batch. Code that sees the indices also checks that no candidate is the
/// positive of two queries.
pub(crate) fn check_symmetric(batch: &impl BatchShape) -> Result<()> {
    let matrix = batch.matrix();
    if let PositivesShape::Separate(_) = batch.positives() {
        return Err(does_not_apply("positive_embeddings", SYMMETRIC));
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
