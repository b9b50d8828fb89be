//! The random numbers behind every draw: one generator, with as many independent streams as there are workers.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};

/// A stream of random numbers, given by a seed and a stream number: the same numbers on every platform.
///
/// ChaCha with 8 rounds (Bernstein, "ChaCha, a variant of Salsa20", 2008): the seed is the key, the stream number the
/// nonce, and a counter the position. Streams of one seed never overlap and start at once, so give each worker (and
/// each epoch, if you like) a stream number of its own. A stream has 2^70 bytes.
///
/// ```
/// use catalog_softmax::negatives::{Distribution, RandomStream, Uniform};
/// let items = Uniform::new(1_000_000)?;
/// let of_worker = |worker| items.draw(100, &mut RandomStream::new(7, worker));
/// assert_eq!(of_worker(0)?.ids, of_worker(0)?.ids);
/// assert_ne!(of_worker(0)?.ids, of_worker(1)?.ids);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
///
/// A clone goes on with the same numbers, so it repeats the original's draws. For other numbers, take another stream
/// number.
#[derive(Debug)]
pub struct RandomStream(ChaCha8Rng);

impl Clone for RandomStream {
    fn clone(&self) -> Self {
        RandomStream(ChaCha8Rng::deserialize_state(&self.0.serialize_state()))
    }
}

impl RandomStream {
    /// Stream number `stream` of `seed`, at its start.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut generator = ChaCha8Rng::from_seed(key);
        generator.set_stream(stream);
        RandomStream(generator)
    }

    /// 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform on the multiples of 2^-53 in [0, 1).
    #[inline]
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform on `0..n`, exactly: every number has the probability 1/n. `n` is at least 1.
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        self.below_with_bits(n).0
    }

    /// The same with 32 further random bits, which do not depend on the number.
    ///
    /// Lemire, "Fast Random Integer Generation in an Interval", ACM TOMACS 2019: the high word of `bits · n` is the number; a
    /// low word under `2^32 mod n` is rejected, and the division that says so is rarely needed.
    #[inline]
    pub(super) fn below_with_bits(&mut self, n: u32) -> (u32, u32) {
        loop {
            let bits = self.next_u64();
            let product = (bits >> 32) * u64::from(n);
            let low = product as u32;
            if low >= n || low >= n.wrapping_neg() % n {
                return ((product >> 32) as u32, bits as u32);
            }
        }
    }

    /// Exponentially distributed with mean 1.
    #[inline]
    pub(super) fn exponential(&mut self) -> f64 {
        // 1 − unit is in (0, 1].
        -libm::log(1.0 - self.unit())
    }

    /// The sum of `count` independent exponential variables with mean 1.
    pub(super) fn sum_of_exponentials(&mut self, count: usize) -> f64 {
        // A sum of logarithms is the logarithm of a product, as long as that does not underflow: 16 factors of at least 2^-53.
        const FACTORS: usize = 16;
        let mut left = count;
        let mut sum = 0.0;
        while left > 0 {
            let factors = left.min(FACTORS);
            let product: f64 = (0..factors).map(|_| 1.0 - self.unit()).product();
            sum -= libm::log(product);
            left -= factors;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::RandomStream;

    /// The mean and the variance of a gamma variable of shape `count` are both `count`; its fourth central moment is
    /// `3 count² + 6 count`, which gives the variance's standard error.
    #[test]
    fn sums_of_exponentials_are_gamma_variables() {
        const TRIALS: f64 = 40_000.0;
        let mut random = RandomStream::new(3, 0);
        for count in [0, 1, 15, 16, 17, 40] {
            let n = count as f64;
            let (mut mean, mut variance) = (0.0, 0.0);
            for _ in 0..TRIALS as usize {
                let sum = random.sum_of_exponentials(count);
                mean += sum / TRIALS;
                variance += (sum - n) * (sum - n) / TRIALS;
            }
            assert!((mean - n).abs() <= 5.0 * (n / TRIALS).sqrt(), "{count}: mean {mean}");
            let error = ((2.0 * n * n + 6.0 * n) / TRIALS).sqrt();
            assert!((variance - n).abs() <= 5.0 * error, "{count}: variance {variance}");
        }
    }
}
