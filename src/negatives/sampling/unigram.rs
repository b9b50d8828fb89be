//! Items by their counts, in constant time per draw.

use super::{BLOCK, Distribution, RandomStream, check_num_items};
use crate::error::{Result, shape, value};

/// Popularity: `Q(id) = count(id)^distortion / Σ_j count(j)^distortion`. A distortion of 1 takes the counts as they
/// are, word2vec takes 0.75 (Mikolov et al. 2013, section 2.2), and 0 gives every item that has been seen the same Q.
/// An id of count 0 is never drawn, whatever the distortion.
///
/// An alias table (Walker 1977; Vose, "A Linear Algorithm for Generating Random Numbers with a Given Distribution", IEEE TSE
/// 1991) of 16 bytes for each item, 160 MB for 1e7, and while it is built 8 more; a draw with its Q reads one cache line.
///
/// The table is built in integers: shares of the draws are multiples of `2^-32 / N`, at least one for each count
/// above 0. [`probability`](Distribution::probability) returns the table's own Q, so that log_q fits what is drawn. Q
/// is stored as f32, with a relative error of 6e-8, and never rounds to 1 unless no other item can be drawn. For an
/// item with nearly all of the draws, `1 − Q` is therefore known to 6e-8 only. The table's Q differs from the formula
/// by a relative `2^-33 / (N Q)`, which matters only for items a million times rarer than the average. Such an item
/// gets at least one unit of `2^-32 / N`, and the most frequent item gets as much less.
///
/// ```
/// use catalog_softmax::negatives::{Distribution, RandomStream, Unigram};
/// let popularity = Unigram::new(&[8.0, 0.0, 1.0, 1.0], 1.0)?;
/// assert_eq!(popularity.log_q(&[0, 2])?, [0.8f32.ln(), 0.1f32.ln()]);
/// assert!(popularity.log_q(&[1]).is_err(), "never drawn");
/// assert!(popularity.draw(1000, &mut RandomStream::new(7, 0))?.ids.iter().all(|&id| id != 1));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Unigram {
    cells: Vec<Cell>,
    support: u32,
}

/// One of N equal parts of the draws: `own` item's up to the threshold, the alias's from there on. Aligned so that it never
/// straddles two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
struct Cell {
    threshold: u32,
    alias: u32,
    /// Q of the item whose index is the cell's.
    own: f32,
    /// Q of the alias.
    other: f32,
}

/// Units in a cell: a threshold is 32 random bits' worth.
const FULL: u64 = 1 << 32;

impl Unigram {
    /// `counts` (N), finite and >= 0, of the items `0..N`, and a finite `distortion`. The counts may be weights of any kind.
    ///
    /// # Errors
    /// No counts or more than 2^32 − 1, one that is negative, NaN or infinite, none above 0, a distortion that is not finite.
    pub fn new(counts: &[f64], distortion: f64) -> Result<Self> {
        let units = units(weights(counts, distortion)?);
        let support = units.iter().filter(|&&units| units > 0).count() as u32;
        let share = 1.0 / (FULL as f64 * units.len() as f64);
        // Q must not round to 1 if another item can be drawn: the corrected logQ takes log(1 − Q).
        let most = if support == 1 { 1.0 } else { 1f32.next_down() };
        let probability = |id: usize| ((units[id] as f64 * share) as f32).min(most);
        let mut cells: Vec<Cell> = (0..units.len())
            .map(|id| Cell { threshold: u32::MAX, alias: id as u32, own: probability(id), other: probability(id) })
            .collect();
        fill(&units, |id, threshold, alias| {
            cells[id] = Cell { threshold, alias: alias as u32, own: probability(id), other: probability(alias) };
        });
        Ok(Unigram { cells, support })
    }
}

/// `count^distortion`, in proportion, the largest near 1.
fn weights(counts: &[f64], distortion: f64) -> Result<Vec<f64>> {
    check_num_items(counts.len() as u64)
        .map_err(|_| shape("counts", format!("{} elements", counts.len()), "from 1 to 2^32 - 1"))?;
    if let Some((i, count)) = counts.iter().enumerate().find(|(_, count)| !(count.is_finite() && **count >= 0.0)) {
        return Err(value(format!("counts[{i}]"), count, "finite and >= 0"));
    }
    let positive = || counts.iter().copied().filter(|&count| count > 0.0);
    // Powers of at most 1.
    let reference = if distortion >= 0.0 { positive().reduce(f64::max) } else { positive().reduce(f64::min) };
    let Some(reference) = reference else {
        return Err(shape("counts", "no element > 0", "at least one, for something to be drawn"));
    };
    if !distortion.is_finite() {
        return Err(value("distortion", distortion, "finite"));
    }
    let power = |count: f64| match count / reference {
        ratio if distortion == 1.0 => ratio,
        ratio if ratio.is_normal() => libm::pow(ratio, distortion),
        // A ratio outside f64's range may have a power well inside it.
        _ => libm::exp(distortion * (libm::log(count) - libm::log(reference))),
    };
    // A weight that underflows stays above 0: its item is very rare, but it can be drawn.
    let weight = |&count: &f64| if count > 0.0 { power(count).max(f64::MIN_POSITIVE) } else { 0.0 };
    Ok(counts.iter().map(weight).collect())
}

/// Each weight's share in units, N cells' worth in all; at least one unit for a weight above 0.
fn units(weights: Vec<f64>) -> Vec<u64> {
    let all = u128::from(FULL) * weights.len() as u128;
    let scale = all as f64 / weights.iter().sum::<f64>();
    let to_units = |weight: f64| if weight > 0.0 { ((weight * scale).round() as u64).max(1) } else { 0 };
    let mut units: Vec<u64> = weights.into_iter().map(to_units).collect();
    let sum: u128 = units.iter().map(|&units| u128::from(units)).sum();
    // The largest share is at least the average, a full cell, and rounding changed each by one unit at most, N < 2^32.
    if let Some(largest) = units.iter_mut().max_by_key(|units| **units) {
        *largest = (u128::from(*largest) + all - sum) as u64;
    }
    units
}

/// Calls `cut(id, threshold, alias)` for each cell that two items share; the others belong to their own item.
///
/// Light items keep a cell each, and the current heavy one fills it up; when that has less than a cell left, it is light itself
/// and the next heavy one fills up. In integers, the last one ends with a full cell.
fn fill(units: &[u64], mut cut: impl FnMut(usize, u32, usize)) {
    let mut heavies = (0..units.len()).filter(|&id| units[id] > FULL);
    let Some(mut heavy) = heavies.next() else { return };
    let mut left = units[heavy];
    for light in (0..units.len()).filter(|&id| units[id] < FULL) {
        cut(light, units[light] as u32, heavy);
        left -= FULL - units[light];
        while left < FULL {
            // A cell is short, so an item has more than one.
            let Some(next) = heavies.next() else { return };
            cut(heavy, left as u32, next);
            left = units[next] - (FULL - left);
            heavy = next;
        }
    }
}

impl Distribution for Unigram {
    fn num_items(&self) -> u32 {
        self.cells.len() as u32
    }

    fn support(&self) -> u32 {
        self.support
    }

    #[inline]
    fn probability(&self, id: u64) -> f64 {
        usize::try_from(id).ok().and_then(|id| self.cells.get(id)).map_or(0.0, |cell| f64::from(cell.own))
    }

    #[inline]
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        let (id, bits) = random.below_with_bits(self.cells.len() as u32);
        self.look_up(id, bits)
    }

    /// Each cell is a cache miss of about 100 ns, and many of them can overlap. So the loop that reads cells does
    /// nothing else.
    fn draw_into(&self, drawn: &mut [(u64, f64)], random: &mut RandomStream) {
        let mut places = [(0, 0); BLOCK];
        for drawn in drawn.chunks_mut(BLOCK) {
            places
                .iter_mut()
                .take(drawn.len())
                .for_each(|place| *place = random.below_with_bits(self.cells.len() as u32));
            drawn.iter_mut().zip(&places).for_each(|(drawn, &(id, bits))| *drawn = self.look_up(id, bits));
        }
    }
}

impl Unigram {
    /// The draw that falls into cell `id`, there at `bits`.
    #[inline]
    fn look_up(&self, id: u32, bits: u32) -> (u64, f64) {
        let cell = self.cells[id as usize];
        // Both sides are there: a choice without a branch, which no one could predict.
        let own = bits < cell.threshold;
        let drawn = if own { id } else { cell.alias };
        (u64::from(drawn), f64::from(if own { cell.own } else { cell.other }))
    }
}
