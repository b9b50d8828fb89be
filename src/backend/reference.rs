//! The specification, executable: float64, plain loops, one formula after the other.
//!
//! It shares with the fast backends only the input and output types and the epilogue, which is float64 everywhere. The
//! fast backends are tested against it.

use crate::backend::Backend;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::Result;
use crate::problem::batch::Batch;
use crate::problem::embeddings::{Embeddings, Matrix};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{Gradients, TableGradient};
use crate::problem::plan::Plan;
use crate::problem::pool::Pool;
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::search::TopK;
use crate::problem::statistics::{Moments, Rank, Request, RowStatistics};

/// The float64 reference that every other backend is tested against. Slow, and exact to about 1e-13.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl Reference {
    /// The reference needs no state.
    pub fn new() -> Self {
        Reference
    }
}

impl Backend for Reference {}

/// A negative of a row.
#[derive(Debug, Clone, Copy)]
struct Negative {
    at: At,
    /// The score `s`.
    s: f64,
    /// `z = s − log_q`.
    z: f64,
}

/// Where a negative's embedding is, and where its gradient goes.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Row of a pool of embeddings.
    Pool(usize, usize),
    /// Row of the table, and whether this use of it has a gradient.
    Table(usize, bool),
}

/// `pairs` is P, or B in a search, which has no positives.
fn plan(matrix: &ScoreMatrix<'_>, pairs: usize, symmetric: bool, accumulate: bool) -> Plan {
    let (b, n, dim) = (matrix.num_queries(), matrix.num_candidates(), matrix.dim());
    let own = matrix.row_negatives.map_or(0, |negatives| negatives.per_row);
    let table = matrix.table.as_ref().map_or(0, |table| table.shape.rows);
    let widened = (b + pairs + n + table) * (dim + 1) * size_of::<f64>();
    // The table's gradient before and after the chain rule, and its rows that are named; what names them, in a list that
    // doubles.
    let of_table =
        if table > 0 { 2 * table * dim * size_of::<f64>() + 4 * (n + b * own + pairs) * size_of::<u32>() } else { 0 };
    let one_row = (n + own) * size_of::<Negative>();
    // Statistics that were not asked for are computed all the same; the epilogue has a derivative for each row and pair.
    let per_row = b * (dim + 6) * size_of::<f64>() + 3 * pairs * size_of::<f64>();
    // A symmetric loss holds the other direction's indices, weights and output while it computes that direction.
    let other = if symmetric { 2 * b * 8 + (4 * b * dim + 9 * b) * size_of::<f64>() } else { 0 };
    // Gradients that are added to the caller's are there beside them.
    let added = if accumulate { widened } else { 0 };
    // Gradients by unit vectors, which the chain rule then turns into those of the embeddings.
    let workspace_bytes = 2 * widened + of_table + one_row + per_row + other + added;
    Plan { block_b: 1, block_n: n, splits: 1, workspace_bytes }
}

/// One side of the dot product: x̂ = x / |x| under cosine, x itself under dot.
struct Side {
    unit: Vec<f64>,
    /// 1 / |x| under cosine (0 for a row too short), 1 under dot.
    inverse_norm: Vec<f64>,
    dim: usize,
}

impl Side {
    fn new(embeddings: &Embeddings<'_>, similarity: Similarity) -> Side {
        let (rows, dim) = (embeddings.rows(), embeddings.dim());
        let mut side = Side { unit: vec![0.0; rows * dim], inverse_norm: vec![1.0; rows], dim };
        for row in 0..rows {
            let x = &mut side.unit[row * dim..(row + 1) * dim];
            embeddings.widen_row(row, x);
            if similarity == Similarity::Cosine {
                let norm = dot(x, x).sqrt();
                let inverse = if norm < Similarity::MIN_NORM { 0.0 } else { 1.0 / norm };
                x.iter_mut().for_each(|v| *v *= inverse);
                side.inverse_norm[row] = inverse;
            }
        }
        side
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.unit[row * self.dim..(row + 1) * self.dim]
    }

    /// dx from dx̂: `(dx̂ − x̂ (x̂·dx̂)) / |x|` under cosine.
    fn chain_rule(&self, row: usize, similarity: Similarity, d_unit: &[f64], d: &mut [f64]) {
        if similarity == Similarity::Dot {
            return d.copy_from_slice(d_unit);
        }
        let along = dot(self.row(row), d_unit);
        for ((d, d_unit), unit) in d.iter_mut().zip(d_unit).zip(self.row(row)) {
            *d = (d_unit - unit * along) * self.inverse_norm[row];
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A score matrix in float64.
struct Scores<'a> {
    matrix: &'a ScoreMatrix<'a>,
    /// Of a batch; a search has no positives.
    batch: Option<&'a Batch<'a>>,
    scale: f64,
    queries: Side,
    /// `None` for pools that name rows of the table.
    pools: Vec<Option<Side>>,
    table: Option<Side>,
}

impl<'a> Scores<'a> {
    fn new(matrix: &'a ScoreMatrix<'a>, batch: Option<&'a Batch<'a>>, similarity: Similarity, scale: f64) -> Self {
        let side = |embeddings: Embeddings<'_>| Side::new(&embeddings, similarity);
        Scores {
            matrix,
            batch,
            scale,
            queries: side(matrix.queries),
            pools: matrix.pools.iter().map(|pool| pool.candidates().map(side)).collect(),
            table: matrix.table.as_ref().and_then(|table| table.embeddings).map(side),
        }
    }

    /// ĉ of a negative.
    fn embedding(&self, at: At) -> &[f64] {
        let (side, row) = match at {
            At::Pool(pool, row) => (&self.pools[pool], row),
            At::Table(row, _) => (&self.table, row),
        };
        side.as_ref().expect("a pool without a matrix names rows of the table").row(row)
    }

    /// Whether candidate `candidate`, of that id, is a negative of the row: in a search, whether it may be returned.
    /// Negatives of a row's own have no index among the candidates.
    fn is_negative(&self, row: usize, candidate: Option<usize>, id: Option<u64>) -> bool {
        let excluded =
            self.matrix.excluded.as_ref().is_some_and(|excluded| id.is_some_and(|id| excluded.row(row).contains(&id)));
        let positive = self.batch.is_some_and(|batch| {
            batch.pairs.of_row(row).any(|pair| {
                let by_id = batch.positive_ids.as_ref().is_some_and(|ids| id == Some(ids[pair]));
                let by_index = match &batch.positives {
                    Positives::Index(positives) => candidate == Some(positives[pair] as usize),
                    Positives::Separate(_) | Positives::Rows(_) => false,
                };
                by_id || by_index
            })
        });
        !positive && !excluded
    }

    /// Calls `visit` for each negative of a row, in order: the pools', then the row's own. Those that score above `bound`
    /// are left out; a NaN is not above it.
    fn for_each_negative(&self, row: usize, bound: f64, mut visit: impl FnMut(usize, Negative)) {
        let mut score = |index: usize, at: At, log_q: Option<f32>| {
            let s = self.scale * dot(self.queries.row(row), self.embedding(at));
            let filtered = s > bound;
            if !filtered {
                visit(index, Negative { at, s, z: s - log_q.map_or(0.0, f64::from) });
            }
        };
        for (p, (start, pool)) in self.matrix.pools_with_start().enumerate() {
            let candidates = self.matrix.candidates(p);
            for j in 0..candidates.len() {
                if self.is_negative(row, Some(start + j), self.matrix.candidate_id(p, j)) {
                    let at = match self.pools[p] {
                        Some(_) => At::Pool(p, j),
                        None => At::Table(candidates.row(j), pool.gradient),
                    };
                    score(start + j, at, pool.log_q.map(|log_q| log_q[j]));
                }
            }
        }
        let (Some(negatives), Some(table)) = (&self.matrix.row_negatives, &self.matrix.table) else { return };
        for k in 0..negatives.per_row {
            let Some(at) = negatives.at(row, k) else { continue };
            if self.is_negative(row, None, Some(table.id(at))) {
                let log_q = negatives.log_q.map(|log_q| log_q[row * negatives.per_row + k]);
                score(self.matrix.num_candidates() + k, At::Table(at, true), log_q);
            }
        }
    }
}

/// A batch in float64.
struct WidenedBatch<'a> {
    batch: &'a Batch<'a>,
    loss: &'a Loss,
    scores: Scores<'a>,
    positive_embeddings: Option<Side>,
}

impl<'a> WidenedBatch<'a> {
    fn new(batch: &'a Batch<'a>, loss: &'a Loss) -> Self {
        WidenedBatch {
            batch,
            loss,
            scores: Scores::new(&batch.matrix, Some(batch), loss.similarity, loss.scale()),
            positive_embeddings: match &batch.positives {
                Positives::Separate(embeddings) => Some(Side::new(embeddings, loss.similarity)),
                Positives::Index(_) | Positives::Rows(_) => None,
            },
        }
    }

    /// Where a positive is among candidates and rows; `None` for a separate one.
    fn positive_at(&self, pair: usize) -> Option<At> {
        match &self.batch.positives {
            Positives::Index(positives) => {
                let (pool, at) = self.batch.matrix.locate(positives[pair] as usize);
                Some(At::Pool(pool, at))
            }
            Positives::Rows(rows) => Some(At::Table(rows[pair] as usize, true)),
            Positives::Separate(_) => None,
        }
    }

    /// p̂ of a pair.
    fn positive(&self, pair: usize) -> &[f64] {
        match (self.positive_at(pair), &self.positive_embeddings) {
            (Some(at), _) => self.scores.embedding(at),
            (None, Some(side)) => side.row(pair),
            (None, None) => unreachable!("made together in new"),
        }
    }

    /// γ q̂·p̂
    fn positive_score(&self, row: usize, pair: usize) -> f64 {
        self.scores.scale * dot(self.scores.queries.row(row), self.positive(pair))
    }

    /// The score above which the row's candidates are no negatives.
    fn bound(&self, row: usize) -> f64 {
        let scores = self.batch.pairs.of_row(row).map(|pair| self.positive_score(row, pair));
        self.loss.false_negatives.map_or(f64::INFINITY, |filter| filter.bound(scores))
    }
}

impl Stream for Reference {
    type Real = f64;

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, request: Request) -> Plan {
        plan(&batch.matrix, batch.num_positives(), loss.symmetric, request.accumulate)
    }

    fn stream(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &mut RowStatistics<f64>,
    ) -> Result<()> {
        let problem = WidenedBatch::new(batch, loss);
        let scores = &problem.scores;
        let (b, dim) = (batch.num_queries(), batch.dim());
        let mut expected_negative = Matrix { values: vec![0.0; b * dim], rows: b, dim };
        let numbers = || Vec::with_capacity(b);
        let mut moments = Moments { expected_score: numbers(), entropy: numbers() };
        let counts = || Vec::with_capacity(batch.num_positives());
        let mut rank = Rank { above: counts(), ties: counts() };
        statistics.clear(request, b, batch.num_positives());
        let own = batch.matrix.row_negatives.map_or(0, |negatives| negatives.per_row);
        let mut negatives: Vec<Negative> = Vec::with_capacity(batch.num_candidates() + own);
        for row in 0..b {
            negatives.clear();
            scores.for_each_negative(row, problem.bound(row), |_, negative| negatives.push(negative));
            let max = negatives.iter().fold(f64::NEG_INFINITY, |max, negative| max.max(negative.z));
            // An infinite maximum is no shift: −∞ with nothing to sum, and what is not finite shall show.
            let shift = if max.is_finite() { max } else { 0.0 };
            let sum: f64 = negatives.iter().map(|negative| (negative.z - shift).exp()).sum();
            let lse = if negatives.is_empty() { f64::NEG_INFINITY } else { shift + sum.ln() };
            let (mut expected_score, mut entropy) = (0.0, 0.0);
            let o = &mut expected_negative.values[row * dim..(row + 1) * dim];
            for &Negative { at, s, z } in &negatives {
                let q = (z - lse).exp();
                for (o, c) in o.iter_mut().zip(scores.embedding(at)) {
                    *o += q * c;
                }
                expected_score += q * s;
                entropy += q * (lse - z);
            }
            statistics.lse.push(lse);
            statistics.num_negatives.push(negatives.len() as u64);
            moments.expected_score.push(expected_score);
            moments.entropy.push(entropy);
            for pair in batch.pairs.of_row(row) {
                let positive = problem.positive_score(row, pair);
                statistics.positive.push(positive);
                rank.above.push(negatives.iter().filter(|negative| negative.s > positive).count() as u64);
                rank.ties.push(negatives.iter().filter(|negative| negative.s == positive).count() as u64);
            }
        }
        statistics.moments = request.moments.then_some(moments);
        statistics.rank = request.rank.then_some(rank);
        statistics.expected_negative = request.gradients.then_some(expected_negative);
        Ok(())
    }

    fn stream_back(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &RowStatistics<f64>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<f64>,
    ) -> Result<()> {
        let problem = WidenedBatch::new(batch, loss);
        let Some(o) = &statistics.expected_negative else { return Ok(()) };
        let scores = &problem.scores;
        let (b, dim, gamma) = (batch.num_queries(), batch.dim(), loss.scale());
        let mut d_queries = vec![0.0; b * dim];
        let mut d_units = UnitGradients::zeros(&problem);
        let mut d_gamma = 0.0;
        for row in 0..b {
            let q = scores.queries.row(row);
            let d_q = &mut d_queries[row * dim..(row + 1) * dim];
            // ∂L/∂q̂ = γ (d_lse O + Σ_p d_positive p̂)
            add(d_q, gamma * d_lse[row], o.row(row));
            // ∂L/∂ĉ_j = γ Σ_i d_lse q_ij q̂_i
            scores.for_each_negative(row, problem.bound(row), |_, Negative { at, z, .. }| {
                let coefficient = times(gamma * d_lse[row], (z - statistics.lse[row]).exp());
                d_units.add(at, coefficient, q);
            });
            // ∂L/∂γ = Σ d_lse q̂·O + Σ_p d_positive sim₊
            d_gamma += times(d_lse[row], dot(q, o.row(row)));
            for pair in batch.pairs.of_row(row) {
                let p = problem.positive(pair);
                add(d_q, gamma * d_positive[pair], p);
                d_gamma += times(d_positive[pair], dot(q, p));
                // ∂L/∂p̂ = γ d_positive q̂, to the candidate or row that is the positive, or to the separate one.
                match problem.positive_at(pair) {
                    Some(at) => d_units.add(at, gamma * d_positive[pair], q),
                    None => add(&mut d_units.positives[pair * dim..(pair + 1) * dim], gamma * d_positive[pair], q),
                }
            }
        }
        let fresh = Gradients {
            d_queries: chain_rule_all(&scores.queries, loss.similarity, &d_queries),
            // ∂L/∂τ = −γ² ∂L/∂γ
            d_temperature: -gamma * gamma * d_gamma,
            d_log_temperature: -gamma * d_gamma,
            ..d_units.gradients(&problem, request)
        };
        if request.accumulate {
            gradients.add(&fresh);
        } else {
            *gradients = fresh;
        }
        Ok(())
    }

    fn plan_search(&self, checked: CheckedSearch<'_>) -> Plan {
        let matrix = &checked.search.matrix;
        plan(matrix, matrix.num_queries(), false, false)
    }

    fn search(&mut self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Result<TopK<f64>> {
        // Scores at temperature 1 are similarities; a search has no positives, so its negatives are what is not excluded.
        let scores = Scores::new(&search.matrix, None, similarity, 1.0);
        let mut top = TopK::empty(search.num_queries(), k);
        let mut scored = Vec::with_capacity(search.num_candidates());
        for row in 0..search.num_queries() {
            scored.clear();
            scores.for_each_negative(row, f64::INFINITY, |index, negative| scored.push((negative.s, index as u32)));
            // In float64 only a row that is not finite itself has such a score.
            scored.retain(|(s, _)| s.is_finite());
            scored.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("finite").then(a.1.cmp(&b.1)));
            for (place, &(score, index)) in scored.iter().take(k).enumerate() {
                top.indices[row * k + place] = index;
                top.scores[row * k + place] = score;
            }
        }
        Ok(top)
    }
}

/// Gradients by unit vectors, in float64, before the chain rule turns them into those of the embeddings.
struct UnitGradients {
    /// Empty for pools without a matrix of their own.
    pools: Vec<Vec<f64>>,
    positives: Vec<f64>,
    table: Vec<f64>,
    dim: usize,
}

impl UnitGradients {
    fn zeros(problem: &WidenedBatch<'_>) -> Self {
        let zeros = |side: &Option<Side>| side.as_ref().map_or(Vec::new(), |side| vec![0.0; side.unit.len()]);
        UnitGradients {
            pools: problem.scores.pools.iter().map(zeros).collect(),
            positives: zeros(&problem.positive_embeddings),
            table: zeros(&problem.scores.table),
            dim: problem.batch.dim(),
        }
    }

    fn add(&mut self, at: At, coefficient: f64, q: &[f64]) {
        let (to, row) = match at {
            At::Pool(pool, row) => (&mut self.pools[pool], row),
            At::Table(row, true) => (&mut self.table, row),
            At::Table(_, false) => return,
        };
        add(&mut to[row * self.dim..(row + 1) * self.dim], coefficient, q);
    }

    fn gradients(&self, problem: &WidenedBatch<'_>, request: Request) -> Gradients<f64> {
        let (batch, scores) = (problem.batch, &problem.scores);
        let chain_rule = |side: &Side, d_unit: &[f64]| chain_rule_all(side, problem.loss.similarity, d_unit);
        let of_pool = |(pool, (side, d)): (&Pool<'_>, (&Option<Side>, &Vec<f64>))| match side {
            Some(side) if pool.gradient => chain_rule(side, d),
            _ => Matrix::default(),
        };
        let with_gradient = batch.matrix.table.as_ref().is_some_and(|table| table.gradient);
        let d_table = scores.table.as_ref().filter(|_| with_gradient).map(|side| chain_rule(side, &self.table));
        let named = if with_gradient { batch.rows_with_gradient() } else { Vec::new() };
        Gradients {
            d_candidates: batch.matrix.pools.iter().zip(scores.pools.iter().zip(&self.pools)).map(of_pool).collect(),
            d_positive_embeddings: problem.positive_embeddings.as_ref().map(|side| chain_rule(side, &self.positives)),
            // The chain rule of a row that nobody names is not computed: it would spread a NaN that nobody reads.
            d_table: d_table.map(|d| match request.row_sparse {
                true => TableGradient::RowSparse(d.rows_of(&named)),
                false => TableGradient::Dense(d.rows_of(&named).dense(d.rows)),
            }),
            ..Gradients::default()
        }
    }
}

fn chain_rule_all(side: &Side, similarity: Similarity, d_unit: &[f64]) -> Matrix<f64> {
    let (rows, dim) = (side.inverse_norm.len(), side.dim);
    let mut d = Matrix { values: vec![0.0; rows * dim], rows, dim };
    for row in 0..rows {
        let range = row * dim..(row + 1) * dim;
        side.chain_rule(row, similarity, &d_unit[range.clone()], &mut d.values[range]);
    }
    d
}

/// `d · x`, and 0 where d is 0: a row without weight is absent, whatever its values.
fn times(d: f64, x: f64) -> f64 {
    if d == 0.0 { 0.0 } else { d * x }
}

fn add(to: &mut [f64], coefficient: f64, x: &[f64]) {
    for (to, &x) in to.iter_mut().zip(x) {
        *to += times(coefficient, x);
    }
}
