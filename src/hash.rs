//! The one hash of ids, for tables of ids and for sketches. `kernels/shared/hash.h` is the same for the device.
//!
//! Real ids have structure: consecutive numbers, `shard << 48 | n`, multiples of a power of two. A table takes the low
//! bits of a hash as the place and the top seven as a tag, so all bits of the hash must depend on all bits of the id.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A map by id, whose iteration order depends on ids and capacity alone.
pub(crate) type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// A set of ids.
pub(crate) type IdSet = HashSet<u64, BuildHasherDefault<IdHasher>>;

/// Mixes an id, one to one: the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", OOPSLA 2014), with Stafford's constants "Mix13". Each bit of the id changes each bit of the result in
/// about half of all cases.
#[inline]
pub(crate) fn mix(id: u64) -> u64 {
    let id = (id ^ id >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let id = (id ^ id >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    id ^ id >> 31
}

/// [`mix`] for the standard library's tables.
#[derive(Debug, Clone, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    #[inline]
    fn write_u64(&mut self, id: u64) {
        self.0 = mix(self.0 ^ id);
    }

    #[inline]
    fn write_u32(&mut self, id: u32) {
        self.write_u64(u64::from(id));
    }

    /// For keys of any other kind, eight bytes at a time.
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::mix;

    /// The first output of SplitMix64 from seed 0, as its authors' implementation prints it. `kernels/shared/hash.h` is
    /// checked against the same number.
    #[test]
    fn it_is_the_published_finaliser() {
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
    }

    const SHIFTS: std::ops::Range<u32> = 0..57;

    /// Kinds of ids that occur, at most 2^13 of each, all different.
    fn kinds() -> Vec<(String, Vec<u64>)> {
        let most = |shift: u32| 1u64 << (64 - shift).min(13);
        let mut kinds: Vec<(String, Vec<u64>)> =
            SHIFTS.map(|shift| (format!("i << {shift}"), (0..most(shift)).map(|i| i << shift).collect())).collect();
        for shift in 13..=58 {
            let sharded = (0..1u64 << 13).map(|i| (i % 64) << shift | (i / 64));
            kinds.push((format!("shard << {shift} | n"), sharded.collect()));
        }
        for shift in 14..=51 {
            kinds.push((format!("i << {shift} | i"), (0..1u64 << 13).map(|i| i << shift | i).collect()));
        }
        kinds
    }

    /// How far the spread over `bits` bits of the hash from bit `from` on is from that of random numbers, in standard
    /// deviations: the chi-square statistic of the buckets' sizes.
    fn deviation(ids: &[u64], from: u32, bits: u32) -> f64 {
        let mut sizes = vec![0u32; 1 << bits];
        ids.iter().for_each(|&id| sizes[(mix(id) >> from) as usize & ((1 << bits) - 1)] += 1);
        let expected = ids.len() as f64 / sizes.len() as f64;
        let statistic: f64 = sizes.iter().map(|&size| (f64::from(size) - expected).powi(2) / expected).sum();
        let freedom = sizes.len() as f64 - 1.0;
        (statistic - freedom) / (2.0 * freedom).sqrt()
    }

    /// Tables take the low bits as the place and the top seven as the tag; sketches take the high bits. Random numbers
    /// pass 5 deviations once in 5000 times with 16 buckets, the fewest here, and more rarely with more.
    #[test]
    fn ids_of_every_structure_spread_like_random_numbers() {
        for (kind, ids) in kinds() {
            // About four ids for each bucket.
            let bits = ids.len().ilog2() - 2;
            for (from, bits) in [(0, bits), (64 - bits, bits), (57, bits.min(7)), (0, 4)] {
                let deviation = deviation(&ids, from, bits);
                assert!(deviation.abs() < 5.0, "{kind}: {deviation} at {bits} bits from bit {from}");
            }
        }
    }
}
