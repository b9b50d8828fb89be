//! Whether the ranks of a step mean the same step.

use std::hash::Hasher;

use bytemuck::NoUninit;

use super::collective::{Collective, gather_results};
use crate::error::{Result, value};
use crate::hash::IdHasher;
use crate::problem::arrays::{Excluded, Indices};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::loss::Loss;
use crate::problem::pool::Candidates;
use crate::problem::positives::Positives;
use crate::problem::statistics::Request;

/// Hashes of what all ranks must give alike, each with the name of the argument.
#[derive(Debug, Default)]
pub(super) struct Fingerprints(Vec<(&'static str, u64)>);

impl Fingerprints {
    /// Of a batch over a table and its loss.
    pub(super) fn of_batch(batch: &Batch<'_>, loss: &Loss, request: Request) -> Self {
        let mut all = Fingerprints::default();
        all.add_options(loss, request);
        let matrix = &batch.matrix;
        all.add("queries", |hash| hash_embeddings(hash, &matrix.queries));
        all.add("positives", |hash| {
            match &batch.positives {
                Positives::Index(indices) | Positives::Rows(indices) => hash_slice(hash, indices),
                Positives::Separate(embeddings) => hash_embeddings(hash, embeddings),
            }
            hash_optional(hash, batch.positive_ids.as_deref());
            hash_optional(hash, batch.positive_log_q.as_deref());
            hash_optional(hash, batch.pairs.offsets);
            hash_optional(hash, batch.pairs.weight);
        });
        all.add("candidates", |hash| {
            for pool in &matrix.pools {
                match &pool.candidates {
                    Candidates::Embeddings(embeddings) => hash_embeddings(hash, embeddings),
                    Candidates::Rows(rows) => hash_indices(hash, rows),
                    Candidates::WholeTable => hash.write_u64(u64::MAX),
                }
                hash_optional(hash, pool.ids_slice());
                hash_optional(hash, pool.log_q);
                hash.write_u64(pool.gradient.into());
            }
        });
        all.add("row_negatives", |hash| {
            let Some(negatives) = &matrix.row_negatives else { return };
            hash_indices(hash, &negatives.rows);
            hash.write_u64(negatives.per_row as u64);
            hash_optional(hash, negatives.log_q);
        });
        all.add("table", |hash| {
            let Some(table) = &matrix.table else { return };
            hash.write_u64(table.shape.rows as u64);
            hash_optional(hash, table.ids.as_ref().map(|ids| &*ids.0));
            hash.write_u64(table.gradient.into());
        });
        all.add("excluded_ids", |hash| hash_excluded(hash, matrix.excluded.as_ref()));
        all.add("row_weight", |hash| hash_optional(hash, batch.row_weight.as_deref()));
        all
    }

    /// The loss and what is asked for.
    pub(super) fn add_options(&mut self, loss: &Loss, request: Request) {
        self.add("loss", |hash| hash.write(format!("{loss:?}").as_bytes()));
        let asked = [request.gradients, request.moments, request.rank];
        self.add("request", |hash| asked.iter().for_each(|&asked| hash.write_u64(asked.into())));
    }

    pub(super) fn add(&mut self, argument: &'static str, hash_argument: impl FnOnce(&mut IdHasher)) {
        let mut hash = IdHasher::default();
        hash_argument(&mut hash);
        self.0.push((argument, hash.finish()));
    }
}

/// Fails on all ranks if one of them has an error, or gives another argument than rank 0 does.
pub(super) fn agree(collective: &mut impl Collective, mine: Result<Fingerprints>) -> Result<()> {
    let names: Vec<&str> = mine.iter().flat_map(|all| &all.0).map(|(name, _)| *name).collect();
    let bytes = mine.map(|all| all.0.iter().flat_map(|(_, hash)| hash.to_le_bytes()).collect());
    let all = gather_results(collective, bytes)?;
    for (place, name) in names.iter().enumerate() {
        let hash = |bytes: &Vec<u8>| bytes.get(place * 8..place * 8 + 8).map(<[u8]>::to_vec);
        if let Some(rank) = all.iter().position(|bytes| hash(bytes) != hash(&all[0])) {
            return Err(value(*name, format!("not the same on ranks 0 and {rank}"), "the same on all ranks"));
        }
    }
    Ok(())
}

pub(super) fn hash_embeddings(hash: &mut IdHasher, embeddings: &Embeddings<'_>) {
    let (rows, dim, size) = (embeddings.rows(), embeddings.dim(), embeddings.dtype().size());
    [rows, dim, size].iter().for_each(|&number| hash.write_u64(number as u64));
    for row in 0..rows {
        let start = row * embeddings.stride() * size;
        hash.write(&embeddings.bytes()[start..start + dim * size]);
    }
}

fn hash_indices(hash: &mut IdHasher, indices: &Indices<'_>) {
    hash.write_u64(indices.len() as u64);
    (0..indices.len()).for_each(|place| hash.write_u64(indices.at(place) as u64));
}

pub(super) fn hash_optional<T: NoUninit>(hash: &mut IdHasher, values: Option<&[T]>) {
    match values {
        Some(values) => hash_slice(hash, values),
        None => hash.write_u64(u64::MAX),
    }
}

fn hash_slice<T: NoUninit>(hash: &mut IdHasher, values: &[T]) {
    hash.write_u64(values.len() as u64);
    hash.write(bytemuck::cast_slice(values));
}

pub(super) fn hash_excluded(hash: &mut IdHasher, excluded: Option<&Excluded<'_>>) {
    hash_optional(hash, excluded.map(|excluded| excluded.offsets));
    hash_optional(hash, excluded.map(|excluded| &*excluded.ids.0));
}
