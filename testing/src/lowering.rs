//! Problems with a table, several positives or a filter as ordinary ones, by copies: each row of such a problem is an
//! ordinary problem of its own. Its query stands there once for each of the row's positives, which are separate
//! embeddings, against a pool of exactly the row's negatives. What a mask or the filter leaves out is decided here, in
//! float64, and shares nothing with the crate.
//!
//! Results of the rows are lifted back to what they are results of: pairs, candidates, rows of the table. So the honest
//! baseline, the scales and the formulas of ordinary problems hold for all others, too.

use std::collections::BTreeMap;
use std::ops::Range;

use catalog_softmax::{Correction, FalseNegativeFilter, Reduction, RowNegatives};

use super::formulas::{Sides, dot, sides, weights};
use super::problem::{PoolData, PoolRows, PositiveData, Problem, Storage};
use super::scales::Scale;

/// What an embedding is a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Table(usize),
    Pool(usize, usize),
    Separate(usize),
}

/// A candidate of a row, before masks.
struct Candidate {
    /// The place among all of the row's.
    at: usize,
    source: Source,
    id: Option<u64>,
    log_q: Option<f32>,
    gradient: bool,
}

/// One row as an ordinary problem.
pub struct Lowered {
    pub row: usize,
    /// The row's pairs; its problem has a query for each, or one of weight 0 where there are none.
    pub pairs: Range<usize>,
    pub problem: Problem,
    /// What each candidate is a copy of, and whether that has a gradient from it. Empty where the row has no negatives:
    /// the one candidate that its problem has then is excluded.
    pub negatives: Vec<(Source, bool)>,
    positives: Vec<Source>,
    /// What multiplies each pair's loss in the row's.
    pair_weights: Vec<f64>,
}

impl Lowered {
    /// The row's loss, of the pairs'.
    pub fn loss(&self, of_pairs: &[f64]) -> f64 {
        let weighted = self.pair_weights.iter().zip(of_pairs).filter(|(weight, _)| **weight != 0.0);
        weighted.map(|(weight, loss)| weight * loss).sum()
    }
}

/// The embeddings of a problem in float64.
pub struct Widened<'a> {
    problem: &'a Problem,
    queries: Side,
    table: Side,
    pools: Vec<Side>,
    separate: Side,
}

/// Embeddings as they are, and of unit length.
struct Side {
    raw: Vec<f32>,
    unit: Sides,
    dim: usize,
}

impl Side {
    fn row(&self, row: usize) -> Range<usize> {
        row * self.dim..(row + 1) * self.dim
    }
}

impl<'a> Widened<'a> {
    pub fn new(problem: &'a Problem) -> Widened<'a> {
        let dim = problem.dim;
        let side = |storage: &Storage| {
            let raw = storage.to_f32();
            Side { unit: sides(&raw, dim, problem.loss.similarity), raw, dim }
        };
        let nothing = Storage::F32(Vec::new());
        Widened {
            problem,
            queries: side(&problem.queries),
            table: side(problem.table.as_ref().map_or(&nothing, |table| &table.embeddings)),
            pools: problem.pools.iter().map(|pool| side(&pool.candidates)).collect(),
            separate: match &problem.positives {
                PositiveData::Separate(embeddings) => side(embeddings),
                PositiveData::Index(_) => side(&nothing),
            },
        }
    }

    fn at(&self, source: Source) -> (&Side, usize) {
        match source {
            Source::Table(row) => (&self.table, row),
            Source::Pool(pool, row) => (&self.pools[pool], row),
            Source::Separate(pair) => (&self.separate, pair),
        }
    }

    fn raw(&self, source: Source) -> &[f32] {
        let (side, row) = self.at(source);
        &side.raw[side.row(row)]
    }

    /// The raw score.
    pub fn score(&self, row: usize, source: Source) -> f64 {
        let (side, at) = self.at(source);
        let query = &self.queries.unit.values[self.queries.row(row)];
        dot(query, &side.unit.values[side.row(at)]) / self.problem.loss.temperature
    }

    /// What a pair's positive is, and its id.
    pub fn positive(&self, pair: usize) -> (Source, Option<u64>) {
        let problem = self.problem;
        match (&problem.positives, &problem.table) {
            (PositiveData::Separate(_), _) => {
                (Source::Separate(pair), problem.positive_ids.as_ref().map(|ids| ids[pair]))
            }
            (PositiveData::Index(rows), Some(table)) => {
                let row = rows[pair] as usize;
                (Source::Table(row), Some(table.id(row)))
            }
            (PositiveData::Index(index), None) => {
                let mut at = index[pair] as usize;
                let mut pool = 0;
                while at >= problem.pool_len(&problem.pools[pool]) {
                    at -= problem.pool_len(&problem.pools[pool]);
                    pool += 1;
                }
                (Source::Pool(pool, at), problem.pools[pool].ids.as_ref().map(|ids| ids[at]))
            }
        }
    }

    /// All that a row meets: candidates of the pools, and negatives of its own.
    fn candidates(&self, row: usize) -> Vec<Candidate> {
        let problem = self.problem;
        let table_id = |row: usize| problem.table.as_ref().map(|table| table.id(row));
        let mut all = Vec::new();
        for (p, pool) in problem.pools.iter().enumerate() {
            for j in 0..problem.pool_len(pool) {
                let (source, id) = match &pool.rows {
                    None => (Source::Pool(p, j), pool.ids.as_ref().map(|ids| ids[j])),
                    Some(PoolRows::All) => (Source::Table(j), table_id(j)),
                    Some(PoolRows::These(rows)) => (Source::Table(rows[j] as usize), table_id(rows[j] as usize)),
                };
                let log_q = pool.log_q.as_ref().map(|log_q| log_q[j]);
                all.push(Candidate { at: all.len(), source, id, log_q, gradient: pool.gradient });
            }
        }
        if let Some(own) = &problem.row_negatives {
            for place in (row * own.per_row..(row + 1) * own.per_row).filter(|&at| own.rows[at] != RowNegatives::NONE) {
                let item = own.rows[place] as usize;
                let (source, log_q) = (Source::Table(item), own.log_q.as_ref().map(|log_q| log_q[place]));
                all.push(Candidate { at: all.len(), source, id: table_id(item), log_q, gradient: true });
            }
        }
        all
    }

    /// The candidates of a row that masks leave.
    fn unmasked(&self, row: usize) -> Vec<Candidate> {
        let positives: Vec<_> = self.problem.pairs(row).map(|pair| self.positive(pair)).collect();
        let excluded = self.problem.excluded.as_ref();
        let excluded =
            excluded.map_or(&[][..], |(offsets, ids)| &ids[offsets[row] as usize..offsets[row + 1] as usize]);
        let mut all = self.candidates(row);
        all.retain(|candidate| {
            let is_positive = |&(source, id): &(Source, Option<u64>)| match (candidate.id, id) {
                (Some(of_candidate), Some(of_positive)) => of_candidate == of_positive,
                _ => candidate.source == source,
            };
            !positives.iter().any(is_positive) && !candidate.id.is_some_and(|id| excluded.contains(&id))
        });
        all
    }

    /// What the candidates of a row that masks leave are, of pools and its own.
    pub fn unmasked_sources(&self, row: usize) -> Vec<Source> {
        self.unmasked(row).iter().map(|candidate| candidate.source).collect()
    }

    /// The places among a row's candidates that masks leave.
    pub fn unmasked_indices(&self, row: usize) -> Vec<usize> {
        self.unmasked(row).iter().map(|candidate| candidate.at).collect()
    }

    /// The best score of a row's positives.
    fn best_positive(&self, row: usize) -> Option<f64> {
        let scores = self.problem.pairs(row).map(|pair| self.score(row, self.positive(pair).0));
        scores.filter(|score| !score.is_nan()).fold(None, |best: Option<f64>, s| Some(best.map_or(s, |b| b.max(s))))
    }

    /// The raw scores of a row's candidates that masks leave, and the best of its positives'.
    pub fn scores(&self, row: usize) -> (Vec<f64>, Option<f64>) {
        let scores = self.unmasked(row).iter().map(|candidate| self.score(row, candidate.source)).collect();
        (scores, self.best_positive(row))
    }

    fn negatives(&self, row: usize) -> Vec<Candidate> {
        let bound = match (self.problem.loss.false_negatives, self.best_positive(row)) {
            (Some(FalseNegativeFilter::Margin(margin)), Some(best)) => best + margin,
            (Some(FalseNegativeFilter::Ratio(ratio)), Some(best)) if best > 0.0 => best * ratio,
            _ => f64::INFINITY,
        };
        let mut all = self.unmasked(row);
        all.retain(|candidate| {
            let left_out = self.score(row, candidate.source) > bound;
            !left_out
        });
        all
    }
}

/// Each row as an ordinary problem.
pub fn lower(problem: &Problem) -> Vec<Lowered> {
    assert!(!problem.loss.symmetric, "a symmetric loss has no table and one positive for each row");
    let widened = Widened::new(problem);
    let row_weights = weights(problem);
    (0..problem.num_queries()).map(|row| lower_row(&widened, row, row_weights[row])).collect()
}

fn lower_row(widened: &Widened<'_>, row: usize, row_weight: f64) -> Lowered {
    let (problem, pairs) = (widened.problem, widened.problem.pairs(row));
    let negatives = widened.negatives(row);
    let corrected = problem.loss.correction != Correction::None;
    let mut pool = PoolData {
        candidates: Storage::F32(negatives.iter().flat_map(|c| widened.raw(c.source)).copied().collect()),
        rows: None,
        ids: None,
        log_q: corrected.then(|| negatives.iter().map(|c| c.log_q.expect("a correction has log_q")).collect()),
        gradient: true,
    };
    let copies = pairs.len().max(1);
    let nobody = negatives.is_empty();
    if nobody {
        pool.candidates = Storage::F32(vec![0.0; problem.dim]);
        pool.ids = Some(vec![0]);
        pool.log_q = corrected.then(|| vec![0.0]);
    }
    let positives: Vec<Source> = pairs.clone().map(|pair| widened.positive(pair).0).collect();
    let mut embeddings: Vec<f32> = positives.iter().flat_map(|&source| widened.raw(source)).copied().collect();
    let mut positive_log_q: Vec<f32> =
        pairs.clone().map(|pair| positive_log_q(problem, pair, positives[pair - pairs.start])).collect();
    let pair_weights: Vec<f64> = match &problem.positive_weight {
        Some(weight) => pairs.clone().map(|pair| weight[pair].into()).collect(),
        None => vec![1.0 / pairs.len() as f64; pairs.len()],
    };
    let mut row_weights: Vec<f32> = pair_weights.iter().map(|weight| (row_weight * weight) as f32).collect();
    if pairs.is_empty() {
        embeddings = vec![0.0; problem.dim];
        positive_log_q = vec![-1.0];
        row_weights = vec![0.0];
    }
    let mut loss = problem.loss.reduction(Reduction::Sum);
    loss.false_negatives = None;
    let uses_positive = matches!(problem.loss.correction, Correction::LogQ | Correction::CorrectedLogQ);
    let lowered = Problem {
        dim: problem.dim,
        queries: Storage::F32(widened.queries.raw[widened.queries.row(row)].repeat(copies)),
        table: None,
        pools: vec![pool],
        row_negatives: None,
        positives: PositiveData::Separate(Storage::F32(embeddings)),
        positive_offsets: None,
        positive_weight: None,
        positive_ids: nobody.then(|| vec![1; copies]),
        positive_log_q: uses_positive.then_some(positive_log_q),
        excluded: nobody.then(|| ((0..=copies as i64).collect(), vec![0; copies])),
        row_weight: Some(row_weights),
        loss,
    };
    let negatives = negatives.iter().map(|candidate| (candidate.source, candidate.gradient)).collect();
    Lowered { row, pairs, problem: lowered, negatives, positives, pair_weights }
}

fn positive_log_q(problem: &Problem, pair: usize, source: Source) -> f32 {
    match source {
        Source::Pool(pool, at) => problem.pools[pool].log_q.as_ref().map_or(0.0, |log_q| log_q[at]),
        Source::Table(_) | Source::Separate(_) => problem.positive_log_q.as_ref().map_or(0.0, |log_q| log_q[pair]),
    }
}

/// What results are lifted of: numbers, or the scales of their rows.
pub trait Summand: Copy + Default {
    fn add(&mut self, other: Self);
    fn times(self, factor: f64) -> Self;
}

impl Summand for f64 {
    fn add(&mut self, other: f64) {
        *self += other;
    }
    fn times(self, factor: f64) -> f64 {
        factor * self
    }
}

/// As a training loop adds gradients of copies to those of a table.
impl Summand for f32 {
    fn add(&mut self, other: f32) {
        *self += other;
    }
    fn times(self, factor: f64) -> f32 {
        factor as f32 * self
    }
}

impl Summand for Scale {
    fn add(&mut self, other: Scale) {
        Scale::add(self, other);
    }
    fn times(self, factor: f64) -> Scale {
        Scale::times(self, factor)
    }
}

/// Results of the rows of a problem as results of the problem, by name.
pub struct Lift<'a, T> {
    problem: &'a Problem,
    /// Elements of an embedding's result.
    width: usize,
    pub results: BTreeMap<String, Vec<T>>,
}

impl<'a, T: Summand> Lift<'a, T> {
    pub fn new(problem: &'a Problem, width: usize) -> Self {
        Lift { problem, width, results: BTreeMap::new() }
    }

    /// Elements of one row of a result.
    pub fn width_of(&self, name: &str) -> usize {
        let vectors = ["expected_negative", "d_queries", "d_positive_embeddings", "d_table"];
        if vectors.contains(&name) || name.starts_with("d_candidates[") { self.width } else { 1 }
    }

    fn rows_of(&self, name: &str) -> usize {
        let problem = self.problem;
        match name {
            "total" | "d_temperature" | "d_log_temperature" => 1,
            "positive" | "probability" | "d_positive_embeddings" => problem.num_pairs(),
            "d_table" => problem.table_rows(),
            _ => problem.num_queries(),
        }
    }

    /// All results of a problem are there, though no row may have any.
    pub fn reserve(&mut self, name: &str) {
        let len = self.rows_of(name) * self.width_of(name);
        self.results.entry(name.to_string()).or_insert_with(|| vec![T::default(); len]);
    }

    /// The gradients of a pool.
    pub fn reserve_pool(&mut self, pool: usize) {
        let data = &self.problem.pools[pool];
        let rows = if data.rows.is_none() && data.gradient { self.problem.pool_len(data) } else { 0 };
        self.results.insert(format!("d_candidates[{pool}]"), vec![T::default(); rows * self.width]);
    }

    /// Adds one result of one row.
    pub fn add(&mut self, lowered: &Lowered, name: &str, values: &[T]) {
        let width = self.width_of(name);
        let rows = || values.chunks(width);
        match name {
            "total" | "d_temperature" | "d_log_temperature" => self.add_to(name, 0, values),
            "d_queries" => rows().for_each(|row| self.add_to(name, lowered.row, row)),
            "positive" | "probability" => {
                lowered.pairs.clone().zip(rows()).for_each(|(pair, row)| self.add_to(name, pair, row));
            }
            "loss" => {
                self.reserve(name);
                for (&loss, &weight) in values.iter().zip(&lowered.pair_weights).filter(|(_, weight)| **weight != 0.0) {
                    self.add_to(name, lowered.row, &[loss.times(weight)]);
                }
            }
            "d_positive_embeddings" => {
                lowered.positives.iter().zip(rows()).for_each(|(&source, row)| self.add_gradient(source, row));
            }
            "d_candidates[0]" => {
                let with_gradient = lowered.negatives.iter().zip(rows()).filter(|((_, gradient), _)| *gradient);
                with_gradient.for_each(|(&(source, _), row)| self.add_gradient(source, row));
            }
            // A row's statistics are those of each of its copies.
            _ => self.add_to(name, lowered.row, &values[..width]),
        }
    }

    fn add_gradient(&mut self, source: Source, values: &[T]) {
        match source {
            Source::Table(row) => self.add_to("d_table", row, values),
            Source::Separate(pair) => self.add_to("d_positive_embeddings", pair, values),
            Source::Pool(pool, at) if self.problem.pools[pool].gradient => {
                self.add_to(&format!("d_candidates[{pool}]"), at, values);
            }
            Source::Pool(..) => {}
        }
    }

    fn add_to(&mut self, name: &str, row: usize, values: &[T]) {
        if !self.results.contains_key(name) {
            self.reserve(name);
        }
        let Some(result) = self.results.get_mut(name) else { return };
        result[row * values.len()..][..values.len()].iter_mut().zip(values).for_each(|(to, &from)| to.add(from));
    }
}
