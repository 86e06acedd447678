//! The APIC timer (SDM 3A, "APIC Timer"): one-shot, periodic, TSC-deadline.
//!
//! The count is never kept, only when it ends: the current count follows from the time left.

use super::{LocalApic, lvt};

/// Timer modes, bits 18:17 of its LVT entry.
mod mode {
    pub const PERIODIC: u32 = 1;
    pub const DEADLINE: u32 = 2;
}

pub(super) const WORDS: usize = 3;

/// The timer's own state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    /// The initial-count register.
    initial: u32,
    /// The divide-configuration register.
    divide: u32,
    /// The TSC at which it ends (or IA32_TSC_DEADLINE); `u64::MAX`: not armed.
    end: u64,
}

impl Default for Timer {
    fn default() -> Self {
        Self { initial: 0, divide: 0, end: u64::MAX }
    }
}

impl Timer {
    pub(super) fn to_words(self) -> [u64; WORDS] {
        [u64::from(self.initial), u64::from(self.divide), self.end]
    }

    pub(super) fn from_words(words: &[u64]) -> Option<Self> {
        let [initial, divide, end] = words else { return None };
        let divide = u32::try_from(*divide).ok().filter(|d| d & !0xB == 0)?;
        Some(Self { initial: u32::try_from(*initial).ok()?, divide, end: *end })
    }

    /// log2 of the ticks that one count takes.
    fn shift(self) -> u32 {
        ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7
    }

    /// Counts left at `now`, a begun one counting.
    fn left(self, now: u64) -> u64 {
        if self.end == u64::MAX { 0 } else { self.end.saturating_sub(now).div_ceil(1 << self.shift()) }
    }

    fn arm(&mut self, now: u64, counts: u64) {
        self.end =
            if counts == 0 { u64::MAX } else { now.saturating_add(counts << self.shift()).min(u64::MAX - 1) };
    }
}

impl LocalApic {
    fn timer_mode(&self) -> u32 {
        self.lvt[lvt::TIMER] >> 17 & 3
    }

    fn is_deadline_mode(&self) -> bool {
        self.timer_mode() == mode::DEADLINE
    }

    /// The TSC at which [`LocalApic::tick`] must next be called; `u64::MAX` if never.
    ///
    /// A masked timer runs, too, but nobody can tell before the next access, which is a tick.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        if self.lvt[lvt::TIMER] & lvt::MASKED == 0 { self.timer.end } else { u64::MAX }
    }

    /// Let the timer act on the time that has passed.
    pub fn tick(&mut self, now: u64) {
        let t = self.timer;
        if t.end > now || t.end == u64::MAX {
            return;
        }
        let period = u64::from(t.initial) << t.shift();
        self.timer.end = if self.timer_mode() == mode::PERIODIC && period > 0 {
            // The periods that nobody looked at are one interrupt: IRR holds one a vector.
            let missed = (now - t.end) / period;
            t.end.saturating_add((missed + 1).saturating_mul(period)).min(u64::MAX - 1)
        } else {
            u64::MAX
        };
        let entry = self.lvt[lvt::TIMER];
        if entry & lvt::MASKED == 0 {
            self.raise_vector(entry as u8, false);
        }
    }

    pub(super) fn set_timer_entry(&mut self, value: u32) {
        let was = self.timer_mode();
        self.lvt[lvt::TIMER] = value;
        // "Transitioning between TSC-deadline mode and other timer modes also disarms the timer."
        if (was == mode::DEADLINE) != self.is_deadline_mode() {
            self.timer.end = u64::MAX;
        }
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.timer.initial
    }

    pub(super) fn set_initial_count(&mut self, value: u32, now: u64) {
        if !self.is_deadline_mode() {
            self.timer.initial = value;
            self.timer.arm(now, u64::from(value));
        }
    }

    pub(super) fn current_count(&self, now: u64) -> u32 {
        if self.is_deadline_mode() { 0 } else { self.timer.left(now).min(u64::from(u32::MAX)) as u32 }
    }

    pub(super) fn divide(&self) -> u32 {
        self.timer.divide
    }

    pub(super) fn set_divide(&mut self, value: u32, now: u64) {
        let left = if self.is_deadline_mode() { 0 } else { self.timer.left(now) };
        self.timer.divide = value & 0xB;
        if left > 0 {
            self.timer.arm(now, left);
        }
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        if self.is_deadline_mode() && self.timer.end != u64::MAX { self.timer.end } else { 0 }
    }

    pub(super) fn set_tsc_deadline(&mut self, value: u64, now: u64) {
        if self.is_deadline_mode() {
            self.timer.end = if value == 0 { u64::MAX } else { value };
            self.tick(now);
        }
    }
}
