//! Windows: what the TLB holds of a space, mapped by the computer's own page tables.
//!
//! A window is addresses of this process that stand for a program's linear ones, in one or several
//! pieces, and guards around them.  Generated code of that program accesses memory there as it is,
//! without a look at the first level.
//!
//! * Of a 32-bit program: 4 GBytes.  Whatever it computes lies in them, so it cannot leave.
//! * Of a 64-bit program: the two arenas in which Linux places what is position-independent
//!   ([`HIGH`]), both at the same distance, and for a program that is not so the lowest one
//!   ([`LOW`]).  One window of a process has that *near*: so low that its distance is part of a
//!   displacement; the others have it *far*, anywhere, and load its distance.  Generated code makes sure
//!   that a base lies in an arena ([`crate::dbt`]); what is added to it leads no further than into a guard.
//!
//! Invariants: a page of a window leads to memory only while [`super::tlb::Tlb`] holds the page's
//! translation for the window's owner, and can be written only while the entry is dirty, nobody holds
//! translations of code there, and the frame has its dirty mark: as the first level, of which it is
//! another form.  So no access goes another way than it would without windows, and every count stays.
//! Nothing is ever mapped in a guard.
//!
//! Filling a page costs some microseconds, a hundred times what the first level costs: windows are
//! for programs that compute (see [`crate::dbt`]).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};

use crate::addr::{AddressMap, FRAME_BYTES};
use crate::dbt::reserved::Reserved;
use crate::mem::Memory;

/// Bytes of a 32-bit program's window.
pub const WINDOW_BYTES: u64 = 1 << 32;
/// Bytes of a page.
const BYTES: usize = FRAME_BYTES as usize;
/// Bytes behind it: more than any operand has.
const GUARD_BYTES: u64 = 1 << 16;

/// log2 of the bytes of an arena.
pub const ARENA_SHIFT: u32 = 42;
/// The numbers of the two arenas: position-independent programs and what they allocate; libraries,
/// mappings and stacks.
pub const HIGH: [u64; 2] = [0x15, 0x1F];
/// The number of the lowest arena.
pub const LOW: u64 = 0;
/// Bytes around an arena: more than a base near it, an index of 32 bits and a displacement make up.
const ARENA_GUARD: u64 = 64 << 30;
/// Where in this process the lower of the high arenas may be, in steps of 2 to the power 36.  (So none is
/// where programs themselves are, and none overlaps another: an arena with its guards is 66 steps, the
/// other one is 640 steps away.)
const PLACES: [u64; 9] = [68, 134, 200, 266, 332, 398, 464, 530, 596];

/// Displacements from a base in the lowest arena go so far down at most.
pub const LOW_BEFORE: u64 = 64 << 20;
/// Where in this process it may be near: so low that its address and a displacement are one of 32 bits.
const LOW_PLACES: [u64; 5] = [0x3C00_0000, 0x3400_0000, 0x2C00_0000, 0x2400_0000, 0x1C00_0000];
/// Where it is near, once there was one.
static LOW_PLACE: AtomicU64 = AtomicU64::new(0);

/// Windows of one processor.
const MOST: usize = 4;
/// Changes of spaces after which a window that was not used gives others the lowest arena near.
const IDLE: u64 = 8;
/// Pages of one window; when it has as many, it is emptied.
const PAGES: usize = 24_576;
/// Pages of all windows of this process: each may need two of the mappings that the operating system
/// counts (65,530).
const PAGES_OF_ALL: usize = 30_000;

static MAPPED: AtomicUsize = AtomicUsize::new(0);
/// Windows there are.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// A processor found no place for a window: whoever has several gives one back.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Whose translations a window has: the numbers of a space, and the rules (see `Tlb::own_l1`).
pub type Owner = (u32, u32, u128);

struct Page {
    hpa: u64,
    is_writable: bool,
}

/// For whom a window is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A 32-bit program.
    Bits32,
    /// A 64-bit program.
    High,
    /// A 64-bit program that uses the lowest arena, too.
    Low,
}

impl Kind {
    /// Whether it is for 32-bit programs.
    #[must_use]
    pub fn is_32(self) -> bool {
        self == Self::Bits32
    }
}

/// A range of linear addresses, and where it is in this process.
struct Piece {
    first: u64,
    bytes: u64,
    /// Bytes of guard before it.
    before: u64,
    place: Reserved,
}

impl Piece {
    /// Of the lowest addresses, somewhere, with guards.
    fn new(bytes: u64, [before, behind]: [u64; 2]) -> io::Result<Self> {
        let place = Reserved::new((before + bytes + behind) as usize)?;
        Ok(Self { first: 0, bytes, before, place })
    }

    /// At an address of this process, with guards.
    fn at(first: u64, bytes: u64, address: u64, [before, behind]: [u64; 2]) -> io::Result<Self> {
        let place = Reserved::at(address - before, (before + bytes + behind) as usize)?;
        Ok(Self { first, bytes, before, place })
    }

    /// Where its first linear address is in this process.
    fn address(&self) -> u64 {
        self.place.base() + self.before
    }

    /// Where the page at a linear address is, from the first of its addresses on.
    fn offset(&self, gva: u64) -> Option<usize> {
        let at = gva.wrapping_sub(self.first);
        (at < self.bytes).then_some((at + self.before) as usize)
    }

    /// The linear address that an address of this process stands for.
    fn linear(&self, host: u64) -> Option<u64> {
        let at = host.wrapping_sub(self.address());
        (at < self.bytes).then(|| self.first + at)
    }
}

/// Two arenas at the same distance from where the program has them.
fn high() -> io::Result<Vec<Piece>> {
    let distance = |place: u64| (HIGH[0] << ARENA_SHIFT) - (place << 36);
    let arena = |number: u64, place: u64| {
        let first = number << ARENA_SHIFT;
        Piece::at(first, 1 << ARENA_SHIFT, first - distance(place), [ARENA_GUARD; 2])
    };
    let pair = |place: u64| Ok(vec![arena(HIGH[0], place)?, arena(HIGH[1], place)?]);
    let none = Err(io::ErrorKind::OutOfMemory.into());
    PLACES.into_iter().map(pair).find(io::Result::is_ok).unwrap_or(none)
}

/// The lowest arena, near if nobody has it there.
fn low() -> io::Result<Piece> {
    near().or_else(|_| Piece::new(1 << ARENA_SHIFT, [LOW_BEFORE, ARENA_GUARD]))
}

fn near() -> io::Result<Piece> {
    let at = |place: u64| Piece::at(0, 1 << ARENA_SHIFT, place, [LOW_BEFORE, ARENA_GUARD]);
    let known = LOW_PLACE.load(Acquire);
    if known != 0 {
        return at(known);
    }
    let none = Err(io::ErrorKind::OutOfMemory.into());
    let found = LOW_PLACES.into_iter().map(at).find(io::Result::is_ok).unwrap_or(none)?;
    let place = found.place.base() + LOW_BEFORE;
    match LOW_PLACE.compare_exchange(0, place, AcqRel, Acquire) {
        Ok(_) => Ok(found),
        Err(other) if other == place => Ok(found),
        Err(_) => Err(io::ErrorKind::OutOfMemory.into()),
    }
}

/// Where the lowest arena is in this process, if a window has it near: this never changes.
#[must_use]
pub fn low_place() -> u64 {
    LOW_PLACE.load(Acquire)
}

/// Whether an address is in one of the high arenas.
#[inline]
#[must_use]
pub fn is_high(gva: u64) -> bool {
    HIGH.contains(&(gva >> ARENA_SHIFT))
}

/// Whether an address is in the lowest one.
#[inline]
#[must_use]
pub fn is_low(gva: u64) -> bool {
    gva >> ARENA_SHIFT == LOW
}

/// Whether a stack pointer is in the arena of stacks.
#[inline]
#[must_use]
pub fn is_stack(gva: u64) -> bool {
    gva >> ARENA_SHIFT == HIGH[1]
}

struct Window {
    pieces: Vec<Piece>,
    owner: Owner,
    used: u64,
    pages: AddressMap<u64, Page>,
    so_far: Use,
}

/// What a window was used for.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// For whom it is.
    pub kind: Kind,
    /// Instructions that its space has run.
    pub ran: u64,
    /// Pages that are mapped.
    pub held: usize,
    /// Accesses that were in none of its arenas.
    pub strayed: u64,
}

/// The windows of one processor.
#[derive(Default)]
pub struct Windows {
    all: Vec<Window>,
    current: Option<usize>,
    clock: u64,
    /// The computer gave no addresses, though nobody had any: it is not asked again.
    is_refused: bool,
    /// A page that the program will access when its fault has been handled, and whether it writes.
    pub awaited: Option<(u64, bool)>,
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
    /// Accesses that were not in the window's arenas.
    pub strayed: u64,
}

impl Window {
    fn new(kind: Kind, owner: Owner) -> io::Result<Self> {
        let pieces = match kind {
            Kind::Bits32 => vec![Piece::new(WINDOW_BYTES, [0, GUARD_BYTES])?],
            Kind::High => high()?,
            Kind::Low => {
                let mut pieces = high()?;
                pieces.push(low()?);
                pieces
            }
        };
        let so_far = Use { kind, ran: 0, held: 0, strayed: 0 };
        HELD.fetch_add(1, Relaxed);
        Ok(Self { so_far, pieces, owner, used: 0, pages: AddressMap::default() })
    }

    /// What generated code's operands are counted from.
    fn base(&self) -> u64 {
        let first = &self.pieces[0];
        first.address().wrapping_sub(first.first)
    }

    /// Where the lowest arena is, if it has that.
    fn low(&self) -> Option<u64> {
        let last = self.pieces.last().filter(|_| self.so_far.kind == Kind::Low);
        last.map(Piece::address)
    }

    fn place(&self, vpn: u64) -> Option<(&Reserved, usize)> {
        self.pieces.iter().find_map(|p| Some((&p.place, p.offset(vpn << 12)?)))
    }

    fn map(&mut self, vpn: u64, page: Page, mem: &Memory) -> bool {
        let Some((place, at)) = self.place(vpn) else { return false };
        let is_mapped = place.show(at, mem, page.hpa, page.is_writable);
        if is_mapped && self.pages.insert(vpn, page).is_none() {
            MAPPED.fetch_add(1, Relaxed);
        }
        is_mapped
    }

    fn protect(&mut self, mut which: impl FnMut(u64) -> bool) {
        let Self { pages, pieces, .. } = self;
        for (&vpn, page) in pages.iter_mut().filter(|(_, p)| p.is_writable) {
            if which(page.hpa) {
                page.is_writable = false;
                for piece in &*pieces {
                    piece.offset(vpn << 12).into_iter().for_each(|at| piece.place.protect(at));
                }
            }
        }
    }

    /// Drop one page; whether it was there.
    fn drop_page(&mut self, vpn: u64) -> bool {
        let was_there = self.pages.remove(&vpn).is_some();
        if was_there {
            MAPPED.fetch_sub(1, Relaxed);
            if let Some((place, at)) = self.place(vpn) {
                place.hide(at, BYTES);
            }
        }
        was_there
    }

    /// Drop all pages; how many there were.
    fn empty(&mut self) -> u64 {
        let count = self.pages.len();
        if count > 0 {
            self.pieces.iter().for_each(|p| p.place.hide(p.before as usize, p.bytes as usize));
            self.pages.clear();
            MAPPED.fetch_sub(count, Relaxed);
        }
        count as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.pages.len(), Relaxed);
        HELD.fetch_sub(1, Relaxed);
    }
}

/// The current space's window, as generated code has to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Current {
    /// What operands are counted from.
    pub base: u64,
    /// For whom it is.
    pub kind: Kind,
    /// Where the lowest arena is, if the window has it.
    pub low: Option<u64>,
}

impl Current {
    /// Whether the distance of the lowest arena has to be loaded.
    #[must_use]
    pub fn is_far(&self) -> bool {
        self.low.is_some_and(|low| low != low_place())
    }
}

impl Windows {
    /// The current space's window, if it has one.
    #[inline]
    #[must_use]
    pub fn current(&self) -> Option<Current> {
        self.current.map(|i| &self.all[i]).map(|w| Current {
            base: w.base(),
            kind: w.so_far.kind,
            low: w.low(),
        })
    }

    /// What the current window was used for, with so many instructions more.
    pub fn used(&mut self, ran: u64) -> Option<Use> {
        let Window { so_far, pages, .. } = &mut self.all[self.current?];
        so_far.ran += ran;
        Some(Use { held: pages.len(), ..*so_far })
    }

    /// An access was in none of the current window's arenas.
    pub fn note_stray(&mut self) {
        let Some(i) = self.current else { return };
        self.all[i].so_far.strayed += 1;
        self.counts.strayed += 1;
    }

    /// The page of the current window that an address of this process stands for.
    #[must_use]
    pub fn page_at(&self, host: u64) -> Option<u64> {
        let window = &self.all[self.current?];
        window.pieces.iter().find_map(|p| p.linear(host)).map(|gva| gva >> 12)
    }

    /// Another space is the current one, or other rules hold.
    pub fn select(&mut self, owner: Owner) {
        self.current = self.all.iter().position(|w| w.owner == owner);
        self.clock += 1;
        if let Some(i) = self.current {
            self.all[i].used = self.clock;
        }
        if self.all.len() > 1 && WANTED.load(Relaxed) && WANTED.swap(false, Relaxed) {
            self.give();
        }
    }

    /// Give back the windows of spaces that are no more.
    pub fn keep(&mut self, is_alive: impl Fn(&Owner) -> bool) {
        self.remove(|w| !is_alive(&w.owner));
    }

    /// Give the window back that was not used for longest.
    fn give(&mut self) {
        let last = self.all.iter().map(|w| w.used).min();
        self.remove(|w| Some(w.used) == last);
    }

    /// Give the current space a window of this kind instead of what it has; whether it has one now.
    pub fn open(&mut self, owner: Owner, kind: Kind) -> bool {
        let now = self.clock;
        let is_idle = |w: &Window| w.low() == Some(low_place()) && now - w.used > IDLE;
        self.remove(|w| w.owner == owner || kind == Kind::Low && is_idle(w));
        if self.all.len() >= MOST {
            self.give();
        }
        if self.is_refused {
            return false;
        }
        let Ok(window) = Window::new(kind, owner) else {
            let is_any = HELD.load(Relaxed) > 0;
            self.is_refused = !is_any;
            WANTED.store(is_any, Relaxed);
            return false;
        };
        self.all.push(window);
        self.counts.opened += 1;
        self.select(owner);
        true
    }

    /// Take the current space's window back.
    pub fn close_current(&mut self, owner: Owner) {
        self.remove(|w| w.owner == owner);
    }

    /// Give windows back; there is no current one then if that is among them.
    fn remove(&mut self, which: impl Fn(&Window) -> bool) {
        let owner = self.current.map(|i| self.all[i].owner);
        for window in self.all.iter_mut().filter(|w| which(w)) {
            self.counts.dropped += window.empty();
        }
        self.all.retain(|w| !which(w));
        self.current = self.all.iter().position(|w| Some(w.owner) == owner);
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
        assert!(w.current().is_none() && w.open((1, 2, 3), Kind::Bits32));
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
            assert!(w.open((space, 0, 0), Kind::Bits32));
            w.fill(0, 0x1000, true, &mem);
        }
        w.select((1, 0, 0));
        assert!(w.open((9, 0, 0), Kind::Bits32));
        w.select((2, 0, 0));
        assert!(w.current().is_none());
        w.select((1, 0, 0));
        assert!(w.current().is_some());
        assert_eq!(1, w.counts.dropped);
    }

    #[test]
    fn a_window_is_given_back_with_its_space() {
        let mut w = Windows::default();
        for space in 1..=3 {
            assert!(w.open((space, 0, 0), Kind::Bits32));
        }
        w.keep(|&(space, ..)| space != 1);
        assert!(w.all.len() == 2 && w.current().is_some());
        w.keep(|&(space, ..)| space != 3);
        assert!(w.all.len() == 1 && w.current().is_none());
    }

    #[test]
    fn a_program_of_64_bits_has_its_arenas() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut w = Windows::default();
        assert!(w.open((1, 0, 0), Kind::Low));
        let (base, low) = (w.current().unwrap().base, low_place());
        let pages =
            [(0x5555_5555_4000, base), (0x7FFF_FFFF_F000, base), (0x40_1000, low), (0xC0_0000_0000, low)];
        for (gva, distance) in pages {
            w.fill(gva >> 12, 0x3000, true, &mem);
            assert_eq!(Some(gva >> 12), w.page_at(distance.wrapping_add(gva) | 0xFFF));
        }
        assert_eq!(pages.len() as u64, w.counts.filled);
        w.fill(0x6000_0000_0000 >> 12, 0x3000, true, &mem); // in neither
        assert_eq!(pages.len() as u64, w.counts.filled);
        assert_eq!(None, w.page_at(base.wrapping_add(0x6000_0000_0000)));
        // Nobody else has the lowest arena near while it does; then somebody may.
        let mut other = Windows::default();
        assert!(other.open((1, 0, 0), Kind::Low) && other.current().unwrap().is_far());
        let far = other.current().unwrap().low.unwrap();
        other.fill(0x40_1000 >> 12, 0x3000, true, &mem);
        assert_eq!(Some(0x401), other.page_at(far + 0x40_1FFF));
        w.close();
        assert!(other.open((1, 0, 0), Kind::Low) && !other.current().unwrap().is_far());
    }

    #[test]
    fn what_others_hold_is_left_to_be_read() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut w = Windows::default();
        assert!(w.open((1, 0, 0), Kind::Bits32));
        w.fill(4, 0x1000, true, &mem);
        w.protect_where(|hpa| hpa == 0x1000);
        assert!(!w.all[0].pages[&4].is_writable);
    }
}
