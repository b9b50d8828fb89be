//! Each row's positives: where their embeddings are, and which row has which of them.

use std::borrow::Cow;
use std::ops::Range;

use super::embeddings::Embeddings;

/// Where the positives are, after validation. There are P of them.
#[derive(Debug, Clone)]
pub(crate) enum Positives<'a> {
    /// Indices over the candidates of all pools.
    Index(Cow<'a, [u32]>),
    /// Embeddings (P, D) that are not among the candidates.
    Separate(Embeddings<'a>),
    /// Rows of the table.
    Rows(Cow<'a, [u32]>),
}

/// Which row has which positives. A pair is a row with one of its positives; pairs of a row follow each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pairs<'a> {
    /// (B + 1). `None` where row i has the positive i alone.
    pub(crate) offsets: Option<&'a [i64]>,
    /// (P), what each pair's loss is multiplied by. `None` where the pairs of a row share 1 equally.
    pub(crate) weight: Option<&'a [f32]>,
}

impl Pairs<'_> {
    /// One positive for each row.
    pub(crate) const ONE_EACH: Self = Pairs { offsets: None, weight: None };

    /// The pairs of a row.
    pub(crate) fn of_row(&self, row: usize) -> Range<usize> {
        self.offsets.map_or(row..row + 1, |offsets| offsets[row] as usize..offsets[row + 1] as usize)
    }

    /// The weight of one of the row's pairs.
    pub(crate) fn weight(&self, row: usize, pair: usize) -> f64 {
        self.weight.map_or_else(|| 1.0 / self.of_row(row).len() as f64, |weight| f64::from(weight[pair]))
    }

    /// The row of each pair, in the order of the pairs.
    pub(crate) fn rows(&self, num_queries: usize) -> impl Iterator<Item = u32> + '_ {
        (0..num_queries).flat_map(|row| self.of_row(row).map(move |_| row as u32))
    }
}
