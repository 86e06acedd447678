//! How many instructions may be executed until the dispatcher has to look again.
//!
//! Generated code takes from it at the head of each block, and leaves where it is less than 0.  So
//! the handler of a signal ([`crate::dbt::nudge`]) makes a processor look up soon by setting its topmost
//! bits, which are not part of the number.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// Bits beside the number and its sign.
pub const BESIDE: u32 = 8;
/// What makes it less than 0, also after a block has taken its instructions.
const INTERRUPTED: i64 = 0b11 << 62;

/// A signed number of 56 bits.
#[derive(Default, Debug)]
#[repr(transparent)]
pub struct Countdown(AtomicI64);

impl Countdown {
    /// So many instructions.
    #[must_use]
    pub const fn new(n: i64) -> Self {
        Self(AtomicI64::new(n))
    }

    /// How many are left.
    #[inline]
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed) << BESIDE >> BESIDE
    }

    /// So many are left.
    #[inline]
    pub fn set(&mut self, n: i64) {
        self.0.store(n, Relaxed);
    }

    /// So many more.
    #[inline]
    pub fn add(&mut self, n: i64) {
        self.set(self.get() + n);
    }

    /// Forget interruptions so far.
    pub fn settle(&mut self) {
        self.set(self.get());
    }

    /// Have generated code leave at the head of the next block; from a signal's handler, too.
    pub fn interrupt(&self) {
        self.0.fetch_or(INTERRUPTED, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_left(countdown: &Countdown) -> bool {
        countdown.0.load(Relaxed) < 0
    }

    #[test]
    fn an_interruption_is_no_part_of_the_number() {
        for n in [0, 1, 63, 200_000, -1, -64] {
            let mut countdown = Countdown::new(n);
            countdown.interrupt();
            assert_eq!((true, n), (is_left(&countdown), countdown.get()));
            countdown.0.fetch_sub(64, Relaxed); // as the head of a block does
            assert!(is_left(&countdown));
            countdown.0.fetch_add(64, Relaxed); // as its way out does
            assert_eq!(n, countdown.get());
            countdown.settle();
            assert_eq!((n < 0, n), (is_left(&countdown), countdown.get()));
        }
    }
}
