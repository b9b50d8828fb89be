//! Matmuls of bf16 numbers by AMX, the matrix unit of Intel's server processors from Sapphire Rapids on.
//!
//! The unit multiplies tiles: 16 rows of 32 bf16 numbers by 16 columns of 32, into 16 x 16 sums in `f32`. Products are exact. An
//! element's sum runs over pairs of products in one order, whatever its place in a tile, so it has the same bits wherever it is
//! computed. Numbers below 2^-126 count as 0.
//!
//! Both operands hold bf16 numbers in **words** of two: the lower half of a word is multiplied by the lower half of the other
//! operand's, the upper half by the upper. `words.rs` makes them.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware;

use std::marker::PhantomData;

use super::matmul::PANEL;

/// Rows and columns that a block of tiles has: two tiles each way.
pub(super) const BLOCK: usize = 32;
const _: () = assert!(BLOCK == PANEL, "a panel is a block's columns");
/// Rows of a tile, and words of a row.
pub(super) const TILE: usize = 16;

/// Proof that this process may use the matrix unit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amx {
    #[cfg(test)]
    emulated: bool,
    _private: (),
}

impl Amx {
    /// The unit, if the processor has one and the system lets this process use it. Linux is asked once, and from then on wants
    /// larger alternate stacks for signals (`sigaltstack`) of all threads.
    pub(super) fn detect() -> Option<Amx> {
        static USABLE: std::sync::LazyLock<bool> = std::sync::LazyLock::new(usable);
        USABLE.then_some(Amx {
            #[cfg(test)]
            emulated: false,
            _private: (),
        })
    }

    /// The same arithmetic in plain code, for tests on other processors.
    #[cfg(test)]
    pub(super) fn emulated() -> Amx {
        Amx { emulated: true, _private: () }
    }

    /// Makes this thread's unit ready for products, until what is returned is dropped. A thread has one at a time: the drop of
    /// the first would stop the second's.
    pub(super) fn start(self) -> Started {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if !self.is_emulated() {
            // SAFETY: an `Amx` that is not emulated comes from `detect`.
            unsafe { hardware::start() };
        }
        Started { amx: self, _this_thread: PhantomData }
    }

    fn is_emulated(self) -> bool {
        #[cfg(test)]
        return self.emulated;
        #[cfg(not(test))]
        false
    }
}

/// This thread's unit, ready for products.
pub(super) struct Started {
    amx: Amx,
    _this_thread: PhantomData<*const ()>,
}

impl Started {
    /// `to = [to +] a · b`
    pub(super) fn product(&self, product: Product<'_>) {
        product.check();
        #[cfg(test)]
        if self.amx.is_emulated() {
            return product.emulate();
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        // SAFETY: `check` has found all tiles within the operands, and this thread's unit was started.
        unsafe {
            hardware::product(product);
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if !self.amx.is_emulated() {
            // SAFETY: this thread's unit was started.
            unsafe { hardware::stop() };
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use hardware::usable;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn usable() -> bool {
    false
}

/// Where the tiles of one step of the sum begin, in words: 32 numbers of each row of `a`, and of each column of `b`. Tiles that a
/// step shares with the one before are not loaded again.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Step {
    pub(super) a: usize,
    pub(super) b: usize,
}

/// The steps of a product, behind [`Steps::NONE`].
#[derive(Debug)]
pub(super) struct Steps(Vec<Step>);

impl Default for Steps {
    fn default() -> Self {
        Steps(vec![Steps::NONE])
    }
}

impl Steps {
    /// What no step begins at: the first one has none before it.
    const NONE: Step = Step { a: usize::MAX, b: usize::MAX };

    /// Replaces the steps.
    pub(super) fn set(&mut self, steps: impl Iterator<Item = Step>) {
        self.0.truncate(1);
        self.0.extend(steps);
    }

    pub(super) fn bytes(count: usize) -> usize {
        // A vector doubles as it grows.
        2 * (count + 1) * size_of::<Step>()
    }

    fn all(&self) -> &[Step] {
        &self.0[1..]
    }
}

/// `to (m, n) = [to +] a (m, k) · b (k, n)`, where `m` and `n` are multiples of [`BLOCK`].
pub(super) struct Product<'a> {
    pub(super) m: usize,
    pub(super) n: usize,
    /// Rows of words.
    pub(super) a: &'a [u32],
    pub(super) a_stride: usize,
    /// Panels of [`BLOCK`] columns, `b_panel` words from each other: rows of one word for each column.
    pub(super) b: &'a [u32],
    pub(super) b_panel: usize,
    pub(super) steps: &'a Steps,
    pub(super) to: &'a mut [f32],
    pub(super) to_stride: usize,
    pub(super) add: bool,
}

impl Product<'_> {
    /// Asserts that every tile lies within its operand.
    fn check(&self) {
        let Product { m, n, a_stride, b_panel, to_stride, .. } = *self;
        assert!(m > 0 && n > 0 && m.is_multiple_of(BLOCK) && n.is_multiple_of(BLOCK) && to_stride >= n);
        assert!(a_stride >= TILE && self.to.len() >= (m - 1) * to_stride + n);
        let last = |step: fn(&Step) -> usize| self.steps.all().iter().map(step).max().unwrap_or(0);
        // So no step is as large as `Steps::NONE` either.
        assert!(self.a.len() >= last(|step| step.a).saturating_add((m - 1) * a_stride + TILE));
        let panels = (n / BLOCK - 1) * b_panel;
        assert!(self.b.len() >= last(|step| step.b).saturating_add(panels + TILE * BLOCK));
    }

    /// What the unit computes, number by number.
    #[cfg(test)]
    fn emulate(self) {
        let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0.0 * x } else { x };
        let halves = |word: u32| [flush(f32::from_bits(word << 16)), flush(f32::from_bits(word & 0xffff_0000))];
        for (row, column) in (0..self.m).flat_map(|row| (0..self.n).map(move |column| (row, column))) {
            let to = &mut self.to[row * self.to_stride + column];
            let mut sum = if self.add { *to } else { 0.0 };
            for step in self.steps.all() {
                let mut sums = [0.0f32; 2];
                for k in 0..TILE {
                    let a = halves(self.a[step.a + row * self.a_stride + k]);
                    let panel = step.b + column / BLOCK * self.b_panel + column % BLOCK;
                    let b = halves(self.b[panel + k * BLOCK]);
                    for half in 0..2 {
                        sums[half] = flush(a[half].mul_add(b[half], sums[half]));
                    }
                }
                sum = flush(sum + flush(sums[0] + sums[1]));
            }
            *to = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// The emulated unit, and the processor's where it has one.
    fn units() -> impl Iterator<Item = Amx> {
        std::iter::once(Amx::emulated()).chain(Amx::detect())
    }

    /// Two rows and panels of blocks, with steps that share tiles, computed from `number(place)`.
    fn product(amx: Amx, number: impl Fn(usize) -> bf16, add: bool) -> Vec<f32> {
        let word = |i: usize| u32::from(number(2 * i).to_bits()) | u32::from(number(2 * i + 1).to_bits()) << 16;
        let words = |count: usize, from: usize| (from..from + count).map(word).collect::<Vec<u32>>();
        let (m, n, a_stride, b_panel, to_stride) = (2 * BLOCK, 2 * BLOCK, 3 * TILE, 3 * TILE * BLOCK, 2 * BLOCK + 5);
        let (a, b) = (words(m * a_stride, 0), words(2 * b_panel, 7777));
        let mut steps = Steps::default();
        let places = [(0, 1), (0, 2), (1, 2), (2, 0)];
        steps.set(places.iter().map(|&(a, b)| Step { a: a * TILE, b: b * TILE * BLOCK }));
        let mut to: Vec<f32> = (0..m * to_stride).map(|i| number(i).to_f32()).collect();
        let product = Product { m, n, a: &a, a_stride, b: &b, b_panel, steps: &steps, to: &mut to, to_stride, add };
        amx.start().product(product);
        to
    }

    #[test]
    fn products_of_whole_numbers_are_exact() {
        let number = |place: usize| bf16::from_f32((place * 7 % 13) as f32 - 6.0);
        for (amx, add) in units().flat_map(|amx| [false, true].map(|add| (amx, add))) {
            let to = product(amx, number, add);
            for (row, column) in [(0, 0), (5, 40), (16, 3), (31, 31), (47, 16), (63, 63)] {
                let mut exact = if add { number(row * (2 * BLOCK + 5) + column).to_f32() } else { 0.0 };
                for (a, b) in [(0, 1), (0, 2), (1, 2), (2, 0)] {
                    for k in 0..TILE {
                        let a = 2 * (row * 3 * TILE + a * TILE + k);
                        let b =
                            2 * (7777 + column / BLOCK * 3 * TILE * BLOCK + (b * TILE + k) * BLOCK + column % BLOCK);
                        exact += (0..2).map(|half| number(a + half).to_f32() * number(b + half).to_f32()).sum::<f32>();
                    }
                }
                assert_eq!(to[row * (2 * BLOCK + 5) + column], exact, "{row}, {column}, {amx:?}");
            }
        }
    }

    /// Of every size, numbers below 2^-126 among them, so that every rounding and everything that counts as 0 is seen. What lies
    /// between the rows of `to` stays.
    #[test]
    fn the_emulated_unit_is_the_processors_bit_for_bit() {
        // The last are numbers whose products are near the least ones.
        for (spread, middle) in [(0, 0), (4, 0), (90, 0), (140, 0), (12, -66)] {
            let number = |place: usize| {
                let mixed = (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
                let exponent = (mixed >> 9) as i32 % (2 * spread + 1) - spread + middle;
                bf16::from_f32(
                    ((mixed % 511) as f32 - 255.0) * 2f32.powi(exponent / 2) * 2f32.powi(exponent - exponent / 2),
                )
            };
            let mut all = units().map(|amx| {
                [false, true].map(|add| product(amx, number, add).iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            });
            let emulated = all.next();
            assert!(all.all(|other| Some(other) == emulated), "{spread}");
        }
    }
}
