//! The 64-bit mbarrier object, kept in shared memory in a layout of our own.
//!
//! Bits 0..20 expected arrivals, 20..40 pending arrivals, 40..61 pending transaction bytes (two's
//! complement), 61 the phase parity, 62..64 a mark that tells a live object from memory nothing initialised.

const COUNT_BITS: u32 = 20;
pub const MAX_COUNT: u32 = (1 << COUNT_BITS) - 1;
const MARK: u64 = 0b10 << 62;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Barrier {
    pub expected: u32,
    pub pending: u32,
    pub transactions: i32,
    pub parity: bool,
}

impl Barrier {
    pub fn new(count: u32) -> Result<Barrier, String> {
        if count == 0 || count > MAX_COUNT {
            return Err(format!("mbarrier.init with count {count}, not within 1..={MAX_COUNT}"));
        }
        Ok(Barrier { expected: count, pending: count, transactions: 0, parity: false })
    }

    pub fn decode(word: u64) -> Result<Barrier, String> {
        if word >> 62 != MARK >> 62 {
            return Err(format!(
                "no live mbarrier here (the 8 bytes hold {word:#x}): not initialised, invalidated or overwritten"
            ));
        }
        let count = |shift: u32| (word >> shift) as u32 & MAX_COUNT;
        Ok(Barrier {
            expected: count(0),
            pending: count(20),
            transactions: ((word >> 40) as u32 as i32) << 11 >> 11,
            parity: word >> 61 & 1 != 0,
        })
    }

    pub fn encode(&self) -> u64 {
        MARK | self.expected as u64
            | (self.pending as u64) << 20
            | (self.transactions as u64 & 0x1f_ffff) << 40
            | (self.parity as u64) << 61
    }

    /// Whether the phase of this parity is over, given that it is the current or the preceding one.
    pub fn completed(&self, parity: bool) -> bool {
        self.parity != parity
    }

    pub fn expect(&mut self, bytes: u32) -> Result<(), String> {
        self.transact(bytes as i64)
    }

    pub fn complete(&mut self, bytes: u32) -> Result<(), String> {
        self.transact(-(bytes as i64))?;
        self.turn();
        Ok(())
    }

    pub fn arrive(&mut self, count: u32) -> Result<(), String> {
        if count == 0 || count > self.pending {
            return Err(format!(
                "mbarrier arrival of {count} while the phase waits for {} of {} arrivals ({} bytes outstanding)",
                self.pending, self.expected, self.transactions
            ));
        }
        self.pending -= count;
        self.turn();
        Ok(())
    }

    pub fn arrive_no_complete(&mut self, count: u32) -> Result<(), String> {
        if count >= self.pending {
            return Err(format!(
                "mbarrier.arrive.noComplete of {count} completes a phase with {} pending",
                self.pending
            ));
        }
        self.arrive(count)
    }

    pub fn arrive_drop(&mut self, count: u32) -> Result<(), String> {
        if count > self.expected {
            return Err(format!("mbarrier.arrive_drop of {count} from an expected count of {}", self.expected));
        }
        self.expected -= count;
        self.arrive(count)
    }

    /// cp.async.mbarrier.arrive without .noinc raises the pending count first so that it nets to nothing.
    pub fn raise_pending(&mut self) -> Result<(), String> {
        if self.pending == MAX_COUNT {
            return Err("mbarrier pending count overflow".into());
        }
        self.pending += 1;
        Ok(())
    }

    fn transact(&mut self, change: i64) -> Result<(), String> {
        let next = self.transactions as i64 + change;
        if next.unsigned_abs() > MAX_COUNT as u64 {
            return Err(format!("mbarrier transaction count {next} is outside +-{MAX_COUNT}"));
        }
        self.transactions = next as i32;
        Ok(())
    }

    fn turn(&mut self) {
        if self.pending == 0 && self.transactions == 0 {
            self.pending = self.expected;
            self.parity = !self.parity;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_their_encoding() {
        for transactions in [0, 1, -1, 1_048_575, -1_048_575] {
            for parity in [false, true] {
                let b = Barrier { expected: 1_048_575, pending: 12345, transactions, parity };
                assert_eq!(Barrier::decode(b.encode()).unwrap(), b);
            }
        }
        assert!(Barrier::decode(0).is_err());
        assert!(Barrier::decode(u64::MAX).is_err());
    }

    #[test]
    fn a_phase_ends_when_arrivals_and_bytes_are_both_there() {
        let mut b = Barrier::new(2).unwrap();
        assert!(b.completed(true) && !b.completed(false));
        b.arrive(1).unwrap();
        b.complete(64).unwrap();
        assert!(!b.completed(false));
        b.expect(64).unwrap();
        assert!(!b.completed(false));
        b.arrive(1).unwrap();
        assert!(b.completed(false) && !b.completed(true));
        assert_eq!(b.pending, 2);
        b.expect(32).unwrap();
        b.arrive(2).unwrap();
        assert!(!b.completed(true));
        assert!(b.arrive(1).is_err());
        b.complete(32).unwrap();
        assert!(b.completed(true));
    }

    #[test]
    fn counts_stay_in_range() {
        assert!(Barrier::new(0).is_err());
        assert!(Barrier::new(1 << 20).is_err());
        let mut b = Barrier::new(1).unwrap();
        assert!(b.arrive(2).is_err());
        assert!(b.arrive_no_complete(1).is_err());
        b.expect(MAX_COUNT).unwrap();
        assert!(b.expect(1).is_err());
    }
}
