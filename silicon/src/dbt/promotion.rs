//! Which spaces get a window ([`crate::mmu::window`]), and when.
//!
//! Filling a page of a window costs what tens of thousands of instructions cost; a window saves some
//! of a program's instructions, and what the first level does not have.  So each program has an account
//! of both, by its page tables' address: it gets a window when it has run for a while without a change of its
//! space, and loses it when its pages have cost much more than it saved; the while doubles then.  A
//! window that has not what the program uses is given up for one that has, or for none.  Nothing of it
//! can be seen by the guest, or counted but as what the engine did.

use crate::addr::{AddressMap, PAGE_OFFSET};
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

/// Instructions that a space executes before it gets a window.
const PATIENCE: u64 = 1_000_000;
/// What a program has to have saved before it gets a window, in instructions: at least, at most.
const PRICE: (i64, i64) = (PATIENCE as i64 / SHARE, 1 << 26);
/// A window saves one of so many instructions.
const SHARE: i64 = 8;
/// What it costs to fill a page, in instructions.
const PAGE: i64 = 20_000;
/// What a page costs that the first level does not have, in instructions.
const MISS: i64 = 80;
/// What a program may owe for pages that its window has lost.
const DEBT: i64 = 512 * PAGE;
/// Misses are counted for so many instructions.
const RATE: i64 = 1 << 16;
/// Programs that have an account, before all are forgotten.
const MOST_ACCOUNTS: usize = 256;
/// Instructions for which an access beside a window's arenas does not matter.
const STRAY_WORTH: u64 = 30_000;
/// Accesses beside a window's arenas that say that it is not the right one.
const STRAYS: u64 = 64;

/// What windows have saved a program, and cost it.
#[derive(Clone, Copy, Debug)]
struct Account {
    /// In instructions, since the last window was opened or lost; less than 0: it owes them.
    saved: i64,
    /// What it must have saved before it gets one again: twice as much after one that was lost, with its
    /// space perhaps, before it had paid for its pages; half as much after another.
    price: i64,
    has_window: bool,
    /// Misses of the first level in `RATE` instructions without one.
    misses: i64,
}

/// What is known of programs, and of the current space.
#[derive(Debug)]
pub struct Promotion {
    windows: Windows,
    is_possible: bool,
    accounts: AddressMap<u64, Account>,
    /// Whose windows' pages were filled last, and all that were.
    filler: (u64, u64),
    /// Instructions retired when the space became the current one, or a window was refused or taken.
    since: u64,
    /// Instructions retired, and misses, when that was last looked at.
    seen: (u64, u64),
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
        let accounts = AddressMap::default();
        Self {
            windows: Windows::Auto,
            is_possible: is_possible(),
            accounts,
            filler: (0, 0),
            since: 0,
            seen: (0, 0),
        }
    }
}

impl Promotion {
    /// Who gets windows from now on; the present ones are closed.
    pub fn set(&mut self, core: &mut Core, windows: Windows) {
        self.windows = windows;
        core.tlb.windows.close();
    }

    /// Another space is the current one, and so often the first level had not what was accessed.
    pub fn begin(&mut self, core: &Core, misses: u64) {
        self.since = core.retired();
        self.seen = (self.since, misses);
    }

    /// Give the program that runs a window if it is time, or take it.
    pub fn consider(&mut self, core: &mut Core, misses: u64) {
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
        let now = (core.retired(), misses);
        let before = std::mem::replace(&mut self.seen, now);
        let ran = now.0.wrapping_sub(before.0);
        let missed = now.1.wrapping_sub(before.1) as i64;
        if self.accounts.len() >= MOST_ACCOUNTS {
            self.accounts.clear();
        }
        let program = core.cr3 & !PAGE_OFFSET;
        let filled = core.tlb.windows.counts.filled;
        let filler = std::mem::replace(&mut self.filler, (program, filled));
        if let Some(account) = self.accounts.get_mut(&filler.0) {
            account.saved -= (filled - filler.1) as i64 * PAGE;
        }
        let none = Account { saved: 0, price: PRICE.0, has_window: false, misses: 0 };
        let account = self.accounts.entry(program).or_insert(none);
        if let Some(u) = core.tlb.windows.used(ran).filter(|u| u.kind.is_32() == kind.is_32()) {
            let ran = ran as i64;
            account.saved += ran / SHARE + ran * account.misses / RATE * MISS;
            self.reconsider(core, program, u);
            return;
        }
        if std::mem::take(&mut account.has_window) {
            account.settle();
        }
        account.count(ran as i64, missed);
        let is_time = now.0.wrapping_sub(self.since) >= PATIENCE && account.saved >= account.price;
        if is_time || self.windows == Windows::Always {
            account.has_window = core.tlb.open_window(kind);
            (account.saved, self.since) = (0, now.0); // (others may have all there are)
        }
    }

    /// Whether the program's window is the right one, and worth its pages.
    fn reconsider(&mut self, core: &mut Core, program: u64, u: Use) {
        let is_strange = u.strayed >= STRAYS && u.strayed > u.ran / STRAY_WORTH;
        if u.strayed >= STRAYS && u.kind == Kind::High && core.tlb.open_window(Kind::Low) {
            return;
        }
        let Some(account) = self.accounts.get_mut(&program) else { return };
        let is_dear = account.saved + u.held as i64 * PAGE < -DEBT && self.windows != Windows::Always;
        if is_strange || is_dear {
            core.tlb.close_window();
            self.since = core.retired();
            account.settle();
            account.has_window = false;
            if is_strange {
                account.price = PRICE.1;
            }
        }
    }
}

impl Account {
    /// The window is lost.
    fn settle(&mut self) {
        let has_paid = self.saved >= 0;
        self.price = if has_paid { self.price / 2 } else { self.price * 2 }.clamp(PRICE.0, PRICE.1);
        self.saved = 0;
    }

    /// The program has run without a window.
    fn count(&mut self, ran: i64, missed: i64) {
        if ran > 0 {
            let rate = missed * RATE / ran;
            let weight = ran.min(RATE);
            self.misses = (self.misses * (RATE - weight) + rate * weight) / RATE;
        }
        self.saved = (self.saved + ran / SHARE + missed * MISS).min(PRICE.1);
    }
}
