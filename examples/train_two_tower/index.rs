//! `--index`: the items behind an approximate index, as a service holds them, measured against the exact search.
//!
//! The index is HNSW (Malkov and Yashunin 2016) by the crate `hnsw_rs`: a graph of near neighbours in layers. A search
//! walks it greedily and keeps the EF_SEARCH best items that it met. The index holds the items' rows at unit length, so
//! that an inner product is the cosine that the model ranks by.
//!
//! A user is not recommended what the user took before. The graph knows nothing of users, so the search asks it for
//! K plus as many items as the user's row excludes, drops the excluded ones and keeps the first K of the rest. No more
//! than those can be excluded, so a list is never short of items for that reason.
//!
//! Items are inserted one after the other: the graph, and so every list, is the same in every run.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use catalog_softmax::{Backend, Embeddings, Similarity};
use hnsw_rs::anndists::dist::Distance;
use hnsw_rs::prelude::{AnnT, Hnsw};
use rayon::prelude::*;

use crate::Fallible;
use crate::evaluate::{self, BLOCK, TOP};
use crate::model::{Activations, Model, dot};
use crate::parameter::Parameter;
use crate::split::Split;

/// Layers that the graph may have; the crate's own limit. The highest that is used grows as log N / log M.
const LAYERS: usize = 16;

/// The settings of an HNSW index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HnswOptions {
    /// Neighbours that an item keeps in each layer; twice as many in the lowest.
    pub m: usize,
    /// How many of the best items a search keeps while the graph is built.
    pub ef_construction: usize,
    /// The same for a query's search. A search for more items than that keeps as many as it is asked for.
    pub ef_search: usize,
}

const FORM: &str = "hnsw[:M[:EF_CONSTRUCTION[:EF_SEARCH]]]";

impl Default for HnswOptions {
    fn default() -> Self {
        HnswOptions { m: 16, ef_construction: 128, ef_search: 128 }
    }
}

impl FromStr for HnswOptions {
    type Err = String;

    /// The message names the field, what is wrong and the rule; the parser of the command line adds the argument.
    fn from_str(text: &str) -> Result<Self, String> {
        let fields: Vec<&str> = text.split(':').collect();
        if fields[0] != "hnsw" || fields.len() > 4 {
            return Err(format!("{text:?} is none of the indices; rule: {FORM}"));
        }
        let field = |i: usize, name: &str, default: usize, range: std::ops::RangeInclusive<usize>| match fields.get(i) {
            None => Ok(default),
            Some(text) => text.parse().ok().filter(|value| range.contains(value)).ok_or_else(|| {
                let (low, high) = (range.start(), range.end());
                format!("{name} of {FORM} is {text:?}; rule: a whole number from {low} to {high}")
            }),
        };
        const MOST: usize = u32::MAX as usize;
        let default = HnswOptions::default();
        Ok(HnswOptions {
            m: field(1, "M", default.m, 2..=255)?,
            ef_construction: field(2, "EF_CONSTRUCTION", default.ef_construction, 1..=MOST)?,
            ef_search: field(3, "EF_SEARCH", default.ef_search, 1..=MOST)?,
        })
    }
}

impl fmt::Display for HnswOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hnsw:{}:{}:{}", self.m, self.ef_construction, self.ef_search)
    }
}

/// 1 − cosine of rows of unit length. Rounding may make it negative, where `hnsw_rs` panics: then it is 0.
struct CosineDistance;

impl Distance<f32> for CosineDistance {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        f32::max(1.0 - dot(a, b), 0.0)
    }
}

/// The row at unit length, a zero row as it is. None for a row with a NaN or an infinity: no search returns one.
fn unit(row: &[f32]) -> Option<Vec<f32>> {
    let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() } else { 1.0 };
    norm.is_finite().then(|| row.iter().map(|&x| (f64::from(x) * scale) as f32).collect())
}

/// The index over a table of items.
pub struct ItemIndex {
    graph: Hnsw<'static, f32, CosineDistance>,
    ef_search: usize,
    items: usize,
}

impl ItemIndex {
    pub fn build(items: &Parameter, options: HnswOptions) -> Self {
        // More than all items is all items; the crate reserves memory for whatever it is told.
        let all = |ef: usize| ef.min(items.rows);
        let graph = Hnsw::new(options.m, items.rows, LAYERS, all(options.ef_construction), CosineDistance);
        for item in 0..items.rows {
            if let Some(row) = unit(items.row(item)) {
                graph.insert((&row, item));
            }
        }
        ItemIndex { graph, ef_search: all(options.ef_search), items: items.rows }
    }

    /// The best `k` items for a query that are not in `excluded`, best first, as far as the graph finds them.
    pub fn top_k(&self, query: &[f32], excluded: &[u32], k: usize) -> Vec<u32> {
        let Some(query) = unit(query) else { return Vec::new() };
        let excluded: HashSet<u32> = excluded.iter().copied().collect();
        let wanted = (k + excluded.len()).min(self.items);
        let found = self.graph.search(&query, wanted, self.ef_search.max(wanted));
        let items = found.into_iter().map(|neighbour| neighbour.d_id as u32);
        items.filter(|item| !excluded.contains(item)).take(k).collect()
    }

    /// Bytes of the two files, vectors and graph, that `hnsw_rs` writes to keep the index; they are removed again.
    fn bytes(&self, folder: &Path) -> Fallible<u64> {
        let folder = tempfile::tempdir_in(folder)?;
        self.graph.file_dump(folder.path(), "index")?;
        std::fs::read_dir(folder.path())?.map(|entry| Ok(entry?.metadata()?.len())).sum()
    }
}

/// What the index does for the users of the test targets, beside the exact search.
#[derive(Default)]
pub struct Comparison {
    options: HnswOptions,
    items: usize,
    build: Duration,
    /// Of the index, and of its vectors alone.
    bytes: u64,
    vector_bytes: u64,
    queries: usize,
    /// Test targets of all queries.
    targets: usize,
    /// Items in the exact lists; how many of them the index's lists have, too.
    listed: usize,
    shared: usize,
    exact: NormalizedRows,
    index: NormalizedRows,
}

/// One of the two ways to search.
#[derive(Default)]
struct NormalizedRows {
    time: Duration,
    /// How many test targets are in their user's list.
    targets: usize,
}

/// Builds the index and retrieves the [`TOP`] items of each test user through it and by [`Backend::top_k`].
///
/// Both get the same queries, one block by the one and then by the other, and use all cores (the exact search the
/// device of `backend`). The clock runs for the searches with their exclusions, not for the query tower.
pub fn compare(
    model: &Model,
    split: &Split,
    history: usize,
    options: HnswOptions,
    folder: &Path,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<Comparison> {
    let start = Instant::now();
    let index = ItemIndex::build(&model.items, options);
    let mut comparison = Comparison {
        options,
        items: index.items,
        build: start.elapsed(),
        bytes: index.bytes(folder)?,
        vector_bytes: size_of_val(&model.items.values[..]) as u64,
        ..Comparison::default()
    };
    let mut activations = Activations::default();
    let mut query = 0;
    for block in split.test.queries.chunks(BLOCK) {
        let histories: Vec<&[u32]> = block.iter().map(|&example| split.history(example, history)).collect();
        model.queries(&histories, &mut activations);
        let queries = Embeddings::new(&activations.queries, block.len(), model.dim());
        let items = Embeddings::new(&model.items.values, model.items.rows, model.dim());
        let start = Instant::now();
        let exact = evaluate::top([queries, items], Similarity::Cosine, split, block, TOP, backend)?;
        comparison.exact.time += start.elapsed();

        let start = Instant::now();
        let rows = block.par_iter().zip(activations.queries.par_chunks(model.dim()));
        let found: Vec<Vec<u32>> =
            rows.map(|(&example, query)| index.top_k(query, split.before(example), TOP)).collect();
        comparison.index.time += start.elapsed();

        for (row, found) in found.iter().enumerate() {
            comparison.add(exact.row(row).0, found, split.test.targets_of(query));
            query += 1;
        }
    }
    Ok(comparison)
}

impl Comparison {
    fn add(&mut self, exact: &[u32], found: &[u32], targets: &[u32]) {
        self.queries += 1;
        self.targets += targets.len();
        self.listed += exact.len();
        self.shared += exact.iter().filter(|item| found.contains(item)).count();
        let among = |list: &[u32]| targets.iter().filter(|target| list.contains(target)).count();
        self.exact.targets += among(exact);
        self.index.targets += among(found);
    }

    /// Share of the exact lists' items that the index returns.
    pub fn recall(&self) -> f64 {
        self.shared as f64 / self.listed.max(1) as f64
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queries = self.queries as f64;
        let targets = |side: &NormalizedRows| side.targets as f64 / self.targets.max(1) as f64;
        let per_second = |side: &NormalizedRows| queries / side.time.as_secs_f64().max(1e-9);
        let (index, exact) = (&self.index, &self.exact);
        writeln!(
            f,
            "index {}: {} items, built in {:.2} s, {} bytes on disk, {} of them vectors",
            self.options,
            self.items,
            self.build.as_secs_f64(),
            self.bytes,
            self.vector_bytes
        )?;
        write!(
            f,
            "  top {TOP} of {} users: recall {:.4} against the exact search, {:.0} queries/s (exact {:.0}), \
             test targets found {:.4} (exact {:.4})",
            self.queries,
            self.recall(),
            per_second(index),
            per_second(exact),
            targets(index),
            targets(exact)
        )
    }
}

#[cfg(test)]
mod tests;
