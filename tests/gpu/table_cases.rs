//! Problems over a table, with several positives, negatives of rows' own and filters, for the tests of tables.

use catalog_softmax::{Batch, BatchBuilder, Correction, DType, Loss, Pool, Reduction, RowNegatives, Similarity, Table};
use catalog_softmax_testing::problem::Storage;
use catalog_softmax_testing::tolerance::epsilon;

use Similarity::{Cosine, Dot};

/// Numbers that look random and are the same everywhere.
pub struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    /// In [−1, 1).
    fn real(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn rows(&mut self, rows: usize, dim: usize, dtype: DType) -> Storage {
        Storage::new(&(0..rows * dim).map(|_| self.real()).collect::<Vec<_>>(), dtype)
    }

    fn indices(&mut self, count: usize, limit: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(limit) as u32).collect()
    }

    fn log_q(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| -3.0 + self.real()).collect()
    }
}

/// What the candidates are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Candidates {
    /// Pools: by reference, of its own embeddings, the whole table.
    Pools { rows: bool, own: bool, whole: bool },
    /// Embeddings without a table; positives are candidates.
    Embeddings,
    /// The same, and positives are embeddings of their own.
    Separate,
}

pub const ROWS: Candidates = Candidates::Pools { rows: true, own: false, whole: false };
pub const WHOLE: Candidates = Candidates::Pools { rows: false, own: false, whole: true };
pub const NO_POOL: Candidates = Candidates::Pools { rows: false, own: false, whole: false };
pub const ALL: Candidates = Candidates::Pools { rows: true, own: true, whole: true };

#[derive(Debug, Clone, Copy)]
pub enum Filter {
    None,
    Margin(f64),
    Ratio(f64),
}

#[derive(Debug, Clone)]
pub struct Case {
    pub dtype: DType,
    pub similarity: Similarity,
    pub sizes: (usize, usize, usize, usize),
    pub candidates: Candidates,
    /// K of the rows' own negatives.
    pub own: usize,
    pub several: bool,
    pub log_q: bool,
    pub ids: bool,
    pub filter: Filter,
    pub gradient: bool,
}

impl Case {
    pub fn new(candidates: Candidates) -> Self {
        // Queries, candidates of a pool, rows of the table, elements.
        let (dtype, similarity, sizes) = (DType::F32, Cosine, (37, 150, 90, 24));
        let (own, several, log_q, ids, filter, gradient) = (0, false, false, false, Filter::None, true);
        Case { dtype, similarity, sizes, candidates, own, several, log_q, ids, filter, gradient }
    }

    pub fn has_table(&self) -> bool {
        matches!(self.candidates, Candidates::Pools { .. })
    }

    pub fn loss(&self) -> Loss {
        let loss = Loss::softmax(self.similarity, if self.similarity == Dot { 2.0 } else { 0.2 });
        let loss = loss.reduction(Reduction::WeightedMean);
        let loss = if self.log_q { loss.correction(Correction::LogQ) } else { loss };
        match self.filter {
            Filter::None => loss,
            Filter::Margin(margin) => loss.false_negative_margin(margin),
            Filter::Ratio(ratio) => loss.false_negative_ratio(ratio),
        }
    }

    pub fn data(&self) -> Data {
        let (b, n, m, dim) = self.sizes;
        let mut numbers = Numbers(7 * b as u64 + n as u64);
        let (queries, table) = (numbers.rows(b, dim, self.dtype), numbers.rows(m, dim, self.dtype));
        let own_pool = numbers.rows(n, dim, self.dtype);
        let own_ids: Vec<u64> = (0..n).map(|_| 1000 + numbers.below(m) as u64).collect();
        let table_ids: Vec<u64> = (0..m as u64).map(|row| if self.ids { 1000 + row / 2 } else { row }).collect();
        // Row 0 has none, row 1 two that are the same, the others some.
        let count = |row: usize| if row < 2 { 2 * row } else { row % 4 };
        let mut offsets = vec![0i64];
        (0..b).for_each(|row| offsets.push(offsets[row] + count(row) as i64));
        let pairs = if self.several { offsets[b] as usize } else { b };
        let mut positives = numbers.indices(pairs, if self.has_table() { m } else { n });
        positives[1] = positives[0];
        let separate = numbers.rows(pairs, dim, self.dtype);
        let separate_ids: Vec<u64> = (0..pairs).map(|_| 1000 + numbers.below(m) as u64).collect();
        let pair_weight = numbers.log_q(pairs).iter().map(|x| -x).collect();
        let positive_log_q = numbers.log_q(pairs);
        let candidate_rows = numbers.indices(n, m);
        let mut own = numbers.indices(b * self.own, m);
        own.iter_mut().step_by(5).for_each(|row| *row = RowNegatives::NONE);
        let (log_q, whole_log_q, own_log_q) = (numbers.log_q(n), numbers.log_q(m), numbers.log_q(b * self.own));
        let row_weight = (0..b).map(|row| (row % 3) as f32).collect();
        let excluded = (0..2 * b).map(|_| table_ids[numbers.below(m)]).collect();
        let exclude_offsets = (0..=b as i64).map(|row| 2 * row).collect();
        Data {
            case: self.clone(),
            queries,
            table,
            own_pool,
            own_ids,
            table_ids,
            offsets,
            positives,
            separate,
            separate_ids,
            pair_weight,
            positive_log_q,
            candidate_rows,
            own,
            log_q,
            whole_log_q,
            own_log_q,
            row_weight,
            excluded,
            exclude_offsets,
        }
    }

    /// How far from the reference a result may be, in units of the largest number of its row: rounding of the operands that the tensor
    /// cores take, times the size of a score's terms.
    pub fn tolerance(&self) -> f64 {
        let dim = self.sizes.3 as f64;
        let condition = if self.similarity == Dot { 1.0 + dim / 6.0 } else { 6.0 };
        16.0 * epsilon(self.dtype) * condition
    }
}

/// Uses of one row that `finish_table.cu` adds up apart.
pub const SEGMENT: usize = 64;

/// Few rows with many uses each, so that several warps add up a row's: candidates by reference, negatives of rows' own, positives. Rows
/// have 8, 16 and 32 lanes, and panels of 256 elements (`lanes.cuh`).
pub fn popular_rows() -> [Case; 5] {
    let uses = 4 * SEGMENT;
    let several = |candidates| Case { several: true, ..Case::new(candidates) };
    [
        Case { sizes: (uses, 10, 7, 25), own: 9, log_q: true, dtype: DType::F16, ..several(NO_POOL) },
        Case { sizes: (20, 4 * uses, 4, 100), ..Case::new(ROWS) },
        // Wider than a warp holds.
        Case { sizes: (9, 10, 3, 300), own: uses / 2, log_q: true, ..Case::new(NO_POOL) },
        // Candidates with many pairs, without a table.
        Case { sizes: (2 * uses, 3, 1, 200), similarity: Dot, ..several(Candidates::Embeddings) },
        Case { sizes: (uses / 2, uses, 5, 72), own: 4, ids: true, dtype: DType::Bf16, ..several(ALL) },
    ]
}

/// A case's arrays.
pub struct Data {
    pub case: Case,
    pub queries: Storage,
    pub table: Storage,
    pub own_pool: Storage,
    pub own_ids: Vec<u64>,
    pub table_ids: Vec<u64>,
    pub offsets: Vec<i64>,
    pub positives: Vec<u32>,
    pub separate: Storage,
    pub separate_ids: Vec<u64>,
    pub pair_weight: Vec<f32>,
    pub positive_log_q: Vec<f32>,
    pub candidate_rows: Vec<u32>,
    pub own: Vec<u32>,
    pub log_q: Vec<f32>,
    pub whole_log_q: Vec<f32>,
    pub own_log_q: Vec<f32>,
    pub row_weight: Vec<f32>,
    pub excluded: Vec<u64>,
    pub exclude_offsets: Vec<i64>,
}

impl Data {
    pub fn batch(&self) -> Batch<'_> {
        let (case, dim) = (&self.case, self.case.sizes.3);
        fn with<'a>(case: &Case, pool: Pool<'a>, log_q: &'a [f32]) -> Pool<'a> {
            if case.log_q { pool.log_q(log_q) } else { pool }
        }
        let queries = self.queries.view(dim);
        let own_pool = || with(case, Pool::new(self.own_pool.view(dim)).ids(&self.own_ids), &self.log_q);
        fn with_log_q<'a>(data: &'a Data, builder: BatchBuilder<'a>) -> BatchBuilder<'a> {
            if data.case.log_q { builder.positive_log_q(&data.positive_log_q) } else { builder }
        }
        let mut builder = match case.candidates {
            Candidates::Pools { rows, own, whole } => {
                let table = Table::new(self.table.view(dim));
                let table = if case.ids { table.ids(&self.table_ids) } else { table };
                let table = if case.gradient { table } else { table.without_gradient() };
                let mut builder = Batch::of_table(queries, table).positives(&self.positives);
                if rows {
                    builder = builder.pool(with(case, Pool::rows(&self.candidate_rows), &self.log_q));
                }
                if own {
                    builder = builder.pool(own_pool());
                }
                if whole {
                    builder = builder.pool(with(case, Pool::whole_table(), &self.whole_log_q));
                }
                if rows && whole {
                    builder = builder.pool(with(case, Pool::rows(&self.positives), &self.positive_log_q));
                }
                with_log_q(self, builder)
            }
            Candidates::Embeddings => Batch::builder(queries, own_pool()).positives(&self.positives),
            Candidates::Separate => {
                let builder = Batch::builder(queries, own_pool()).positive_embeddings(self.separate.view(dim));
                with_log_q(self, builder.positive_ids(&self.separate_ids))
            }
        };
        if case.own > 0 {
            let negatives = RowNegatives::new(&self.own, case.own);
            builder = builder.row_negatives(if case.log_q { negatives.log_q(&self.own_log_q) } else { negatives });
        }
        if case.several {
            builder = builder.positive_offsets(&self.offsets);
            if case.log_q {
                builder = builder.positive_weight(&self.pair_weight);
            }
        }
        let builder = builder.row_weight(&self.row_weight).excluded_ids(&self.exclude_offsets, &self.excluded);
        builder.build().expect("a valid batch")
    }
}

impl Case {
    pub fn without_own_unless_table(self) -> Self {
        Case { own: if self.has_table() { self.own } else { 0 }, ..self }
    }
}

pub fn assert_near(name: &str, case: &Case, found: &[f64], wanted: &[f64], width: usize) {
    assert_eq!(found.len(), wanted.len(), "{name} of {case:?}");
    let largest = wanted.iter().filter(|x| x.is_finite()).fold(0.0f64, |max, x| max.max(x.abs()));
    let rows = found.chunks(width).zip(wanted.chunks(width)).enumerate();
    for (row, (found, wanted)) in rows {
        let scale = wanted.iter().filter(|x| x.is_finite()).fold(0.01 * largest, |max, x| max.max(x.abs()));
        for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let near = (found - wanted).abs() <= case.tolerance() * scale;
            assert!(near || found == wanted, "{name}[{row}, {i}] is {found}, not {wanted}: {case:?}");
        }
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}
