//! Exceptions (SDM 3A, "Interrupt and Exception Handling").

/// Vector numbers.
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// A fault or trap that an instruction raised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// The vector.
    pub vector: u8,
    /// The error code, for vectors that push one.
    pub error: Option<u32>,
    /// #PF: the linear address for CR2.  #DB: the bits to set in DR6.
    pub payload: u64,
    /// Whether the instruction completed (a trap: the saved RIP is the next instruction's).
    pub is_trap: bool,
}

impl Exception {
    /// A fault without an error code.
    #[must_use]
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, payload: 0, is_trap: false }
    }
    /// A fault with an error code.
    #[must_use]
    pub const fn coded(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), payload: 0, is_trap: false }
    }
    /// A page fault at `gva`.
    #[must_use]
    pub const fn page_fault(gva: u64, error: u32) -> Self {
        Self { vector: vector::PF, error: Some(error), payload: gva, is_trap: false }
    }
}

/// Page-fault error-code bits (SDM 3A, "Page-Fault Exceptions").
pub mod pf {
    #![allow(missing_docs)]
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
    pub const PK: u32 = 1 << 5;
}
