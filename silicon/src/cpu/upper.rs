//! Bits 255:128 of the YMM registers: XSAVE's state component 2 (SDM 1, "AVX State").
//!
//! They are apart from the lower halves, which are XMM registers, as XSAVE's areas have them, and as SSE
//! instructions, which leave them alone, want it.  While generated code runs they are in the computer's
//! registers; docs/decisions/0088-ymm-state.md says when.

use std::mem::offset_of;

use crate::cpu::state::Core;

/// By register.
pub type Halves = [[u8; 16]; 16];

const CLEAR: Halves = [[0; 16]; 16];

/// The upper halves.
#[repr(C, align(16))]
#[derive(Clone, Debug)]
pub struct Upper {
    /// They mean nothing while `in_use` is 0.
    halves: Halves,
    /// 0: each is zero.
    in_use: u64,
}

/// Where the halves are in a processor's state.
pub const HALVES: usize = offset_of!(Core, upper) + offset_of!(Upper, halves);
/// Where it says there that they are in use.
pub const IN_USE: usize = offset_of!(Core, upper) + offset_of!(Upper, in_use);

impl Default for Upper {
    fn default() -> Self {
        Self { halves: CLEAR, in_use: 0 }
    }
}

impl Upper {
    /// All of them.
    #[must_use]
    pub fn all(&self) -> Halves {
        if self.in_use == 0 { CLEAR } else { self.halves }
    }

    /// Change them.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut Halves) -> T) -> T {
        if self.in_use == 0 {
            self.halves = CLEAR;
        }
        let result = change(&mut self.halves);
        self.in_use = u64::from(self.halves != CLEAR);
        result
    }
}

impl Core {
    /// YMM register `i`.
    #[must_use]
    pub fn ymm(&self, i: usize) -> [u8; 32] {
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.fx.xmm(i));
        value[16..].copy_from_slice(&self.upper.all()[i]);
        value
    }

    /// Set YMM register `i`.
    pub fn set_ymm(&mut self, i: usize, value: &[u8; 32]) {
        self.fx.set_xmm(i, value[..16].try_into().unwrap_or_default());
        self.upper.change(|halves| halves[i].copy_from_slice(&value[16..]));
    }
}
