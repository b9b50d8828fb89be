//! Who names which row of a table: candidates of pools, negatives of a row's own, and positives, in the order of the rows.

use std::ops::Range;

use rayon::prelude::*;

use crate::problem::batch::Batch;
use crate::problem::pool::Candidates;
use crate::problem::positives::Positives;

/// Parts of the table that tasks take. The number does not depend on threads, because results must not.
const PARTS: usize = 16;
/// Buckets of rows whose uses are counted, so that parts have about as many uses each. Popular items often have rows near
/// each other.
const BUCKETS: usize = 2048;

/// The uses of one part of the table. Each list is ascending: the row in the upper 32 bits, and below it which candidate
/// (index over all pools), which negative (place in the (B, K) array), or which pair.
#[derive(Debug, Default)]
pub(super) struct TableUses {
    /// The part: rows of the table.
    pub(super) part: Range<usize>,
    pub(super) candidates: Vec<u64>,
    pub(super) own: Vec<u64>,
    pub(super) pairs: Vec<u64>,
    /// The rows that are named, each once. Empty where a pool is the whole table.
    pub(super) rows: Vec<u32>,
    /// Where a list is sorted into.
    sorted: Vec<u64>,
}

fn entry(row: usize, index: usize) -> u64 {
    (row as u64) << 32 | index as u64
}

pub(super) fn row_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

impl TableUses {
    /// Everything that has a part in the gradient of the batch's table. Parts begin at multiples of `block` rows.
    pub(super) fn gather(parts: &mut Vec<TableUses>, batch: &Batch<'_>, block: usize) {
        let buckets = Buckets::new(batch, block);
        let of_pools = buckets.count(candidates(batch));
        let of_own = buckets.count(own_negatives(batch));
        let of_pairs = buckets.count(positives(batch));
        let cut = buckets.cut([&of_pools, &of_own, &of_pairs]);
        cut.start(parts);
        cut.fill(parts, |uses| &mut uses.candidates, &of_pools, candidates(batch));
        cut.fill(parts, |uses| &mut uses.own, &of_own, own_negatives(batch));
        cut.fill(parts, |uses| &mut uses.pairs, &of_pairs, positives(batch));
        let whole = is_whole(batch);
        parts.par_iter_mut().for_each(|uses| {
            let TableUses { part, candidates, own, pairs, rows, sorted } = uses;
            for list in [&mut *candidates, &mut *own, &mut *pairs] {
                sort_by_row(list, sorted, part);
            }
            rows.clear();
            if !whole {
                merge_rows([candidates, own, pairs], rows);
            }
        });
    }

    /// Bytes of the lists of all parts.
    pub(super) fn bytes(batch: &Batch<'_>) -> usize {
        let Some(table) = &batch.matrix.table else { return 0 };
        let uses = Self::most(batch);
        // A list of rows grows while they are counted: it doubles, from four on, and then both lengths are there. The other
        // lists are as long as they need to be; one more is what the longest of them is sorted into.
        let rows = 4 * uses.min(table.shape.rows) + 4 * PARTS;
        // Counts of uses by bucket, of each kind, and each bucket's part.
        let buckets = 4 * BUCKETS.min(table.shape.rows) * size_of::<usize>();
        2 * uses * size_of::<u64>() + rows * size_of::<u32>() + buckets + PARTS * size_of::<TableUses>()
    }

    /// Bytes of a row-sparse gradient, at most.
    pub(super) fn gradient_bytes(batch: &Batch<'_>) -> usize {
        let rows = batch.matrix.table.as_ref().map_or(0, |table| table.shape.rows);
        Self::most(batch).min(rows) * (batch.dim() * size_of::<f32>() + size_of::<u32>())
    }

    /// The largest number of uses of rows.
    fn most(batch: &Batch<'_>) -> usize {
        let own = batch.matrix.row_negatives.map_or(0, |negatives| negatives.rows.len());
        batch.num_candidates() + own + batch.num_positives()
    }
}

/// (row, index over all pools) of the candidates that are named one by one and have a gradient.
fn candidates<'b>(batch: &'b Batch<'_>) -> impl Iterator<Item = (usize, usize)> + 'b {
    let pools = batch.matrix.pools_with_start().filter(|(_, pool)| pool.gradient);
    let by_reference = pools.filter_map(|(start, pool)| match pool.candidates {
        Candidates::Rows(rows) => Some((start, rows)),
        Candidates::WholeTable | Candidates::Embeddings(_) => None,
    });
    by_reference.flat_map(|(start, rows)| (0..rows.len()).map(move |j| (rows.at(j), start + j)))
}

/// (row, place in the (B, K) array)
fn own_negatives<'b>(batch: &'b Batch<'_>) -> impl Iterator<Item = (usize, usize)> + 'b {
    batch
        .matrix
        .row_negatives
        .iter()
        .flat_map(|negatives| (0..negatives.rows.len()).filter_map(|place| Some((negatives.by_index(place)?, place))))
}

/// (row, pair)
fn positives<'b>(batch: &'b Batch<'_>) -> impl Iterator<Item = (usize, usize)> + 'b {
    let rows: &[u32] = if let Positives::Rows(rows) = &batch.positives { rows } else { &[] };
    rows.iter().enumerate().map(|(pair, &row)| (row as usize, pair))
}

/// Whether a pool with gradient is the whole table: then every row has a gradient.
pub(super) fn is_whole(batch: &Batch<'_>) -> bool {
    let whole = |pool: &crate::problem::pool::Pool<'_>| matches!(pool.candidates, Candidates::WholeTable);
    batch.matrix.pools.iter().any(|pool| pool.gradient && whole(pool))
}

/// Neighbouring rows of a table, of which parts are made.
struct Buckets {
    table_rows: usize,
    /// Rows in a bucket.
    size: u32,
}

impl Buckets {
    fn new(batch: &Batch<'_>, block: usize) -> Self {
        let table_rows = batch.matrix.table.as_ref().map_or(0, |table| table.shape.rows);
        Buckets { table_rows, size: table_rows.div_ceil(BUCKETS).next_multiple_of(block) as u32 }
    }

    /// The bucket of a row. Rows have 31 bits.
    fn of(&self, row: usize) -> usize {
        (row as u32 / self.size) as usize
    }

    fn count(&self, uses: impl Iterator<Item = (usize, usize)>) -> Vec<usize> {
        let mut counts = vec![0; self.table_rows.div_ceil(self.size as usize)];
        uses.for_each(|(row, _)| counts[self.of(row)] += 1);
        counts
    }

    /// Parts of as many uses as possible, each of whole buckets. Where nothing is named, parts have as many rows.
    fn cut<const LISTS: usize>(self, counts: [&Vec<usize>; LISTS]) -> Cut {
        let of_bucket = |bucket: usize| 1 + counts.iter().map(|counts| counts[bucket]).sum::<usize>();
        let buckets = counts[0].len();
        let all: usize = (0..buckets).map(of_bucket).sum();
        let mut before = 0;
        let part_of = (0..buckets).map(|bucket| {
            let part = before * PARTS / all;
            before += of_bucket(bucket);
            part
        });
        Cut { part_of: part_of.collect(), buckets: self }
    }
}

/// Which part each bucket is in.
struct Cut {
    buckets: Buckets,
    part_of: Vec<usize>,
}

impl Cut {
    fn start(&self, parts: &mut Vec<TableUses>) {
        parts.resize_with(PARTS, TableUses::default);
        let row = |bucket: usize| (bucket * self.buckets.size as usize).min(self.buckets.table_rows);
        for (part, uses) in parts.iter_mut().enumerate() {
            let of_part = [part, part + 1].map(|part| row(self.part_of.partition_point(|&other| other < part)));
            uses.part = of_part[0]..of_part[1];
        }
    }

    /// Distributes uses, whose indices ascend, to one list of each part.
    fn fill(
        &self,
        parts: &mut [TableUses],
        list: impl Fn(&mut TableUses) -> &mut Vec<u64>,
        counts: &[usize],
        uses: impl Iterator<Item = (usize, usize)>,
    ) {
        for uses in &mut *parts {
            list(uses).clear();
        }
        for of_part in self.part_of.iter().zip(counts).collect::<Vec<_>>().chunk_by(|a, b| a.0 == b.0) {
            list(&mut parts[*of_part[0].0]).reserve_exact(of_part.iter().map(|(_, count)| **count).sum());
        }
        for (row, index) in uses {
            list(&mut parts[self.part_of[self.buckets.of(row)]]).push(entry(row, index));
        }
    }
}

/// The rows that any of the lists names.
fn merge_rows(lists: [&[u64]; 3], rows: &mut Vec<u32>) {
    let mut lists = lists;
    while let Some(row) = lists.iter().filter_map(|list| list.first()).map(|&first| row_of(first)).min() {
        rows.push(row);
        for list in &mut lists {
            let uses = list.iter().take_while(|&&entry| row_of(entry) == row).count();
            *list = &list[uses..];
        }
    }
}

/// Sorts a list whose lower halves ascend: digit by digit of the row, the least first, so that uses of one row stay in
/// their order (least-significant-digit radix sort).
fn sort_by_row(list: &mut [u64], sorted: &mut Vec<u64>, part: &Range<usize>) {
    const DIGIT: u32 = 11;
    sorted.clear();
    sorted.resize(list.len(), 0);
    let digit = |entry: u64, shift: u32| (row_of(entry) as usize - part.start) >> shift & ((1 << DIGIT) - 1);
    let row_bits = part.len().next_power_of_two().ilog2();
    let (mut from, mut to) = (&mut *list, sorted.as_mut_slice());
    let digits = (0..row_bits).step_by(DIGIT as usize);
    let odd = digits.len() % 2 == 1;
    for shift in digits {
        let mut places = [0usize; 1 << DIGIT];
        from.iter().for_each(|&entry| places[digit(entry, shift)] += 1);
        let mut start = 0;
        for place in &mut places {
            start += std::mem::replace(place, start);
        }
        for &entry in from.iter() {
            let place = &mut places[digit(entry, shift)];
            to[*place] = entry;
            *place += 1;
        }
        std::mem::swap(&mut from, &mut to);
    }
    if odd {
        list.copy_from_slice(sorted);
    }
}

#[cfg(test)]
mod tests {
    use super::{Buckets, PARTS, TableUses, entry, sort_by_row};

    #[test]
    fn lists_are_sorted_whatever_the_number_of_rows() {
        for table_rows in [1usize, 2, 3, 2047, 2048, 2049, 1 << 22, (1 << 31) - 1] {
            for first in [0, 70_000] {
                let part = first..first + table_rows;
                let row = |i: usize| first + (i * 0x9e37_79b9) % table_rows;
                let mut list: Vec<u64> =
                    (0..5000).map(|i| entry(row(i), i)).chain([entry(part.end - 1, 5000)]).collect();
                let mut expected = list.clone();
                expected.sort_unstable();
                sort_by_row(&mut list, &mut Vec::new(), &part);
                assert!(list == expected, "rows {part:?}");
            }
        }
    }

    #[test]
    fn parts_cover_the_table_in_order_and_share_popular_rows() {
        for (table_rows, block) in
            [(1usize, 1u32), (5, 1), (300, 256), (100_000, 1), (100_000, 96), ((1 << 31) - 1, 256)]
        {
            let size = (table_rows.div_ceil(super::BUCKETS) as u32).next_multiple_of(block);
            let buckets = || Buckets { table_rows, size };
            // Squares of a uniform number: many uses of the first rows.
            let row = |i: usize| ((i as f64 / 50_000.0).powi(2) * table_rows as f64) as usize;
            let uses = || (0..50_000).map(|i| (row(i), i));
            let counts = buckets().count(uses());
            let cut = buckets().cut([&counts]);
            let mut parts = Vec::new();
            cut.start(&mut parts);
            cut.fill(&mut parts, |uses| &mut uses.own, &counts, uses());
            assert_eq!((parts[0].part.start, parts[PARTS - 1].part.end), (0, table_rows));
            assert!(parts.windows(2).all(|pair| pair[0].part.end == pair[1].part.start));
            let inside =
                |uses: &TableUses| uses.own.iter().all(|&use_| uses.part.contains(&(super::row_of(use_) as usize)));
            assert!(parts.iter().all(inside));
            assert_eq!(parts.iter().map(|uses| uses.own.len()).sum::<usize>(), 50_000);
            let most = parts.iter().map(|uses| uses.own.len()).max().expect("parts");
            let largest_bucket = counts.iter().max().expect("buckets");
            assert!(most <= 2 * 50_000 / PARTS + largest_bucket, "{most} uses in one part of {table_rows} rows");
        }
    }
}
