//! The translation look-aside buffer: what software can observe of it, and the engine's first
//! level, which holds a subset of it in a form that generated code can look up.
//!
//! Entries are tagged with an *address-space number* (ASN), a stand-in for the combination of
//! VPID, EPT root and PCID; flushing a combination means giving it a new number.  Each has a
//! second number for its global translations.

use std::collections::HashSet;
use std::ops::Range;

use crate::addr::{AddressMap, FRAME_BYTES};
use crate::dbt::zeroed::{Vacant, Zeroed, build};
use crate::mmu::caches::Caches;
use crate::mmu::format::{IA32, LEVEL4, PAE};
use crate::mmu::window::{Kind, Windows};

/// Entries of the data TLB.
pub const ENTRIES: usize = 32768;
/// Entries in which a page's translations can be: as many programs' arrays can lie in any distance.
const WAYS: usize = 4;
/// Entries of each first-level table.
pub const L1_ENTRIES: usize = 4096;
/// So many filled entries of a first level are listed, to be emptied one by one; beyond that the
/// whole table is.
const L1_LISTED: usize = 512;
/// The parts of the first level.
const GLOBAL: usize = 0;
const LOCAL: usize = 1;
/// The engine's privilege classes: user, supervisor, supervisor with SMAP lifted.
pub const L1_CLASSES: usize = 3;
/// Instruction-side entries before all are dropped.
const FETCH_LIMIT: usize = 1 << 16;
/// Large pages, and spaces, known before all are forgotten: what a guest can make us remember.
const MEMORY_LIMIT: usize = 1 << 16;
/// log2 of the sizes of large pages, from the largest.
const LARGE_SHIFTS: [u8; 3] = [30, 22, 21];
/// So many numbers of a VPID's spaces are searched for one address; with more, the VPID goes.
const NUMBERS_SEARCHED: usize = 64;

/// What an entry allows and is.
pub mod perm {
    #![allow(missing_docs)]
    /// User-mode accesses allowed by the guest's tables.
    pub const US: u16 = 1 << 0;
    /// Writes allowed by the guest's tables.
    pub const RW: u16 = 1 << 1;
    /// Instruction fetches allowed by the guest's tables and the EPT.
    pub const X: u16 = 1 << 2;
    /// The dirty flags are set, and the EPT allows writes: writing needs no walk.
    pub const DIRTY: u16 = 1 << 3;
    /// Survives CR3 loads.
    pub const GLOBAL: u16 = 1 << 4;
    /// Not plain memory: an APIC page, or no memory at all.
    pub const SPECIAL: u16 = 1 << 5;
    /// From here on: the protection key, of four bits.
    pub const KEY_SHIFT: u32 = 8;
}

/// One translation of a 4-KByte page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// Linear page number.
    pub vpn: u64,
    /// Host-physical address of the page.
    pub hpa: u64,
    /// Address-space number; 0 is never in use.
    pub asn: u32,
    /// [`perm`] bits.
    pub perm: u16,
}

/// One place of the engine's first level: half a cache line, so that a hit touches one line.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub struct Place {
    /// Minus the page address readable through `host`, or minus an address with another index:
    /// the sum with an address is below 4096 only on a hit.
    pub read: u64,
    /// The same for writing.
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
}

/// log2 of the bytes of a [`Place`].
pub const PLACE_SHIFT: u32 = size_of::<Place>().trailing_zeros();

/// What place `i` of an empty first level has for a tag: minus an address with another index.  That
/// is 0, which needs no writing, for all but the first.
const fn nothing(i: usize) -> u64 {
    if i == 0 { FRAME_BYTES.wrapping_neg() } else { 0 }
}

/// What place `i` of an empty first level is.
const fn empty(i: usize) -> Place {
    Place { read: nothing(i), write: nothing(i), host: 0 }
}

/// One privilege class of the engine's first level.
pub type L1 = [Place; L1_ENTRIES];

/// The entries in which a page's translations can be.
fn set_of(vpn: u64) -> Range<usize> {
    let first = vpn as usize % (ENTRIES / WAYS) * WAYS;
    first..first + WAYS
}

/// The TLB of one processor.
#[repr(C)]
pub struct Tlb {
    /// First levels by class.
    pub l1: [L1; L1_CLASSES],
    /// Its filled places: of global translations, and of the others.
    l1_used: [[Vec<u16>; L1_CLASSES]; 2],
    l1_owner: (u32, u32, u128),
    entries: Zeroed<Entry>,
    fetch: AddressMap<(u64, u32), Entry>,
    /// Large pages that have pieces here: log2 of the size, number of the page.
    large: HashSet<(u8, u64)>,
    numbers: AddressMap<(u16, u64, u16), u32>,
    globals: AddressMap<(u16, u64), u32>,
    /// An EPT root of each VPID, and whether one VPID was seen with two.
    roots: AddressMap<u16, u64>,
    has_two_roots: bool,
    last: u32,
    /// The selected space, while it has its numbers.
    current: Option<(u16, u64, u16)>,
    /// The current space's number.
    pub asn: u32,
    /// The current space's number for global translations.
    pub global_asn: u32,
    /// Translations of other pages that made room for new ones.
    pub displaced: u64,
    /// Grows whenever an instruction-side translation vanished within a space; engines compare
    /// it, `asn` and `global_asn` with what their own shortcuts rely on.
    pub fetch_epoch: u64,
    /// What shortens the walks after a miss; off by default.
    pub caches: Caches,
    /// The first level in another form.
    pub windows: Windows,
}

impl Tlb {
    /// An empty TLB.
    ///
    /// # Errors
    /// If the computer gives no addresses.
    #[must_use]
    pub fn build(place: Vacant<'_, Tlb>, entries: Zeroed<Entry>) -> &mut Tlb {
        let tlb = build!(place, Tlb {
            l1_used: Default::default(),
            l1_owner: (0, 0, 0),
            entries: entries,
            fetch: AddressMap::default(),
            large: HashSet::new(),
            numbers: AddressMap::default(),
            globals: AddressMap::default(),
            roots: AddressMap::default(),
            has_two_roots: false,
            last: 0,
            current: None,
            asn: 0,
            global_asn: 0,
            displaced: 0,
            fetch_epoch: 0,
            caches: Caches::default(),
            windows: Windows::default(),
            ; in place
            ; zeros l1,
        });
        tlb.l1.iter_mut().for_each(|t| t[0] = empty(0));
        tlb
    }

    fn fresh(&mut self) -> u32 {
        self.last = self.last.checked_add(1).unwrap_or_else(|| {
            self.empty();
            self.numbers.clear();
            self.globals.clear();
            1
        });
        self.last
    }

    /// Forget every translation; the spaces keep their numbers.
    fn empty(&mut self) {
        self.entries.clear();
        self.caches.clear();
        self.fetch.clear();
        self.fetch_epoch += 1;
        self.large.clear();
        self.flush_l1();
    }

    /// Make (VPID, EPT root, PCID) the current space.
    pub fn select(&mut self, vpid: u16, ept_root: u64, pcid: u16) {
        if self.current == Some((vpid, ept_root, pcid)) {
            return;
        }
        self.current = Some((vpid, ept_root, pcid));
        if self.numbers.len() >= MEMORY_LIMIT {
            self.numbers.clear();
            self.globals.clear();
        }
        self.has_two_roots |= *self.roots.entry(vpid).or_insert(ept_root) != ept_root;
        let asn = match self.numbers.get(&(vpid, ept_root, pcid)) {
            Some(&n) => n,
            None => {
                let n = self.fresh();
                self.numbers.insert((vpid, ept_root, pcid), n);
                n
            }
        };
        let global = match self.globals.get(&(vpid, ept_root)) {
            Some(&n) => n,
            None => {
                let n = self.fresh();
                self.globals.insert((vpid, ept_root), n);
                self.numbers.insert((vpid, ept_root, pcid), asn); // `fresh` may have forgotten it
                n
            }
        };
        (self.asn, self.global_asn) = (asn, global);
    }

    /// Make the first level belong to the current space under the permission rules `rules`
    /// (any number that changes with them); what does not belong there is dropped.
    pub fn own_l1(&mut self, rules: u128) {
        let owner = (self.asn, self.global_asn, rules);
        if self.l1_owner != owner {
            let (_, global, before) = std::mem::replace(&mut self.l1_owner, owner);
            self.flush_parts((global, before) != (self.global_asn, rules));
            self.windows.select(owner);
        }
    }

    /// Drop all spaces for which `dead(vpid, ept_root, pcid)`, and the global translations of
    /// (vpid, root) pairs for which `dead_global` says so.  The caller selects again afterwards.
    pub fn drop_spaces(
        &mut self,
        dead: impl Fn(u16, u64, u16) -> bool,
        dead_global: impl Fn(u16, u64) -> bool,
    ) {
        self.current = None;
        self.numbers.retain(|&(v, e, p), _| !dead(v, e, p));
        let before = self.globals.len();
        self.globals.retain(|&(v, e), _| !dead_global(v, e));
        let (numbers, globals) = (&self.numbers, &self.globals);
        self.windows.keep(|(space, global, _)| {
            numbers.values().any(|n| n == space) && globals.values().any(|n| n == global)
        });
        self.flush_parts(self.globals.len() != before);
    }

    /// Drop everything.
    pub fn flush_all(&mut self) {
        self.drop_spaces(|_, _, _| true, |_, _| true);
        self.roots.clear();
        self.has_two_roots = false;
        self.empty();
    }

    /// Drop the translations of one linear address in the current space, global ones too: of the
    /// whole page, whatever its size was (SDM 3A, "Operations that Invalidate TLBs and
    /// Paging-Structure Caches").
    pub fn invalidate(&mut self, gva: u64) {
        self.caches.drop_space(self.asn);
        self.drop_address(&[self.asn, self.global_asn], gva);
        // The same VPID and PCID under other EPT roots count, too; they go as a whole.
        if let (true, Some((vpid, root, _))) = (self.has_two_roots, self.current) {
            self.numbers.retain(|&(v, e, _), _| v != vpid || e == root);
            self.globals.retain(|&(v, e), _| v != vpid || e == root);
        }
    }

    /// INVVPID of an individual address: drop what translates it under this VPID, for all PCIDs and
    /// EPT roots, global translations too.  A VPID of very many spaces goes as a whole, which the
    /// manual allows.  The caller selects again afterwards.
    pub fn invalidate_in(&mut self, vpid: u16, gva: u64) {
        let locals = self.numbers.iter().filter(|(space, _)| space.0 == vpid);
        let globals = self.globals.iter().filter(|(pair, _)| pair.0 == vpid);
        let numbers = locals.map(|(_, &n)| n).chain(globals.map(|(_, &n)| n));
        let numbers: Vec<u32> = numbers.take(NUMBERS_SEARCHED + 1).collect();
        if numbers.len() > NUMBERS_SEARCHED {
            self.drop_spaces(|v, _, _| v == vpid, |v, _| v == vpid);
            return;
        }
        self.caches.drop_address(&numbers, gva, &[&LEVEL4, &PAE, &IA32]);
        self.drop_address(&numbers, gva);
    }

    /// Drop the page that a linear address is in, whatever its size, in spaces of these numbers.
    fn drop_address(&mut self, numbers: &[u32], gva: u64) {
        match LARGE_SHIFTS.into_iter().find(|&s| self.large.contains(&(s, gva >> s))) {
            None => self.drop_pages(gva >> 12, 1, numbers),
            Some(shift) => self.drop_pages(gva >> shift << (shift - 12), 1 << (shift - 12), numbers),
        }
    }

    fn drop_pages(&mut self, first: u64, pages: u64, numbers: &[u32]) {
        let is_hit = |e: &Entry| e.vpn.wrapping_sub(first) < pages && numbers.contains(&e.asn);
        if pages < ENTRIES as u64 {
            for vpn in first..first + pages {
                for e in self.set_mut(vpn).iter_mut().filter(|e| is_hit(e)) {
                    e.asn = 0;
                }
                self.l1_drop(vpn);
                self.windows.drop_page(vpn, numbers);
            }
        } else {
            for e in self.entries.iter_mut().filter(|e| is_hit(e)) {
                e.asn = 0;
            }
            self.flush_l1();
        }
        let before = self.fetch.len();
        if pages.saturating_mul(numbers.len() as u64) < before as u64 {
            for vpn in first..first + pages {
                for &asn in numbers {
                    self.fetch.remove(&(vpn, asn));
                }
            }
        } else {
            self.fetch.retain(|_, e| !is_hit(e));
        }
        self.fetch_epoch += u64::from(self.fetch.len() != before);
    }

    /// Drop the translations of one 4-KByte page in the current space, global ones too.
    pub fn drop_page(&mut self, vpn: u64) {
        self.drop_pages(vpn, 1, &[self.asn, self.global_asn]);
    }

    /// The data entry of a page in the current space.
    #[inline]
    #[must_use]
    pub fn lookup(&self, vpn: u64) -> Option<&Entry> {
        let is_here = |e: &&Entry| e.vpn == vpn && (e.asn == self.asn || e.asn == self.global_asn);
        self.entries[set_of(vpn)].iter().find(is_here)
    }

    fn set_mut(&mut self, vpn: u64) -> &mut [Entry] {
        &mut self.entries[set_of(vpn)]
    }

    /// The instruction-side entry of a page in the current space.
    #[must_use]
    pub fn lookup_fetch(&self, vpn: u64) -> Option<&Entry> {
        self.fetch.get(&(vpn, self.asn)).or_else(|| self.fetch.get(&(vpn, self.global_asn)))
    }

    fn number(&self, perm: u16) -> u32 {
        if perm & perm::GLOBAL != 0 { self.global_asn } else { self.asn }
    }

    fn note_size(&mut self, vpn: u64, shift: u8) {
        if shift > 12 && self.large.insert((shift, vpn >> (shift - 12))) && self.large.len() > MEMORY_LIMIT {
            self.empty();
            self.large.insert((shift, vpn >> (shift - 12)));
        }
    }

    /// Whether an entry could not stay beside a new one: it translates the same page in the same space,
    /// or, where one of them is global, in any.
    fn is_in_its_way(&self, e: &Entry, vpn: u64, perm: u16) -> bool {
        let is_global = (e.perm | perm) & perm::GLOBAL != 0;
        e.vpn == vpn && (is_global || e.asn == self.asn)
    }

    /// Whether the data translation of a page would take the place of another page's.
    #[must_use]
    pub fn displaces(&self, vpn: u64) -> bool {
        self.entries[set_of(vpn)].iter().all(|e| e.asn != 0 && e.vpn != vpn)
    }

    /// Put in a data translation, a piece of a guest's page of 2 to the power `shift` bytes.
    pub fn insert(&mut self, vpn: u64, hpa: u64, perm: u16, shift: u8) {
        self.note_size(vpn, shift);
        let new = Entry { vpn, hpa, asn: self.number(perm), perm };
        let set = set_of(vpn);
        let mut place = None;
        for i in set.clone() {
            let old = self.entries[i];
            if old.asn != 0 && self.is_in_its_way(&old, vpn, perm) {
                self.l1_drop(vpn);
                // (Else nothing is lost.)
                if old != new && old != (Entry { perm: perm & !perm::DIRTY, ..new }) {
                    self.windows.drop_page(vpn, &[old.asn]);
                }
                self.entries[i].asn = 0;
            }
            if self.entries[i].asn == 0 {
                place = place.or(Some(i));
            }
        }
        let place = place.unwrap_or_else(|| {
            let i = set.start + self.displaced as usize % WAYS;
            let old = self.entries[i];
            self.l1_drop(old.vpn);
            self.windows.drop_page(old.vpn, &[old.asn]);
            self.displaced += 1;
            i
        });
        self.entries[place] = new;
    }

    /// Put in an instruction-side translation, as [`Tlb::insert`].
    pub fn insert_fetch(&mut self, vpn: u64, hpa: u64, perm: u16, shift: u8) {
        self.note_size(vpn, shift);
        if self.fetch.len() >= FETCH_LIMIT {
            self.fetch.clear();
            self.fetch_epoch += 1;
        }
        let asn = self.number(perm);
        let new = Entry { vpn, hpa, asn, perm };
        let old = self.fetch.insert((vpn, asn), new);
        let other = if asn == self.asn { self.global_asn } else { self.asn };
        // What is replaced may be in somebody's shortcuts.
        if self.fetch.remove(&(vpn, other)).is_some() || old.is_some_and(|e| e != new) {
            self.fetch_epoch += 1;
        }
    }

    /// Let generated code of a class use the page of a data entry, which lies at host address
    /// `host`: for reading, and for writing if `write`.
    pub fn l1_fill(&mut self, class: usize, entry: &Entry, host: u64, write: bool) {
        let vpn = entry.vpn;
        let i = vpn as usize % L1_ENTRIES;
        let part = if entry.perm & perm::GLOBAL != 0 { GLOBAL } else { LOCAL };
        let used = &mut self.l1_used[part][class];
        if used.len() <= L1_LISTED {
            used.push(i as u16);
        }
        let p = &mut self.l1[class][i];
        let tag = (vpn << 12).wrapping_neg();
        if p.read != tag {
            p.write = nothing(i);
        }
        (p.read, p.host) = (tag, host);
        if write {
            p.write = tag;
        }
    }

    fn l1_drop(&mut self, vpn: u64) {
        let i = vpn as usize % L1_ENTRIES;
        for t in &mut self.l1 {
            if t[i].read == (vpn << 12).wrapping_neg() {
                t[i] = empty(i);
            }
        }
    }

    /// Take the right to write pages away from generated code: those at host addresses for which
    /// `which` says so, of those that it may write.  `base`: the host address of the memory.
    pub fn l1_protect_where(&mut self, base: u64, mut which: impl FnMut(u64) -> bool) {
        self.windows.protect_where(|hpa| which(base + hpa));
        for t in &mut self.l1 {
            for (i, p) in t.iter_mut().enumerate() {
                if p.write != nothing(i) && which(p.host) {
                    p.write = nothing(i);
                }
            }
        }
    }

    /// Give the current space a window; whether it has one now.
    pub fn open_window(&mut self, kind: Kind) -> bool {
        self.windows.open(self.l1_owner, kind)
    }

    /// Take its window away.
    pub fn close_window(&mut self) {
        self.windows.close_current(self.l1_owner);
    }

    /// Empty the first level (the second stays).
    pub fn flush_l1(&mut self) {
        self.flush_parts(true);
        self.windows.clear();
    }

    fn flush_parts(&mut self, global: bool) {
        self.flush_l1_part(LOCAL);
        if global {
            self.flush_l1_part(GLOBAL);
        }
    }

    /// Drop one part of the first level, or more.
    fn flush_l1_part(&mut self, part: usize) {
        for (t, used) in self.l1.iter_mut().zip(&mut self.l1_used[part]) {
            if used.len() > L1_LISTED {
                t.fill(empty(1));
                t[0] = empty(0);
            } else {
                for &i in used.iter() {
                    t[usize::from(i)] = empty(usize::from(i));
                }
            }
            used.clear();
        }
    }
}

#[cfg(test)]
#[path = "tlb_tests.rs"]
mod tests;
