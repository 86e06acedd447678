//! What generated code reads and writes beside the processor's registers.

use super::groups::MAX_GROUPS;
use super::zeroed::{Vacant, build};
use crate::mmu::tlb::L1_CLASSES;

/// Entries of a table of current code pages: those of programs with 32 MBytes of code.
pub const FETCH_ENTRIES: usize = 8192;
/// Entries of a table of indirect targets.
pub const JUMP_ENTRIES: usize = 16384;

/// Entries of the table of distances.
pub const DISTANCES: usize = 256;
/// What makes every address, canonical or not, one that is not canonical.
pub const NOWHERE: u64 = 1 << 62;

/// Kinds and sizes of recipes for flags.
pub const MAKERS: usize = 256;

/// The tables; index 0 of a pair is for CPL 3, 1 for all others.
#[repr(C)]
pub struct Tables {
    /// The arithmetic flags as LAHF and SETO AL leave AX.
    pub flags: u64,
    /// A scratch word.
    pub value: u64,
    /// T0 while flags are made.
    pub pointer: u64,
    /// The last indirect transfer.
    pub indirect: u32,
    /// One more than the number of the last block's report of x87 instructions that names a memory operand,
    /// in the lower half; in the upper one that of a later block's that names none.  0: it is told already.
    pub x87: u64,
    /// Offset of the last memory operand of one.
    pub x87_data: u64,
    /// Host pointers of a block's groups of accesses.
    pub groups: [u64; MAX_GROUPS],
    /// Why generated code came back: a link to make, or `NO_REQUEST`.
    pub request: u64,
    /// The caller's stack pointer.
    pub saved_rsp: u64,
    /// The caller's MXCSR.
    pub host_mxcsr: u32,
    /// RFLAGS.IF may be set without anybody having to look: see [`crate::vmx::events::is_open`].
    pub is_open: u64,
    /// The engine, for the helpers that generated code calls.
    pub engine: usize,
    /// By the low bits of a page number: which code page is mapped there now (0: unknown).
    pub fetch: [[u32; FETCH_ENTRIES]; 2],
    /// By an address's number of an arena, as far as a byte tells it: how far the window is from there,
    /// or [`NOWHERE`].
    pub distances: [u64; DISTANCES],
    /// The mode of the blocks in each table of indirect targets.
    pub jump_modes: [u32; L1_CLASSES],
    /// By the lowest byte of a record's `how`: the piece that makes the flags.
    pub makers: [u64; MAKERS],
    /// By [`super::mode::class_of`] and [`jump_index`] of an address: the landing pad to try.
    /// Each is filled before code of its class runs; 0 is no place.
    pub jump: [[u64; JUMP_ENTRIES]; L1_CLASSES],
}

/// The mode of a table of indirect targets that is empty.
pub const NO_MODE: u32 = u32::MAX;
/// No link to make.
pub const NO_REQUEST: u64 = u64::MAX;

impl Tables {
    /// Empty tables.
    #[must_use]
    pub fn build(place: Vacant<'_, Tables>) -> &mut Tables {
        build!(place, Tables {
            flags: 0,
            value: 0,
            pointer: 0,
            indirect: 0,
            x87: 0,
            x87_data: 0,
            groups: [0; MAX_GROUPS],
            request: NO_REQUEST,
            saved_rsp: 0,
            host_mxcsr: 0x1F80,
            is_open: 0,
            engine: 0,
            distances: [NOWHERE; DISTANCES],
            jump_modes: [NO_MODE; L1_CLASSES],
            ; in place
            ; zeros fetch, makers, jump,
        })
    }
}

/// Words of a set that has a bit for each word of a [`Used`].
const BUSY: usize = 4;

fn set(words: &mut [u64], bit: usize) {
    words[bit / 64] |= 1 << (bit % 64);
}

fn for_each_bit(mut bits: u64, mut tell: impl FnMut(usize)) {
    while bits != 0 {
        tell(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// Which entries of a table may be in use: emptying it must not cost what a full one would.
#[derive(Debug)]
pub struct Used<const WORDS: usize> {
    /// A bit for each entry.
    words: [u64; WORDS],
    /// A bit for each word that is not 0.
    busy: [u64; BUSY],
}

impl<const WORDS: usize> Used<WORDS> {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        const { assert!(WORDS <= 64 * BUSY) }
        Self { words: [0; WORDS], busy: [0; BUSY] }
    }

    /// One more.
    pub fn add(&mut self, entry: usize) {
        set(&mut self.words, entry);
        set(&mut self.busy, entry / 64);
    }

    /// None any more; each that was is told.
    pub fn drain(&mut self, mut tell: impl FnMut(usize)) {
        for (i, busy) in self.busy.iter_mut().enumerate() {
            for_each_bit(std::mem::take(busy), |word| {
                let word = 64 * i + word;
                for_each_bit(std::mem::take(&mut self.words[word]), |bit| tell(64 * word + bit));
            });
        }
    }
}

impl<const WORDS: usize> Default for Used<WORDS> {
    fn default() -> Self {
        Self::new()
    }
}

/// The entry of an indirect target: bits 17:4 of nine times the address.
#[must_use]
pub fn jump_index(rip: u64) -> usize {
    (rip.wrapping_mul(9) >> 4) as usize % JUMP_ENTRIES
}
