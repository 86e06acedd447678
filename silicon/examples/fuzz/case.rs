//! One case: where things lie, what a run starts from and what it leaves.
//!
//! Both sides see the same bytes at the same linear addresses below 4 GBytes:
//! code that may be executed only, data with a read-only page and holes, a stack.  64-bit programs see
//! all of it in two other places, too, as programs have their own parts and their libraries'.

use std::mem::offset_of;

pub const PAGE: usize = 4096;
pub const CODE: u64 = 0x1000_0000;
pub const CODE_PAGES: usize = 2;
pub const DATA: u64 = 0x2000_0000;
pub const STACK: u64 = 0x3000_0000;

/// Pages with bytes that change: (linear address, writable).
pub const PAGES: [(u64, bool); 6] = [
    (DATA, true),
    (DATA + 0x1000, true),
    (DATA + 0x2000, false),
    // a hole
    (DATA + 0x4000, true),
    (STACK, true),
    (STACK + 0x1000, true),
];
/// How far all of it is from where it is, too.
pub const ALIASES: [u64; 3] = [0, 0x5455_0000_0000, 0x7D55_0000_0000];
pub const BYTES: usize = PAGES.len() * PAGE;
pub const WORDS: usize = BYTES / 8;

/// Selectors as Linux has them.
pub const CS64: u64 = 0x33;
pub const CS32: u64 = 0x23;
pub const SS: u64 = 0x2B;

/// The flags that programs can see change.
pub const FLAGS: u64 = 0x24_4DD5;

/// Not an exception: executed too many instructions; was killed; forbidden system call.
pub const RUNAWAY: u32 = 0x100;
pub const LOST: u32 = 0x101;
pub const SYSTEM_CALL: u32 = 0x102;

/// Longest code of a case.
pub const CODE_BYTES: usize = 256;

/// What the processor starts from.  The five words from `rip` on are an IRETQ frame.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Start {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 …; the stack pointer is in the frame.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// DS and ES: null in 64-bit code.
    pub ds: u64,
    pub fx: Fx,
    pub upper: Upper,
    pub code: [u8; CODE_BYTES],
    pub code_len: u64,
    /// What is in ES, SS, DS, FS and GS of 32-bit code, by [`crate::machine::segment`]; all zero: as
    /// Linux has them.
    pub segments: [u8; 5],
}

#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq)]
pub struct Fx(pub [u8; 512]);

/// Bits 255:128 of the YMM registers.
pub type Upper = [[u8; 16]; 16];

impl Start {
    pub fn bits(&self) -> u32 {
        if self.cs == CS64 { 64 } else { 32 }
    }
    /// Where its code is, from the first of the code's pages on.
    pub fn place(&self) -> u64 {
        (self.rip & 0xFFFF_FFFF) - CODE
    }
    /// Make it a program of nothing.
    pub fn forget(&mut self) {
        self.code = [0xCC; CODE_BYTES];
    }
    pub const RIP: usize = offset_of!(Start, rip);
    pub const FS_BASE: usize = offset_of!(Start, fs_base);
    pub const GS_BASE: usize = offset_of!(Start, gs_base);
    pub const DS: usize = offset_of!(Start, ds);
    pub const FX: usize = offset_of!(Start, fx);
    pub const UPPER: usize = offset_of!(Start, upper);
}

/// Words of memory that a run changed, at most.
pub const CHANGES: usize = 96;

/// What a run left.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub vector: u32,
    pub error: u32,
    pub cr2: u64,
    pub fx: Fx,
    pub upper: Upper,
    /// FIP, FDP, FOP, FCS, FDS: of our processor only.
    pub pointers: [u64; 5],
    /// How many words changed; their numbers and new values (the first `CHANGES`).
    pub changed: u64,
    pub changes: [(u64, u64); CHANGES],
}

impl Outcome {
    pub const NOTHING: Outcome = Outcome {
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        vector: LOST,
        error: 0,
        cr2: 0,
        fx: Fx([0; 512]),
        upper: [[0; 16]; 16],
        pointers: [0; 5],
        changed: 0,
        changes: [(0, 0); CHANGES],
    };

    /// Note that word number `index` of the memory is now `value`.
    pub fn note(&mut self, index: usize, value: u64) {
        if let Some(place) = self.changes.get_mut(self.changed as usize) {
            *place = (index as u64, value);
        }
        self.changed += 1;
    }

    pub fn changes(&self) -> &[(u64, u64)] {
        &self.changes[..CHANGES.min(self.changed as usize)]
    }
}

/// The linear address of word `index` of the memory.
pub fn address_of(index: u64) -> u64 {
    let at = 8 * index as usize;
    PAGES[at / PAGE].0 + (at % PAGE) as u64
}

/// A small generator of random numbers.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut r = Self(seed ^ stream.wrapping_mul(0xD134_2543_DE82_EF95));
        r.next();
        r
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
    /// Less than `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
    /// True `n` times in 100.
    pub fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
