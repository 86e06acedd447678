//! Which spaces get a window ([`crate::mmu::window`]), and when.
//!
//! Filling a page of a window costs what tens of thousands of instructions cost, and a space that goes
//! takes its window's pages along.  So a 32-bit program gets a window when it has run for a while
//! without a change of its space; a while that doubles whenever a window was not worth its pages, and
//! halves whenever one was.  Nothing of it can be seen by the guest, or counted but as what the engine
//! did.

use crate::cpu::state::{Core, Mode};

/// Who gets windows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Windows {
    /// Programs that compute.
    #[default]
    Auto,
    /// Every program that can have one, at once.
    Always,
    /// Nobody.
    Never,
}

/// Instructions that a space executes before it gets a window: at least, at most.
const PATIENCE: (u64, u64) = (500_000, 64_000_000);
/// Instructions for which a page of a window is worth filling.
const PAGE_WORTH: u64 = 30_000;

/// What is known of the current space.
#[derive(Debug)]
pub struct Promotion {
    windows: Windows,
    is_possible: bool,
    patience: u64,
    /// Instructions retired when the space became the current one.
    since: u64,
    /// Instructions retired when it got its window, and pages filled by then.
    opened: Option<(u64, u64)>,
}

/// Whether the computer lets programs write the base of GS: FSGSBASE.
#[must_use]
pub fn is_possible() -> bool {
    const FSGSBASE: u64 = 2;
    // SAFETY: a query.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & FSGSBASE != 0 }
}

impl Default for Promotion {
    fn default() -> Self {
        Self {
            windows: Windows::Auto,
            is_possible: is_possible(),
            patience: PATIENCE.0,
            since: 0,
            opened: None,
        }
    }
}

impl Promotion {
    /// Who gets windows from now on; the present ones are closed.
    pub fn set(&mut self, core: &mut Core, windows: Windows) {
        self.windows = windows;
        self.opened = None;
        core.tlb.windows.close();
    }

    /// Another space is the current one.
    pub fn begin(&mut self, core: &Core) {
        let now = core.retired();
        self.since = now;
        let Some((then, filled)) = self.opened.take() else { return };
        let pages = core.tlb.windows.counts.filled - filled;
        let was_worth = now.wrapping_sub(then) / PAGE_WORTH > pages;
        let next = if was_worth { self.patience / 2 } else { self.patience * 2 };
        self.patience = next.clamp(PATIENCE.0, PATIENCE.1);
    }

    /// Give the program that runs a window if it is time.
    pub fn consider(&mut self, core: &mut Core) {
        let is_program = core.cpl == 3 && core.mode == Mode::Bits32;
        let is_asked = self.is_possible && self.windows != Windows::Never;
        if !is_program || !is_asked || core.tlb.windows.current().is_some() {
            return;
        }
        let now = core.retired();
        let is_time = self.windows == Windows::Always || now.wrapping_sub(self.since) >= self.patience;
        if is_time && core.tlb.open_window() {
            self.opened = Some((now, core.tlb.windows.counts.filled));
        }
    }
}
