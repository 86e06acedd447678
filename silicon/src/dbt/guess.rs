//! Where operands of a program with a window are guessed to be when they are translated, and what is
//! learned of guesses.

use std::cmp::Ordering;

use super::Dbt;
use super::find::fetchable;
use super::mode::{mode_key, relies_on_stack};
use crate::addr::{AddressMap, PAGE_OFFSET};
use crate::cpu::state::Core;
use crate::mmu::tlb::perm;
use crate::mmu::walk::Access;

/// Instructions whose operands are in several arenas, before all are forgotten.
const MOST_PLACES: usize = 1 << 16;
/// How often an operand is not where it was guessed to be before nothing is guessed any more.
const LESSONS: u8 = 3;

/// What is to be done where an operand was not in the arena that was guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lesson {
    /// To wait and see.
    Wait,
    /// To translate the instruction again: nothing is guessed then.
    Again,
    /// Nothing any more.
    Done,
}

/// By the host-physical address of an instruction: how often its operand was not where it was guessed
/// to be.
#[derive(Default)]
pub struct Places(AddressMap<u64, u8>);

impl Places {
    /// An instruction's operand was not where it was guessed to be.
    pub(super) fn learn(&mut self, instruction: u64) -> Lesson {
        if self.0.len() >= MOST_PLACES {
            self.0.clear();
        }
        let times = self.0.entry(instruction).or_insert(0);
        *times = times.saturating_add(1);
        match (*times).cmp(&LESSONS) {
            Ordering::Less => Lesson::Wait,
            Ordering::Equal => Lesson::Again,
            Ordering::Greater => Lesson::Done,
        }
    }

    /// Whether nothing is to be guessed of an instruction.
    pub(super) fn is_mixed(&self, instruction: u64) -> bool {
        self.0.get(&instruction).is_some_and(|&times| times >= LESSONS)
    }
}

impl Dbt {
    /// A group's check failed, or an operand was not where it was guessed to be when the instruction at
    /// RIP was translated for a window.  Whether a link is to be made: that was not for the first time.
    pub(super) fn learn(&mut self, core: &mut Core) -> bool {
        let mode = mode_key(core).filter(|mode| relies_on_stack(*mode));
        let (Some(entry), Some(mode)) = (fetchable(core, core.rip), mode) else { return true };
        let hpa = entry.hpa | (core.rip & PAGE_OFFSET);
        let lesson = self.tools.places.learn(hpa);
        if lesson == Lesson::Again {
            self.invalidate_for(core, hpa, 1, |key| key.mode == mode);
        }
        lesson == Lesson::Done
    }
}

/// What 8 bytes of memory are, if the program can read them now without a walk.
pub(super) fn peek(core: &Core, gva: u64) -> Option<u64> {
    let entry = core.tlb.lookup(gva >> 12)?;
    let is_readable = entry.perm & perm::SPECIAL == 0 && core.allows(entry, Access::Read);
    let offset = gva & PAGE_OFFSET;
    (is_readable && offset <= PAGE_OFFSET - 7).then(|| core.mem.load(entry.hpa | offset, 8))
}
