//! Windows: what the TLB holds of a space, mapped by the computer's own page tables.
//!
//! A window is 4 GBytes of this process's addresses that stand for a 32-bit program's linear ones, and
//! a guard behind them.  Generated code of that program accesses memory there as it is, without a
//! look at the first level: whatever it computes lies in 4 GBytes, so it cannot leave.
//!
//! Invariants: a page of a window leads to memory only while [`super::tlb::Tlb`] holds the page's
//! translation for the window's owner, and can be written only while the entry is dirty, nobody holds
//! translations of code there, and the frame has its dirty mark: as the first level, of which it is
//! another form.  So no access goes another way than it would without windows, and every count stays.
//! Nothing is ever mapped in the guard.
//!
//! Filling a page costs some microseconds, a hundred times what the first level costs: windows are
//! for programs that compute (see [`crate::dbt`]).

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::*};

use crate::addr::{AddressMap, FRAME_BYTES};
use crate::dbt::reserved::Reserved;
use crate::mem::Memory;

/// Bytes of a window.
pub const WINDOW_BYTES: usize = 1 << 32;
/// Bytes of a page.
const BYTES: usize = FRAME_BYTES as usize;
/// Bytes behind it: more than any operand has.
const GUARD_BYTES: usize = 1 << 16;
/// Windows of one processor.
const MOST: usize = 4;
/// Pages of one window; when it has as many, it is emptied.
const PAGES: usize = 8192;
/// Pages of all windows of this process, whose mappings the operating system counts (65,530).
const PAGES_OF_ALL: usize = 32_768;

static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// Whose translations a window has: the numbers of a space, and the rules (see `Tlb::own_l1`).
pub type Owner = (u32, u32, u128);

struct Page {
    hpa: u64,
    is_writable: bool,
}

struct Window {
    place: Reserved,
    owner: Owner,
    used: u64,
    pages: AddressMap<u64, Page>,
}

/// The windows of one processor.
#[derive(Default)]
pub struct Windows {
    all: Vec<Window>,
    current: Option<usize>,
    clock: u64,
    /// The computer gave no addresses: it is not asked again.
    is_refused: bool,
    /// What was done.
    pub counts: Counts,
}

/// What was done with windows.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Windows given to spaces.
    pub opened: u64,
    /// Pages mapped.
    pub filled: u64,
    /// Pages unmapped.
    pub dropped: u64,
}

impl Window {
    fn new() -> io::Result<Self> {
        let place = Reserved::new(WINDOW_BYTES + GUARD_BYTES)?;
        Ok(Self { place, owner: (0, 0, 0), used: 0, pages: AddressMap::default() })
    }

    fn map(&mut self, vpn: u64, page: Page, mem: &Memory) -> bool {
        let is_inside = (vpn as usize) < WINDOW_BYTES / BYTES;
        let is_mapped = is_inside && self.place.show(vpn as usize * BYTES, mem, page.hpa, page.is_writable);
        if is_mapped && self.pages.insert(vpn, page).is_none() {
            MAPPED.fetch_add(1, Relaxed);
        }
        is_mapped
    }

    fn protect(&mut self, mut which: impl FnMut(u64) -> bool) {
        for (&vpn, page) in self.pages.iter_mut().filter(|(_, p)| p.is_writable) {
            if which(page.hpa) {
                page.is_writable = false;
                self.place.protect(vpn as usize * BYTES);
            }
        }
    }

    /// Drop one page; whether it was there.
    fn drop_page(&mut self, vpn: u64) -> bool {
        let was_there = self.pages.remove(&vpn).is_some();
        if was_there {
            MAPPED.fetch_sub(1, Relaxed);
            self.place.hide(vpn as usize * BYTES, BYTES);
        }
        was_there
    }

    /// Drop all pages; how many there were.
    fn empty(&mut self) -> u64 {
        let count = self.pages.len();
        if count > 0 {
            self.place.hide(0, WINDOW_BYTES);
            self.pages.clear();
            MAPPED.fetch_sub(count, Relaxed);
        }
        count as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.pages.len(), Relaxed);
    }
}

impl Windows {
    /// The address of the current space's window, if it has one.
    #[inline]
    #[must_use]
    pub fn current(&self) -> Option<u64> {
        self.current.map(|i| self.all[i].place.base())
    }

    /// Another space is the current one, or other rules hold.
    pub fn select(&mut self, owner: Owner) {
        self.current = self.all.iter().position(|w| w.owner == owner);
        if let Some(i) = self.current {
            self.clock += 1;
            self.all[i].used = self.clock;
        }
    }

    /// Give the current space, which has none, a window; whether there is one.
    pub fn open(&mut self, owner: Owner) -> bool {
        if self.all.len() < MOST && !self.is_refused {
            match Window::new() {
                Ok(window) => self.all.push(window),
                Err(_) => self.is_refused = true,
            }
        }
        let Some(i) = (0..self.all.len()).min_by_key(|&i| self.all[i].used) else { return false };
        self.counts.dropped += self.all[i].empty();
        self.all[i].owner = owner;
        self.counts.opened += 1;
        self.select(owner);
        true
    }

    /// Let page `vpn` of the current window lead to the frame at `hpa`.
    pub fn fill(&mut self, vpn: u64, hpa: u64, is_writable: bool, mem: &Memory) {
        let Some(i) = self.current else { return };
        let window = &mut self.all[i];
        if window.pages.len() >= PAGES || MAPPED.load(Relaxed) >= PAGES_OF_ALL {
            self.counts.dropped += window.empty();
        }
        self.counts.filled += u64::from(window.map(vpn, Page { hpa, is_writable }, mem));
    }

    /// Drop a page in spaces of these numbers.
    #[inline]
    pub fn drop_page(&mut self, vpn: u64, numbers: &[u32]) {
        for window in &mut self.all {
            if numbers.contains(&window.owner.0) || numbers.contains(&window.owner.1) {
                self.counts.dropped += u64::from(window.drop_page(vpn));
            }
        }
    }

    /// Take the right to write pages away: those at host-physical addresses for which `which` says so.
    pub fn protect_where(&mut self, mut which: impl FnMut(u64) -> bool) {
        self.all.iter_mut().for_each(|window| window.protect(&mut which));
    }

    /// Give all windows back.
    pub fn close(&mut self) {
        self.clear();
        self.all.clear();
        self.current = None;
    }

    /// Drop every page.
    pub fn clear(&mut self) {
        self.counts.dropped += self.all.iter_mut().map(Window::empty).sum::<u64>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_there_until_it_is_dropped() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut w = Windows::default();
        assert!(w.current().is_none() && w.open((1, 2, 3)));
        w.fill(0xF_FFFF, 0x3000, false, &mem);
        w.drop_page(0xF_FFFF, &[5]);
        assert_eq!((1, 0), (w.counts.filled, w.counts.dropped));
        w.drop_page(0xF_FFFF, &[5, 1]);
        assert_eq!((1, 1), (w.counts.filled, w.counts.dropped));
        w.fill(0x10_0000, 0x3000, false, &mem); // the guard
        w.fill(0, 1 << 20, false, &mem); // no memory
        assert_eq!(1, w.counts.filled);
    }

    #[test]
    fn the_window_that_was_not_used_for_longest_is_given_to_another_space() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut w = Windows::default();
        for space in 1..=MOST as u32 {
            assert!(w.open((space, 0, 0)));
            w.fill(0, 0x1000, true, &mem);
        }
        w.select((1, 0, 0));
        assert!(w.open((9, 0, 0)));
        w.select((2, 0, 0));
        assert!(w.current().is_none());
        w.select((1, 0, 0));
        assert!(w.current().is_some());
        assert_eq!(1, w.counts.dropped);
    }

    #[test]
    fn what_others_hold_is_left_to_be_read() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut w = Windows::default();
        assert!(w.open((1, 0, 0)));
        w.fill(4, 0x1000, true, &mem);
        w.protect_where(|hpa| hpa == 0x1000);
        assert!(!w.all[0].pages[&4].is_writable);
    }
}
