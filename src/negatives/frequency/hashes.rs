//! The hash functions of the sketches.

use bytemuck::Zeroable;

use crate::error::{Result, value};
use crate::hash::mix;
use crate::memory::zeroed;
use crate::negatives::sampling::RandomStream;

/// Several hash functions from ids to `0..width`, each with cells of its own: `rows` of `width` cells.
///
/// The high 64 bits of `a·x + b` mod 2^128 with random a and b are pairwise independent (Dietzfelbinger, "Universal
/// Hashing and k-wise Independent Random Variables via Integer Arithmetic without Primes", STACS 1996), as the bounds
/// of count-min need; their product with the width, again its high part, is the cell. Here x is the [mixed](mix) id,
/// which is different for different ids and does not keep their structure. Without mixing, ids in an arithmetic
/// progression would give cells with the same regularity.
#[derive(Debug, Clone)]
pub(super) struct Hashes {
    pub(super) seed: u64,
    pub(super) width: usize,
    /// Factor and offset of each function, from the seed.
    functions: Vec<(u128, u128)>,
}

impl Hashes {
    /// `width` cells for each of `depth` functions.
    pub(super) fn new(width: usize, depth: usize, seed: u64) -> Result<Self> {
        if width == 0 || width as u64 > 1 << 40 {
            return Err(value("width", width, "from 1 to 2^40 cells"));
        }
        if depth == 0 || depth > 64 {
            return Err(value("depth", depth, "from 1 to 64 hash functions"));
        }
        let mut random = RandomStream::new(seed, 0);
        let mut wide = || u128::from(random.next_u64()) << 64 | u128::from(random.next_u64());
        let functions = (0..depth).map(|_| (wide(), wide())).collect();
        Ok(Hashes { seed, width, functions })
    }

    pub(super) fn depth(&self) -> usize {
        self.functions.len()
    }

    /// Cells in all rows.
    pub(super) fn num_cells(&self) -> usize {
        self.width * self.functions.len()
    }

    /// All rows' cells, empty: zeros.
    pub(super) fn empty_cells<T: Zeroable>(&self) -> Result<Vec<T>> {
        zeroed(self.num_cells()).ok_or_else(|| {
            let rule = format!("the cells of {} (depth) hash functions fit in memory", self.depth());
            value("width", self.width, rule)
        })
    }

    /// The id's cell in each row.
    #[inline]
    pub(super) fn cells(&self, id: u64) -> impl Iterator<Item = usize> {
        let id = u128::from(mix(id));
        self.functions.iter().enumerate().map(move |(row, &(factor, offset))| {
            let hash = (factor.wrapping_mul(id).wrapping_add(offset) >> 64) as u64;
            row * self.width + ((u128::from(hash) * self.width as u128) >> 64) as usize
        })
    }
}
