//! Seeded generators of random problems over a table, and of several positives and filters.

use catalog_softmax::{Correction, DType, Loss, Reduction, RowNegatives, Similarity};
use proptest::prelude::*;
use rand::RngExt;
use rand::rngs::StdRng;

use super::generate::{rng, rows};
use super::lowering::Widened;
use super::problem::{PoolData, PoolRows, PositiveData, Problem, RowNegativesData, Storage, TableData};

/// What a pool holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolKind {
    /// That many rows of the table, with repeats.
    Rows(usize),
    WholeTable,
    /// That many candidates of its own beside the table, some of them the table's items.
    Own(usize),
}

/// Which positives rows have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositiveKind {
    /// Each row one row of the table.
    One,
    /// Each row none to four rows of the table, some of them twice.
    Several,
    /// Each row one embedding of its own.
    Separate,
    /// Each row none to four embeddings.
    SeveralSeparate,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FilterKind {
    None,
    /// Leaves out what scores better than the positive by some margin: the best few candidates.
    MarginAbove,
    /// Leaves out what scores worse than the positive, too, by up to some margin.
    MarginBelow,
    /// For cosine alone; other problems get a margin.
    Ratio,
}

/// Options of a random problem over a table.
#[derive(Debug, Clone, PartialEq)]
pub struct TableConfig {
    pub b: usize,
    /// M.
    pub rows: usize,
    pub dim: usize,
    pub dtype: DType,
    pub similarity: Similarity,
    pub temperature: f64,
    pub correction: Correction,
    pub reduction: Reduction,
    /// The whole table where there are none, and no negatives of rows' own.
    pub pools: Vec<PoolKind>,
    /// K; 0 for none.
    pub per_row: usize,
    pub positives: PositiveKind,
    pub positive_weight: bool,
    pub filter: FilterKind,
    pub excluded: bool,
    /// Ids of the table's items, some of which have the same.
    pub ids: bool,
    pub weights: bool,
    /// Bit p: pool p has no gradient.
    pub frozen: u32,
    pub frozen_table: bool,
    /// Every weight, and every product of weights, is exact in `f32`, and so is a mean over rows.
    pub exact_weights: bool,
    pub seed: u64,
}

impl TableConfig {
    /// A plain problem; change what matters.
    pub fn new(b: usize, rows: usize, dim: usize) -> TableConfig {
        TableConfig {
            b,
            rows,
            dim,
            dtype: DType::F32,
            similarity: Similarity::Cosine,
            temperature: 0.1,
            correction: Correction::None,
            reduction: Reduction::Mean,
            pools: Vec::new(),
            per_row: 0,
            positives: PositiveKind::One,
            positive_weight: false,
            filter: FilterKind::None,
            excluded: false,
            ids: false,
            weights: false,
            frozen: 0,
            frozen_table: false,
            exact_weights: false,
            seed: 1,
        }
    }

    pub fn problem(&self) -> Problem {
        let (mut rng, b, m, d) = (rng(self.seed), self.b, self.rows, self.dim);
        // Under `Dot`, scores of order 1: the temperature says how far apart they are.
        let size = if self.similarity == Similarity::Cosine { 1.0 } else { (d as f32).powf(-0.25) };
        let mut queries = rows(&mut rng, b, d, size);
        let mut table = rows(&mut rng, m, d, size);
        let offsets = self.offsets(&mut rng);
        let pairs = offsets.as_ref().map_or(b, |offsets| offsets[b] as usize);
        let positives = self.positive_rows(&mut rng, offsets.as_deref(), pairs);
        // A model that has learned something, and items that nothing tells apart.
        for (pair, &row) in positives.iter().enumerate() {
            let query = row_of(offsets.as_deref(), pair);
            let lean = rng.random_range(0.0..1.0f32);
            (0..d).for_each(|k| table[row as usize * d + k] += lean * queries[query * d + k]);
        }
        for row in 1..m {
            if rng.random_bool(0.05) {
                let from = rng.random_range(0..row);
                table.copy_within(from * d..(from + 1) * d, row * d);
            } else if rng.random_bool(0.02) {
                table[row * d..(row + 1) * d].fill(0.0);
            }
        }
        if b > 3 {
            queries[2 * d..3 * d].fill(0.0);
        }
        let ids = self.ids.then(|| ids(&mut rng, m));
        let id = |row: usize| ids.as_ref().map_or(row as u64, |ids| ids[row]);
        let pools = self.pools.iter().enumerate().map(|(p, &kind)| self.pool(&mut rng, p, kind, size, &id)).collect();
        let row_negatives = (self.per_row > 0).then(|| self.row_negatives(&mut rng));
        let separate = matches!(self.positives, PositiveKind::Separate | PositiveKind::SeveralSeparate);
        let mut embeddings = rows(&mut rng, pairs, d, size);
        for pair in 0..pairs {
            let query = row_of(offsets.as_deref(), pair);
            (0..d).for_each(|k| embeddings[pair * d + k] += 0.7 * queries[query * d + k]);
        }
        let excluded = self.excluded.then(|| excluded(&mut rng, b, |rng| id(zipf(rng, m))));
        let uses_positive = matches!(self.correction, Correction::LogQ | Correction::CorrectedLogQ);
        let loss =
            Loss::softmax(self.similarity, self.temperature).correction(self.correction).reduction(self.reduction);
        let mut problem = Problem {
            dim: d,
            queries: Storage::new(&queries, self.dtype),
            table: Some(TableData {
                embeddings: Storage::new(&table, self.dtype),
                ids: ids.clone(),
                gradient: !self.frozen_table,
            }),
            pools,
            row_negatives,
            positive_ids: separate.then(|| (0..pairs).map(|_| id(zipf(&mut rng, m))).collect()),
            positives: match separate {
                true => PositiveData::Separate(Storage::new(&embeddings, self.dtype)),
                false => PositiveData::Index(positives),
            },
            positive_weight: (self.positive_weight && offsets.is_some()).then(|| self.some_weights(&mut rng, pairs)),
            positive_offsets: offsets,
            positive_log_q: uses_positive.then(|| self.log_q(&mut rng, pairs)),
            excluded,
            row_weight: (self.weights || self.reduction == Reduction::WeightedMean).then(|| self.row_weights(&mut rng)),
            loss,
        };
        if self.pools.is_empty() && self.per_row == 0 {
            problem.pools = vec![self.pool(&mut rng, 0, PoolKind::WholeTable, size, &id)];
        }
        problem.loss = filtered(&problem, self.filter);
        problem
    }

    fn offsets(&self, rng: &mut StdRng) -> Option<Vec<i64>> {
        if matches!(self.positives, PositiveKind::One | PositiveKind::Separate) {
            return None;
        }
        let mut offsets = vec![0];
        for _ in 0..self.b {
            let count = [0, 1, 1, 2, 4, if self.exact_weights { 2 } else { 3 }][rng.random_range(0..6)];
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        if offsets[self.b] == 0 {
            // A batch has an embedding at least.
            offsets[self.b] = 1;
        }
        Some(offsets)
    }

    /// Some rows name an item twice.
    fn positive_rows(&self, rng: &mut StdRng, offsets: Option<&[i64]>, pairs: usize) -> Vec<u32> {
        let mut positives: Vec<u32> = (0..pairs).map(|_| zipf(rng, self.rows) as u32).collect();
        for pair in 1..pairs {
            if row_of(offsets, pair) == row_of(offsets, pair - 1) && rng.random_bool(0.1) {
                positives[pair] = positives[pair - 1];
            }
        }
        positives
    }

    fn pool(&self, rng: &mut StdRng, p: usize, kind: PoolKind, size: f32, id: &impl Fn(usize) -> u64) -> PoolData {
        let gradient = self.frozen.checked_shr(p as u32).unwrap_or(0) & 1 == 0;
        let nothing = Storage::F32(Vec::new());
        let (len, candidates, of_table, ids) = match kind {
            PoolKind::WholeTable => (self.rows, nothing, Some(PoolRows::All), None),
            PoolKind::Rows(len) => {
                let these = (0..len).map(|_| zipf(rng, self.rows) as u32).collect();
                (len, nothing, Some(PoolRows::These(these)), None)
            }
            PoolKind::Own(len) => {
                let embeddings = Storage::new(&rows(rng, len, self.dim, size), self.dtype);
                let item = |rng: &mut StdRng| if rng.random_bool(0.5) { id(zipf(rng, self.rows)) } else { 1 << 50 };
                (len, embeddings, None, Some((0..len).map(|_| item(rng)).collect()))
            }
        };
        let log_q = (self.correction != Correction::None).then(|| self.log_q(rng, len));
        PoolData { candidates, rows: of_table, ids, log_q, gradient }
    }

    fn row_negatives(&self, rng: &mut StdRng) -> RowNegativesData {
        let len = self.b * self.per_row;
        let mut rows: Vec<u32> = (0..len).map(|_| zipf(rng, self.rows) as u32).collect();
        rows.iter_mut().filter(|_| rng.random_bool(0.1)).for_each(|row| *row = RowNegatives::NONE);
        if self.b > 2 {
            // A row that has none.
            rows[self.per_row..2 * self.per_row].fill(RowNegatives::NONE);
        }
        let log_q = (self.correction != Correction::None).then(|| self.log_q(rng, len));
        RowNegativesData { rows, per_row: self.per_row, log_q }
    }

    fn log_q(&self, rng: &mut StdRng, len: usize) -> Vec<f32> {
        let range = if self.correction == Correction::CorrectedLogQ { -4.0..-0.01f32 } else { -2.0..2.0 };
        (0..len).map(|_| rng.random_range(range.clone())).collect()
    }

    fn some_weights(&self, rng: &mut StdRng, len: usize) -> Vec<f32> {
        let weight = |rng: &mut StdRng| match (rng.random_bool(0.2), self.exact_weights) {
            (true, _) => 0.0,
            (false, true) => rng.random_range(1..16u32) as f32 / 8.0,
            (false, false) => rng.random_range(0.1..3.0f32),
        };
        (0..len).map(|_| weight(rng)).collect()
    }

    fn row_weights(&self, rng: &mut StdRng) -> Vec<f32> {
        let mut weights = self.some_weights(rng, self.b);
        // A weighted mean needs one that is not 0; an exact one a sum that is a power of two.
        weights[self.b / 2] = 1.25;
        if self.exact_weights {
            weights[self.b / 2] = 0.0;
            let sum: f32 = weights.iter().sum();
            weights[self.b / 2] = (sum + 1.0).log2().ceil().exp2() - sum;
        }
        weights
    }
}

/// The loss with a filter whose bound no score is near: in the middle of a wide gap between scores that are about right.
/// Without one where there is no such gap.
pub fn filtered(problem: &Problem, filter: FilterKind) -> Loss {
    let share = match filter {
        FilterKind::None => return problem.loss,
        FilterKind::MarginAbove => 0.97..1.0,
        FilterKind::MarginBelow | FilterKind::Ratio => 0.75..0.95,
    };
    let ratio = filter == FilterKind::Ratio && problem.loss.similarity == Similarity::Cosine;
    let directions = [Some(problem.clone()), problem.loss.symmetric.then(|| problem.swapped())];
    // A row's scores, and the best of its positives'.
    let mut rows: Vec<(Vec<f64>, f64)> = Vec::new();
    for direction in directions.into_iter().flatten() {
        let widened = Widened::new(&direction);
        let of_row = |row: usize| widened.scores(row);
        let with_bound = (0..direction.num_queries()).map(of_row).filter_map(|(scores, best)| Some((scores, best?)));
        rows.extend(with_bound.filter(|(_, best)| !ratio || *best > 0.0));
    }
    let place = |score: f64, best: f64| if ratio { score / best } else { score - best };
    let places = rows.iter().flat_map(|(scores, best)| scores.iter().map(move |&score| place(score, *best)));
    let mut places: Vec<f64> = places.filter(|&place| !ratio || place > 0.0).collect();
    places.sort_by(f64::total_cmp);
    let at = |share: f64| (share * places.len().saturating_sub(1) as f64) as usize;
    let window = places.get(at(share.start)..=at(share.end)).unwrap_or_default();
    let mut gaps: Vec<&[f64]> = window.windows(2).collect();
    gaps.sort_by(|a, b| (b[1] - b[0]).total_cmp(&(a[1] - a[0])));
    let is_clear = |middle: f64| {
        rows.iter().all(|(scores, best)| {
            let bound = if ratio { best * middle } else { best + middle };
            let largest = scores.iter().fold(best.abs(), |max, score| max.max(score.abs()));
            let near = 2e-5 * (2.0 * largest + 1.0 / problem.loss.temperature);
            scores.iter().all(|score| (score - bound).abs() > near)
        })
    };
    let middles = gaps.iter().take(20).map(|gap| 0.5 * (gap[0] + gap[1]));
    match middles.into_iter().find(|&middle| is_clear(middle)) {
        Some(middle) if ratio => problem.loss.false_negative_ratio(middle),
        Some(middle) => problem.loss.false_negative_margin(middle),
        None => problem.loss,
    }
}

/// Few items are drawn often, most of them seldom.
pub fn zipf(rng: &mut StdRng, items: usize) -> usize {
    ((items as f64 + 1.0).powf(rng.random_range(0.0..1.0f64)) as usize - 1).min(items - 1)
}

fn row_of(offsets: Option<&[i64]>, pair: usize) -> usize {
    offsets.map_or(pair, |offsets| offsets.partition_point(|&offset| offset as usize <= pair) - 1)
}

/// Ids that are no rows; one in ten is another row's.
fn ids(rng: &mut StdRng, rows: usize) -> Vec<u64> {
    let id = |row: usize| (row as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..rows).map(|row| if rng.random_bool(0.1) { id(rng.random_range(0..rows)) } else { id(row) }).collect()
}

fn excluded(rng: &mut StdRng, b: usize, id: impl Fn(&mut StdRng) -> u64) -> (Vec<i64>, Vec<u64>) {
    let (mut offsets, mut all) = (vec![0], Vec::new());
    for _ in 0..b {
        all.extend((0..rng.random_range(0..5)).map(|_| id(rng)));
        offsets.push(all.len() as i64);
    }
    (offsets, all)
}

/// Any problem over a table with at most `b` queries, `rows` rows and candidates in each pool, and `dim` elements.
pub fn table_configs(b: usize, rows: usize, dim: usize) -> impl Strategy<Value = TableConfig> {
    let kind = prop_oneof![
        3 => (1..=rows).prop_map(PoolKind::Rows),
        1 => Just(PoolKind::WholeTable),
        2 => (1..=rows).prop_map(PoolKind::Own),
    ];
    let per_row = prop_oneof![1 => Just(0), 2 => 1..=rows / 2];
    let shapes = (1..=b, 1..=rows, 1..=dim, prop::collection::vec(kind, 0..=3), per_row);
    let dtype = prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]);
    let similarity = prop_oneof![
        (Just(Similarity::Cosine), prop::sample::select(vec![0.02, 0.07, 0.3, 1.0, 4.0])),
        (Just(Similarity::Dot), prop::sample::select(vec![0.1, 0.5, 1.0, 3.0])),
    ];
    let correction = prop::sample::select(CORRECTIONS.to_vec());
    let reduction = prop::sample::select(REDUCTIONS.to_vec());
    let positives = prop::sample::select(vec![
        PositiveKind::One,
        PositiveKind::Several,
        PositiveKind::Several,
        PositiveKind::Separate,
        PositiveKind::SeveralSeparate,
    ]);
    let filter = prop::sample::select(FILTERS.to_vec());
    let flags = (any::<[bool; 4]>(), 0u32..8, prop::bool::weighted(0.1));
    let rest = (correction, reduction, positives, filter, flags, any::<u64>());
    (shapes, dtype, similarity, rest).prop_map(|(shapes, dtype, (similarity, temperature), rest)| {
        let (b, rows, dim, pools, per_row) = shapes;
        let (correction, reduction, positives, filter, (flags, frozen, frozen_table), seed) = rest;
        let [positive_weight, excluded, ids, weights] = flags;
        TableConfig {
            b,
            rows,
            dim,
            dtype,
            similarity,
            temperature,
            correction,
            reduction,
            pools,
            per_row,
            positives,
            positive_weight,
            filter,
            excluded,
            ids,
            weights,
            frozen,
            frozen_table,
            exact_weights: false,
            seed,
        }
    })
}

pub const CORRECTIONS: [Correction; 4] =
    [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ];
pub const REDUCTIONS: [Reduction; 4] = [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean];
pub const FILTERS: [FilterKind; 4] =
    [FilterKind::None, FilterKind::MarginAbove, FilterKind::MarginBelow, FilterKind::Ratio];
