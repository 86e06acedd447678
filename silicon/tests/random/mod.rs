//! Random numbers that are the same in each run, so that a failure repeats.

#![allow(dead_code)] // each test uses its part

/// xorshift64*
pub struct Rng(pub u64);

impl Rng {
    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// One below `n`, of the upper half of the next one.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }
}
