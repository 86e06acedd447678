//! Whether code in the middle of a block is worth a block of its own.
//!
//! Slices, deadlines and interrupts end anywhere, so programs go on anywhere.  If every such place
//! began a block, a guest that does the same for ever would be translated anew from each of its
//! instructions, until the cache is full.  So places inside a block that no jump asked for are
//! interpreted, mostly up to the next block, until they come up again and again: behind an
//! instruction that faults, or makes VM exits, with every turn.

use std::ops::Range;

use super::block::{Block, Key};
use super::mode::MODE_UNGROUPED;

/// Visits that make a place worth a block: about what a translation costs, in interpreted pieces.
pub const VISITS: u32 = 32;
/// No two places in a page share an entry, so a loop cannot displace its own.
const ENTRIES: usize = 4096;

/// The places visited lately.
pub struct Middles {
    /// Addresses in the block that was interpreted last.
    span: Range<u64>,
    /// By the offset in the page: the last address, and its visits since another one was there.
    seen: Vec<(u64, u32)>,
}

impl Middles {
    /// None yet.
    pub fn new() -> Self {
        Self { span: 0..0, seen: vec![(0, 0); ENTRIES] }
    }

    /// Blocks were dropped: the last one interpreted may be among them.
    pub fn forget(&mut self) {
        self.span = 0..0;
    }

    /// Whether to interpret the instruction at `key`, which begins no block.  `blocks`: those with
    /// code in its frame.
    pub fn is_cold<'a>(&mut self, key: &Key, mut blocks: impl Iterator<Item = &'a Block>) -> bool {
        let (rip, visits) = &mut self.seen[key.rip as usize % ENTRIES];
        if *rip != key.rip {
            (*rip, *visits) = (key.rip, 0);
        }
        *visits = visits.saturating_add(1);
        if *visits >= VISITS {
            return false;
        }
        if !self.span.contains(&key.rip) {
            let Some(block) = blocks.find(|b| b.holds(key)) else { return false };
            self.span = block.key.rip..block.key.rip.wrapping_add(u64::from(block.bytes));
        }
        true
    }
}

impl Block {
    /// Whether the instruction at `key` is one of the block's, with groups or without.
    fn holds(&self, key: &Key) -> bool {
        let offset = key.hpa.wrapping_sub(self.key.hpa);
        !self.is_dead
            && (self.key.mode ^ key.mode) & !MODE_UNGROUPED == 0
            && offset < u64::from(self.bytes)
            && self.key.rip.wrapping_add(offset) == key.rip
    }
}
