//! The specification, executable: float64, plain loops, one formula after the other.
//!
//! It shares with the fast backends only the input and output types and the epilogue, which is float64 everywhere. The
//! fast backends are tested against it.

use crate::backend::Backend;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::Result;
use crate::problem::batch::{Batch, Positives};
use crate::problem::embeddings::{Embeddings, Matrix};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::Gradients;
use crate::problem::plan::Plan;
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

/// A negative of a row: its pool, its place there, s and z.
type Negative = (usize, usize, f64, f64);

fn plan(matrix: &ScoreMatrix<'_>, symmetric: bool) -> Plan {
    let (b, n, dim) = (matrix.num_queries(), matrix.num_candidates(), matrix.dim());
    let widened = (2 * b + n) * (dim + 1) * size_of::<f64>();
    let one_row = n * size_of::<Negative>();
    // Statistics that were not asked for are computed all the same; the epilogue has two derivatives for each row.
    let per_row = b * (dim + 6) * size_of::<f64>();
    // A symmetric loss holds the other direction's indices, weights and output while it computes that direction.
    let other = if symmetric { 2 * b * 8 + (4 * b * dim + 9 * b) * size_of::<f64>() } else { 0 };
    // Gradients by unit vectors, which the chain rule then turns into those of the embeddings.
    Plan { block_b: 1, block_n: n, splits: 1, workspace_bytes: 2 * widened + one_row + per_row + other }
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
        let along = match similarity {
            Similarity::Cosine => dot(self.row(row), d_unit),
            Similarity::Dot => 0.0,
        };
        for ((d, d_unit), unit) in d.iter_mut().zip(d_unit).zip(self.row(row)) {
            *d = (d_unit - unit * along) * self.inverse_norm[row];
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A score matrix in float64, its pools one after the other.
struct Scores<'a> {
    matrix: &'a ScoreMatrix<'a>,
    /// Of a batch; a search has no positives.
    batch: Option<&'a Batch<'a>>,
    scale: f64,
    queries: Side,
    pools: Vec<Side>,
}

impl<'a> Scores<'a> {
    fn new(matrix: &'a ScoreMatrix<'a>, batch: Option<&'a Batch<'a>>, similarity: Similarity, scale: f64) -> Self {
        let side = |embeddings: &Embeddings<'_>| Side::new(embeddings, similarity);
        let (queries, pools) =
            (side(&matrix.queries), matrix.pools.iter().map(|pool| side(&pool.candidates)).collect());
        Scores { matrix, batch, scale, queries, pools }
    }

    /// Whether candidate `candidate`, of that id, is a negative of the row: in a search, whether it may be returned.
    fn is_negative(&self, row: usize, candidate: usize, id: Option<u64>) -> bool {
        let excluded = self.matrix.excluded.as_ref();
        let hit = id.is_some_and(|id| {
            let positive_ids = self.batch.and_then(|batch| batch.positive_ids.as_ref());
            positive_ids.is_some_and(|ids| ids[row] == id)
                || excluded.is_some_and(|excluded| excluded.row(row).contains(&id))
        });
        let positives = self.batch.map(|batch| &batch.positives);
        let is_positive =
            matches!(positives, Some(Positives::Index(positives)) if positives[row] as usize == candidate);
        !is_positive && !hit
    }

    /// Calls `visit(pool, row in the pool, s, z)` for each negative of a row, in order.
    fn for_each_negative(&self, row: usize, mut visit: impl FnMut(usize, usize, f64, f64)) {
        for (p, (start, pool)) in self.matrix.pools_with_start().enumerate() {
            for j in 0..pool.candidates.rows() {
                if self.is_negative(row, start + j, pool.ids_slice().map(|ids| ids[j])) {
                    let s = self.scale * dot(self.queries.row(row), self.pools[p].row(j));
                    let log_q = pool.log_q.map_or(0.0, |log_q| f64::from(log_q[j]));
                    visit(p, j, s, s - log_q);
                }
            }
        }
    }
}

/// A batch in float64.
struct WidenedBatch<'a> {
    batch: &'a Batch<'a>,
    scores: Scores<'a>,
    positive_embeddings: Option<Side>,
}

impl<'a> WidenedBatch<'a> {
    fn new(batch: &'a Batch<'a>, loss: &Loss) -> Self {
        WidenedBatch {
            batch,
            scores: Scores::new(&batch.matrix, Some(batch), loss.similarity, loss.scale()),
            positive_embeddings: match &batch.positives {
                Positives::Separate(embeddings) => Some(Side::new(embeddings, loss.similarity)),
                Positives::Index(_) => None,
            },
        }
    }

    /// p̂ of a row.
    fn positive(&self, row: usize) -> &[f64] {
        match (&self.batch.positives, &self.positive_embeddings) {
            (Positives::Index(positives), _) => {
                let (pool, at) = self.batch.locate(positives[row] as usize);
                self.scores.pools[pool].row(at)
            }
            (_, Some(side)) => side.row(row),
            (Positives::Separate(_), None) => unreachable!("made together in new"),
        }
    }

    /// γ q̂·p̂
    fn positive_score(&self, row: usize) -> f64 {
        self.scores.scale * dot(self.scores.queries.row(row), self.positive(row))
    }
}

impl Stream for Reference {
    type Real = f64;

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, _request: Request) -> Plan {
        plan(&batch.matrix, loss.symmetric)
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
        let mut rank = Rank { above: Vec::with_capacity(b), ties: Vec::with_capacity(b) };
        statistics.clear(request, batch.num_queries());
        let mut negatives: Vec<Negative> = Vec::with_capacity(batch.num_candidates());
        for row in 0..b {
            negatives.clear();
            scores.for_each_negative(row, |pool, j, s, z| negatives.push((pool, j, s, z)));
            let positive = problem.positive_score(row);
            let max = negatives.iter().fold(f64::NEG_INFINITY, |max, &(_, _, _, z)| max.max(z));
            // An infinite maximum is no shift: −∞ with nothing to sum, and what is not finite shall show.
            let shift = if max.is_finite() { max } else { 0.0 };
            let sum: f64 = negatives.iter().map(|&(_, _, _, z)| (z - shift).exp()).sum();
            let lse = if negatives.is_empty() { f64::NEG_INFINITY } else { shift + sum.ln() };
            let (mut expected_score, mut entropy) = (0.0, 0.0);
            let o = &mut expected_negative.values[row * dim..(row + 1) * dim];
            for &(pool, j, s, z) in &negatives {
                let q = (z - lse).exp();
                for (o, c) in o.iter_mut().zip(scores.pools[pool].row(j)) {
                    *o += q * c;
                }
                expected_score += q * s;
                entropy += q * (lse - z);
            }
            statistics.lse.push(lse);
            statistics.positive.push(positive);
            statistics.num_negatives.push(negatives.len() as u64);
            moments.expected_score.push(expected_score);
            moments.entropy.push(entropy);
            rank.above.push(negatives.iter().filter(|&&(_, _, s, _)| s > positive).count() as u64);
            rank.ties.push(negatives.iter().filter(|&&(_, _, s, _)| s == positive).count() as u64);
        }
        statistics.moments = request.moments.then_some(moments);
        statistics.rank = request.rank.then_some(rank);
        statistics.expected_negative = request.gradients.then_some(expected_negative);
        Ok(())
    }

    fn stream_back(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
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
        let mut d_pools: Vec<Vec<f64>> = scores.pools.iter().map(|pool| vec![0.0; pool.unit.len()]).collect();
        let mut d_positives = vec![0.0; b * dim];
        let mut d_gamma = 0.0;
        for row in 0..b {
            let q = scores.queries.row(row);
            let p = problem.positive(row);
            // ∂L/∂q̂ = γ (d_lse O + d_positive p̂)
            let d_q = &mut d_queries[row * dim..(row + 1) * dim];
            add(d_q, gamma * d_lse[row], o.row(row));
            add(d_q, gamma * d_positive[row], p);
            // ∂L/∂ĉ_j = γ Σ_i d_lse q_ij q̂_i
            scores.for_each_negative(row, |pool, j, _, z| {
                let coefficient = times(gamma * d_lse[row], (z - statistics.lse[row]).exp());
                add(&mut d_pools[pool][j * dim..(j + 1) * dim], coefficient, q);
            });
            // ∂L/∂p̂ = γ d_positive q̂, to the candidate that is the positive, or to the separate one.
            let d_p = match &batch.positives {
                Positives::Index(positives) => {
                    let (pool, j) = batch.locate(positives[row] as usize);
                    &mut d_pools[pool][j * dim..(j + 1) * dim]
                }
                Positives::Separate(_) => &mut d_positives[row * dim..(row + 1) * dim],
            };
            add(d_p, gamma * d_positive[row], q);
            // ∂L/∂γ = Σ d_lse q̂·O + d_positive sim₊
            d_gamma += times(d_lse[row], dot(q, o.row(row))) + times(d_positive[row], dot(q, p));
        }
        let chain_rule = |side: &Side, d_unit: &[f64]| chain_rule_all(side, loss.similarity, d_unit);
        gradients.d_queries = chain_rule(&scores.queries, &d_queries);
        gradients.d_candidates = (batch.matrix.pools.iter().zip(&scores.pools).zip(&d_pools))
            .map(|((pool, side), d)| if pool.gradient { chain_rule(side, d) } else { Matrix::default() })
            .collect();
        gradients.d_positive_embeddings =
            problem.positive_embeddings.as_ref().map(|side| chain_rule(side, &d_positives));
        // ∂L/∂τ = −γ² ∂L/∂γ
        gradients.d_temperature = -gamma * gamma * d_gamma;
        gradients.d_log_temperature = -gamma * d_gamma;
        Ok(())
    }

    fn plan_search(&self, checked: CheckedSearch<'_>) -> Plan {
        plan(&checked.search.matrix, false)
    }

    fn search(&mut self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Result<TopK<f64>> {
        // Scores at temperature 1 are similarities; a search has no positives, so its negatives are what is not excluded.
        let scores = Scores::new(&search.matrix, None, similarity, 1.0);
        let starts: Vec<usize> = search.matrix.pools_with_start().map(|(start, _)| start).collect();
        let mut top = TopK::empty(search.num_queries(), k);
        let mut scored = Vec::with_capacity(search.num_candidates());
        for row in 0..search.num_queries() {
            scored.clear();
            scores.for_each_negative(row, |pool, j, s, _| scored.push((s, (starts[pool] + j) as u32)));
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
