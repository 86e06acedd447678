//! Which spaces get a window ([`crate::mmu::window`]), and when.
//!
//! Filling a page of a window costs what tens of thousands of instructions cost.  So a program gets a
//! window when it has run for a while without a change of its space, and loses it when too many of its
//! pages are lost again; the while doubles then, and halves when a window has been worth its pages.  One
//! that has not what the program uses is given up for one that has, or for none.  Nothing of it can
//! be seen by the guest, or counted but as what the engine did.

use crate::cpu::state::{Core, Mode};
use crate::mmu::window::{self, Kind, Use};

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
const PATIENCE: (u64, u64) = (1_000_000, 1 << 30);
/// Instructions for which a page of a window is worth filling.
const PAGE_WORTH: u64 = 30_000;
/// Pages that are lost before anybody asks.
const FIRST_PAGES: u64 = 512;
/// Instructions after which a window has been worth its pages.
const PROVED: u64 = 64_000_000;
/// Accesses beside a window's arenas that say that it is not the right one.
const STRAYS: u64 = 64;

/// What is known of the current space.
#[derive(Debug)]
pub struct Promotion {
    windows: Windows,
    is_possible: bool,
    patience: u64,
    /// Instructions retired when the space became the current one, or a window was refused or taken.
    since: u64,
    /// Instructions retired when that was last looked at.
    seen: u64,
}

/// Whether the computer has RORX, which 64-bit programs' windows need.
fn has_rorx() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
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
        Self { windows: Windows::Auto, is_possible: is_possible(), patience: PATIENCE.0, since: 0, seen: 0 }
    }
}

impl Promotion {
    /// Who gets windows from now on; the present ones are closed.
    pub fn set(&mut self, core: &mut Core, windows: Windows) {
        self.windows = windows;
        core.tlb.windows.close();
    }

    /// Another space is the current one.
    pub fn begin(&mut self, core: &Core) {
        self.since = core.retired();
        self.seen = self.since;
    }

    /// Give the program that runs a window if it is time, or take it.
    pub fn consider(&mut self, core: &mut Core) {
        if core.cpl != 3 || !self.is_possible || self.windows == Windows::Never {
            return;
        }
        let kind = match core.mode {
            Mode::Bits32 => Kind::Bits32,
            Mode::Bits64 if !has_rorx() => return,
            Mode::Bits64 if window::is_low(core.rip) => Kind::Low,
            Mode::Bits64 => Kind::High,
            _ => return,
        };
        let now = core.retired();
        let ran = now.wrapping_sub(std::mem::replace(&mut self.seen, now));
        if let Some(u) = core.tlb.windows.used(ran).filter(|u| u.kind.is_32() == kind.is_32()) {
            self.reconsider(core, u);
            return;
        }
        let is_time = self.windows == Windows::Always || now.wrapping_sub(self.since) >= self.patience;
        if is_time && !core.tlb.open_window(kind) {
            self.since = now; // others have all there are
        }
    }

    /// Whether the program's window is the right one, and worth its pages.
    fn reconsider(&mut self, core: &mut Core, u: Use) {
        let worth = u.ran / PAGE_WORTH;
        if u.strayed >= STRAYS && u.kind == Kind::High && core.tlb.open_window(Kind::Low) {
            return;
        }
        let is_wrong = u.strayed >= STRAYS && u.strayed > worth;
        if is_wrong || u.dropped > FIRST_PAGES + worth && self.windows != Windows::Always {
            core.tlb.close_window();
            self.since = core.retired();
            self.patience = if is_wrong { PATIENCE.1 } else { (self.patience * 2).min(PATIENCE.1) };
        } else if u.ran >= PROVED && core.tlb.windows.note_proved() {
            self.patience = (self.patience / 2).max(PATIENCE.0);
        }
    }
}
