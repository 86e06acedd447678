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
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering::*};

use crate::addr::{AddressMap, FRAME_BYTES};
use crate::mem::Memory;

/// Bytes of a window.
pub const WINDOW_BYTES: usize = 1 << 32;
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
    base: NonNull<u8>,
    owner: Owner,
    used: u64,
    pages: AddressMap<u64, Page>,
}

// SAFETY: it owns its addresses.
unsafe impl Send for Window {}

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
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let base = unsafe {
            libc::mmap(ptr::null_mut(), WINDOW_BYTES + GUARD_BYTES, libc::PROT_NONE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, owner: (0, 0, 0), used: 0, pages: AddressMap::default() })
    }

    /// Let `bytes` from page `vpn` on lead nowhere.
    fn unmap(&self, vpn: u64, bytes: usize) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        debug_assert!(vpn as usize * FRAME_BYTES as usize + bytes <= WINDOW_BYTES);
        // SAFETY: inside our own addresses.
        let done = unsafe {
            let at = self.base.as_ptr().add(vpn as usize * FRAME_BYTES as usize);
            libc::mmap(at.cast(), bytes, libc::PROT_NONE, flags, -1, 0)
        };
        // (It needs no more mappings than there were.)
        assert!(done != libc::MAP_FAILED, "a window cannot be emptied");
    }

    fn map(&mut self, vpn: u64, page: Page, mem: &Memory) -> bool {
        let bytes = FRAME_BYTES as usize;
        if vpn as usize >= WINDOW_BYTES / bytes || !mem.contains(page.hpa, FRAME_BYTES) {
            return false;
        }
        let prot = libc::PROT_READ | if page.is_writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: a page inside our own addresses, of a memfd that the memory keeps open.
        let done = unsafe {
            let at = self.base.as_ptr().add(vpn as usize * bytes);
            libc::mmap(at.cast(), bytes, prot, flags, mem.fd(), page.hpa.cast_signed())
        };
        let is_mapped = done != libc::MAP_FAILED;
        if is_mapped && self.pages.insert(vpn, page).is_none() {
            MAPPED.fetch_add(1, Relaxed);
        }
        is_mapped
    }

    fn protect(&mut self, mut which: impl FnMut(u64) -> bool) {
        for (&vpn, page) in self.pages.iter_mut().filter(|(_, p)| p.is_writable) {
            if which(page.hpa) {
                page.is_writable = false;
                // SAFETY: one of our own pages.
                let done = unsafe {
                    let at = self.base.as_ptr().add(vpn as usize * FRAME_BYTES as usize);
                    libc::mprotect(at.cast(), FRAME_BYTES as usize, libc::PROT_READ)
                };
                assert!(done == 0, "a window's page cannot be protected");
            }
        }
    }

    /// Drop one page; whether it was there.
    fn drop_page(&mut self, vpn: u64) -> bool {
        let was_there = self.pages.remove(&vpn).is_some();
        if was_there {
            MAPPED.fetch_sub(1, Relaxed);
            self.unmap(vpn, FRAME_BYTES as usize);
        }
        was_there
    }

    /// Drop all pages; how many there were.
    fn empty(&mut self) -> u64 {
        let count = self.pages.len();
        if count > 0 {
            self.unmap(0, WINDOW_BYTES);
            self.pages.clear();
            MAPPED.fetch_sub(count, Relaxed);
        }
        count as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.pages.len(), Relaxed);
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.base.as_ptr().cast(), WINDOW_BYTES + GUARD_BYTES) };
    }
}

impl Windows {
    /// The address of the current space's window, if it has one.
    #[inline]
    #[must_use]
    pub fn current(&self) -> Option<u64> {
        self.current.map(|i| self.all[i].base.as_ptr() as u64)
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

    /// Drop every page.
    pub fn clear(&mut self) {
        self.counts.dropped += self.all.iter_mut().map(Window::empty).sum::<u64>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(base: u64, at: u64) -> u64 {
        // SAFETY: the tests read what they have mapped.
        unsafe { ptr::read_volatile((base + at) as *const u64) }
    }

    #[test]
    fn a_page_shows_its_frame_until_it_is_dropped() {
        let mem = Memory::new(1 << 20).unwrap();
        mem.store(0x3008, 8, 77);
        let mut w = Windows::default();
        assert!(w.current().is_none() && w.open((1, 2, 3)));
        w.fill(0xF_FFFF, 0x3000, false, &mem);
        assert_eq!(77, read(w.current().unwrap(), 0xFFFF_F008));
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
        assert_eq!(0, read(w.current().unwrap(), 0x4000));
    }
}
