//! Exact top-K over a table in shards.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::hash::Hasher;

use super::Sharded;
use super::agreement::{Fingerprints, agree, hash_embeddings, hash_excluded};
use super::collective::{Collective, gather_results};
use crate::backend::Backend;
use crate::error::{Result, shape};
use crate::problem::arrays::{Excluded, Ids};
use crate::problem::embeddings::{Embeddings, Real};
use crate::problem::loss::Similarity;
use crate::problem::pool::Pool;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::search::{Search, TopK, check_k};
use crate::problem::table::Table;

impl<B: Backend, C: Collective> Sharded<B, C> {
    /// The `k` rows of the whole table that are most similar to each query, as [`Backend::top_k`] finds them in one
    /// process: the same lists on all ranks, with rows counted over all shards. `k` may be more than a shard has.
    ///
    /// `queries` (B, D) and `excluded`, offsets (B + 1) and ids that a row must not return, are the same on all ranks.
    /// `shard` holds this rank's rows, with ids where an item is not its row. Ranks exchange 16 bytes for each of their
    /// best min(k, M_r) rows of each query.
    ///
    /// # Errors
    /// As [`Backend::top_k`], for `k` above M, and as [`compute`](Sharded::compute).
    pub fn top_k<'a>(
        &mut self,
        queries: Embeddings<'a>,
        shard: impl Into<Table<'a>>,
        excluded: Option<(&'a [i64], Ids<'a>)>,
        similarity: Similarity,
        k: usize,
    ) -> Result<TopK<B::Real>> {
        let excluded = excluded.map(|(offsets, ids)| Excluded { offsets, ids });
        let fingerprints = search_fingerprints(&queries, excluded.as_ref(), similarity, k);
        let search = self.own_search(queries, shard.into(), excluded, k);
        agree(&mut self.collective, search.as_ref().map(|_| fingerprints).map_err(Clone::clone))?;
        let found = match search? {
            Some(search) => self.backend.top_k(&search, similarity, k.min(self.rows().len())).map(|top| encode(&top)),
            None => Ok(Vec::new()),
        };
        let all = gather_results(&mut self.collective, found)?;
        let parts = all.iter().enumerate().map(|(rank, bytes)| {
            let rows = self.rows_of(rank);
            Part { bytes, first_row: rows.start as u32, per_row: k.min(rows.len()) }
        });
        Ok(merged(&parts.collect::<Vec<_>>(), queries.rows(), k))
    }

    /// The search of this rank's rows; nothing where it has none.
    fn own_search<'a>(
        &self,
        queries: Embeddings<'a>,
        shard: Table<'a>,
        excluded: Option<Excluded<'a>>,
        k: usize,
    ) -> Result<Option<Search<'a>>> {
        check_k(k, self.table_rows())?;
        let rows = self.rows();
        if shard.shape.rows != rows.len() {
            let rule = format!("{} rows, this rank's part of the table", rows.len());
            return Err(shape("shard", format!("{} rows", shard.shape.rows), rule));
        }
        if rows.is_empty() {
            queries.check("queries")?;
            return Ok(None);
        }
        // An item without an id is its row, which this rank counts from its first.
        let start = if shard.ids.is_some() { 0 } else { rows.start as u64 };
        let excluded = excluded.map(|Excluded { offsets, ids }| {
            let ids = ids.0.iter().map(|id| id.wrapping_sub(start)).collect();
            Excluded { offsets, ids: Ids(Cow::Owned(ids)) }
        });
        let whole = vec![Pool::whole_table()];
        let matrix = ScoreMatrix { pools: whole, excluded, ..ScoreMatrix::of_table(queries, shard) };
        matrix.check()?;
        Ok(Some(Search { matrix }))
    }
}

fn search_fingerprints(
    queries: &Embeddings<'_>,
    excluded: Option<&Excluded<'_>>,
    similarity: Similarity,
    k: usize,
) -> Fingerprints {
    let mut all = Fingerprints::default();
    // Views that are too short are found on the rank that has them, and must not be read here.
    if queries.check("queries").is_ok() {
        all.add("queries", |hash| hash_embeddings(hash, queries));
    }
    all.add("excluded_ids", |hash| hash_excluded(hash, excluded));
    all.add("similarity", |hash| hash.write(format!("{similarity:?}").as_bytes()));
    all.add("k", |hash| hash.write_u64(k as u64));
    all
}

/// Each entry as index and score, 8 bytes each.
fn encode<T: Real>(top: &TopK<T>) -> Vec<u8> {
    let entries = top.indices.iter().zip(&top.scores);
    entries.flat_map(|(&index, &score)| [u64::from(index), score.into().to_bits()]).flat_map(u64::to_le_bytes).collect()
}

/// What a rank found among its rows.
struct Part<'a> {
    bytes: &'a [u8],
    first_row: u32,
    per_row: usize,
}

impl Part<'_> {
    /// Rows of the whole table and their scores.
    fn entries(&self, query: usize) -> impl Iterator<Item = (u32, f64)> + '_ {
        let words = self.bytes.chunks_exact(16).skip(query * self.per_row).take(self.per_row);
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let entries = words.map(move |entry| (number(&entry[..8]) as u32, f64::from_bits(number(&entry[8..]))));
        entries.filter(|(index, _)| *index != TopK::NONE).map(|(index, score)| (self.first_row + index, score))
    }
}

/// The best k of all parts: the larger score first, of equal ones the smaller row.
fn merged<T: Real>(parts: &[Part<'_>], num_queries: usize, k: usize) -> TopK<T> {
    let mut top = TopK::empty(num_queries, k);
    for query in 0..num_queries {
        let mut entries: Vec<(u32, f64)> = parts.iter().flat_map(|part| part.entries(query)).collect();
        entries.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
        for (place, (row, score)) in entries.into_iter().take(k).enumerate() {
            top.indices[query * k + place] = row;
            top.scores[query * k + place] = T::from_f64(score);
        }
    }
    top
}
