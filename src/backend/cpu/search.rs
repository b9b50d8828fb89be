//! Exact top-K on the score tiles of the stream.
//!
//! ```text
//! each (block of queries, split of the candidates), in parallel:
//!   for each tile of candidates: S = Q̂ Ĉᵀ, mask; keys of scores above the row's threshold go to the row's buffer
//! each row: the best K of its splits, sorted
//! ```
//!
//! A pair's score depends on its tile alone, and the cut into tiles on the problem alone; so the number of splits,
//! unlike in the stream, may depend on the number of threads without a change of the result.

use rayon::prelude::*;

use super::best::{self, Best, Collect, Key, keep_largest};
use super::candidates::Purpose;
use super::kernels::Tile;
use super::masks::Masks;
use super::plan::Cut;
use super::tile::TileJob;
use super::units::Units;
use super::{Borrowed, Cpu, Workspace, resize, scale, split_off};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::plan::Plan;
use crate::problem::search::{Search, TopK};

/// Units of work for each thread: a few, so that none waits long for the last. Each split begins without a threshold and
/// so has its own K ln(N / K) candidates to sort out.
const UNITS_PER_THREAD: usize = 4;

pub(super) fn plan(search: &Search<'_>, k: usize) -> Plan {
    let (matrix, threads) = (&search.matrix, rayon::current_num_threads());
    let (b, dim) = (matrix.num_queries(), matrix.dim());
    let cut = Cut::new(matrix);
    let splits = (UNITS_PER_THREAD * threads).div_ceil(cut.blocks).min(cut.tiles);
    let found = splits * b * k * size_of::<Key>();
    // A thread that merges a row holds what its splits found.
    let per_thread = Best::bytes(cut.block_b, k) + splits * k * size_of::<Key>();
    let scratch = cut.scratch_bytes(matrix, splits, false) + per_thread * threads;
    let workspace_bytes = Masks::bytes(matrix, 0) + Units::bytes(b, dim, matrix.dtype()) + found + scratch;
    Plan { block_b: cut.block_b, block_n: cut.block_n, splits, workspace_bytes }
}

pub(super) fn search(cpu: &mut Cpu, search: &Search<'_>, similarity: Similarity, k: usize) -> TopK {
    let (arch, plan, matrix) = (cpu.arch, plan(search, k), &search.matrix);
    let matmul = cpu.bf16_matmul(matrix.dtype());
    let b = matrix.num_queries();
    let Workspace { masks, queries, scratch, found, .. } = &mut cpu.workspace;
    masks.of_search(matrix);
    queries.load(arch, matmul, &matrix.queries, similarity);
    resize(found, plan.splits * b * k);
    // Scores are similarities: the scale is not applied.
    let scale = scale(&Loss::softmax(similarity, 1.0));
    let job = TileJob { arch, matmul, matrix, similarity, scale, plan, masks, queries };

    let mut units = Vec::with_capacity(plan.splits * b.div_ceil(plan.block_b));
    let mut slots = found.as_mut_slice();
    for split in 0..plan.splits {
        for start in (0..b).step_by(plan.block_b) {
            let rows = start..(start + plan.block_b).min(b);
            let slot = split_off(&mut slots, rows.len() * k);
            units.push((split, rows, slot));
        }
    }
    units.into_par_iter().with_max_len(1).for_each_init(
        || Borrowed::take(scratch),
        |scratch, (split, rows, slot)| {
            let scratch = &mut scratch.0;
            scratch.best.clear(rows.len(), k);
            for tile in job.tiles(split) {
                job.load(&mut scratch.candidates, &tile, Purpose::Scores);
                let first = tile.start().map_or(0, |start| start as u32);
                job.for_each_chunk(scratch, &tile, rows.clone(), |scratch, chunk| {
                    let sims = &mut scratch.sims[..chunk.rows.len() * tile.width];
                    let tile = Tile { sims, width: tile.width };
                    arch.dispatch(Collect { tile, first, best: scratch.best.rows(chunk.in_block) });
                });
            }
            scratch.best.write(slot);
        },
    );
    merge(found, plan.splits, b, k)
}

/// The best `k` of what each row's splits found, sorted.
fn merge(found: &[Key], splits: usize, b: usize, k: usize) -> TopK {
    let mut top = TopK::empty(b, k);
    let rows = top.indices.par_chunks_mut(k).zip(top.scores.par_chunks_mut(k)).enumerate();
    rows.for_each_init(Vec::new, |keys: &mut Vec<Key>, (row, (indices, scores))| {
        keys.clear();
        for split in 0..splits {
            let slot = &found[(split * b + row) * k..][..k];
            keys.extend(slot.iter().filter(|&&key| key != 0));
        }
        let kept = keep_largest(keys, k);
        let best = &mut keys[..kept];
        best.sort_unstable_by(|a, b| b.cmp(a));
        for (place, &key) in best.iter().enumerate() {
            indices[place] = best::index(key);
            scores[place] = best::score(key);
        }
    });
    top
}
