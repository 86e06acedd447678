//! A loop that is one block: all rounds but the first.
//!
//! A block begins with nothing known of registers, and with the flags in the record.  Of one that
//! ends with a jump to its own head there is a second translation, for all rounds but the first.  It
//! begins with what the first one has proved of registers ([`super::facts`]), and with flags that can be made
//! from them: a loop whose flags nobody reads records none, and checks bases that do not change but once.
//! Whoever has to leave at its head records the flags then.

use iced_x86::Instruction;

use super::facts::Facts;
use super::flags::Flags;
use super::groups::MAX_GROUPS;
use super::translate::Translator;

/// Longest block of which there are two.
const MOST: usize = 40;

/// How a later round begins.
#[derive(Clone, Copy)]
pub(super) struct Begin {
    flags: Flags,
    facts: Facts,
}

/// What is known of rounds so far.
#[derive(Default)]
pub(super) struct Rounds {
    /// The block is such a loop.
    is_loop: bool,
    /// In the first: the jump at its end, and how the others begin.
    back: Option<(usize, Begin)>,
    /// In the others: their host address, and how they begin.
    later: Option<(u64, Begin)>,
}

impl Rounds {
    /// Of a block that begins at `rip`.
    pub fn of(insns: &[Instruction], rip: u64) -> Self {
        let leads_back = |i: &Instruction| i.is_jcc_short_or_near() && i.near_branch_target() == rip;
        let is_loop = insns.len() <= MOST && insns.last().is_some_and(leads_back);
        Self { is_loop, ..Self::default() }
    }
}

impl Translator<'_> {
    /// Begin another round if a condition of the computer's flags holds, at the end of one; false: it is not
    /// such a loop, or does not end as it has to begin.
    pub(super) fn go_round(&mut self, target: u64, cc: u8) -> bool {
        if !self.rounds.is_loop || target != self.rip {
            return false;
        }
        let begin = Begin { flags: Flags { live: false, ..self.flags }, facts: self.facts.at_round() };
        match self.rounds.later {
            None => self.rounds.back = Some((self.a.jcc_later(cc), begin)),
            Some((head, b)) if b.flags == begin.flags && begin.facts.cover(&b.facts) => self.a.jcc(cc, head),
            Some(_) => return false,
        }
        true
    }

    /// Behind the first round: begin the others, if there are any.
    pub(super) fn begin_later_rounds(&mut self) -> bool {
        let Some((branch, begin)) = self.rounds.back.take() else { return false };
        let head = self.a.here();
        self.a.patch(branch, head);
        self.rounds.later = Some((head, begin));
        (self.flags, self.facts) = (begin.flags, begin.facts);
        self.how_at_head = None;
        self.index = 0;
        self.ready = [false; MAX_GROUPS];
        self.t0_group = None;
        self.enter();
        true
    }
}
