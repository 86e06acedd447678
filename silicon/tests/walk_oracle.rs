//! The page walk against an oracle that knows nothing of it: every format and page size of the
//! guest, each of its tables and the data on every page size of the host.
//!
//! Item `i` of a walk (its tables from the root, then the data) has the guest-physical gigabyte
//! `i + 1` and a host-physical gigabyte of its own, so that it can have any host page size alone.

use silicon::cpu::state::{Clock, Counts};
use silicon::dbt::home::Home;
use silicon::mem::Memory;
use silicon::mmu::walk::{Access, Intent, Space, Walker};

const ADDRESS: u64 = 0x3FFF_FFFF_F000;
const EPT: u64 = 0x10000;
/// The root above it, of an EPT with five levels.
const EPT5: u64 = 0x12000;
/// EPTPs without the root: write-back, page-walk length, accessed and dirty flags or none.
const EPTPS: [u64; 4] = [EPT | 0x1E, EPT | 0x5E, EPT5 | 0x26, EPT5 | 0x66];
const GIGA: u64 = 1 << 30;

/// A guest format with a page size: what the SDM's figures say of it.
struct Guest {
    name: &'static str,
    /// Levels of tables in memory, and the level whose entry maps the page.
    top: u8,
    leaf: u8,
    /// Bytes of an entry and bits of an index.
    entry: u64,
    bits: u8,
    cr4: u64,
    efer: u64,
}

const fn guest(name: &'static str, top: u8, leaf: u8, entry: u64, bits: u8, cr4: u64, efer: u64) -> Guest {
    Guest { name, top, leaf, entry, bits, cr4, efer }
}

const GUESTS: [Guest; 11] = [
    guest("no paging", 0, 1, 0, 0, 0, 0),
    guest("IA-32 4K", 2, 1, 4, 10, 0x10, 0),
    guest("IA-32 4M", 2, 2, 4, 10, 0x10, 0),
    guest("PAE 4K", 2, 1, 8, 9, 0x20, 0),
    guest("PAE 2M", 2, 2, 8, 9, 0x20, 0),
    guest("Intel 64 4K", 4, 1, 8, 9, 0x20, 0x500),
    guest("Intel 64 2M", 4, 2, 8, 9, 0x20, 0x500),
    guest("Intel 64 1G", 4, 3, 8, 9, 0x20, 0x500),
    guest("5 levels 4K", 5, 1, 8, 9, 0x1020, 0x500),
    guest("5 levels 2M", 5, 2, 8, 9, 0x1020, 0x500),
    guest("5 levels 1G", 5, 3, 8, 9, 0x1020, 0x500),
];

impl Guest {
    /// Table references of a walk: the g of (g+1)(h+1)-1.
    fn g(&self) -> usize {
        usize::from(self.top + 1 - self.leaf)
    }

    fn shift(&self, level: u8) -> u8 {
        12 + self.bits * (level - 1)
    }
}

/// The oracle: the entries that a translation refers to, in order, as (is EPT, level, address,
/// flags that are set there).  To use a guest's address, translate it; to translate, use entries.
struct Oracle<'a> {
    mem: &'a Memory,
    guest: &'a Guest,
    eptp: u64,
    is_write: bool,
    references: Vec<(bool, u8, u64, u64)>,
}

impl Oracle<'_> {
    fn guest(&mut self, level: u8, table: u64, gva: u64) -> u64 {
        if level < self.guest.leaf {
            let (shift, size) = (self.guest.shift(level + 1), self.guest.entry);
            // Of a page: the base is where the leaf says, the rest is the address's own.
            let base = if size == 4 && level == 1 {
                table & 0xFFC0_0000 | (table >> 13 & 0xFF) << 32
            } else {
                table
            };
            let gpa = base & ADDRESS >> shift << shift | (gva % (1 << shift));
            return self.host(levels_of(self.eptp), self.eptp, gpa, self.is_write);
        }
        let index = gva >> self.guest.shift(level) & ((1 << self.guest.bits) - 1);
        let has_flags = self.eptp & 0x40 != 0;
        let at = self.host(
            levels_of(self.eptp),
            self.eptp,
            (table & ADDRESS) + index * self.guest.entry,
            has_flags,
        );
        let is_leaf = level == self.guest.leaf;
        self.references.push((false, level, at, 0x20 | if is_leaf && self.is_write { 0x40 } else { 0 }));
        let entry = self.mem.load(at, self.guest.entry as usize);
        self.guest(level - 1, entry, gva)
    }

    fn host(&mut self, level: u8, table: u64, gpa: u64, is_write: bool) -> u64 {
        if table == 0 {
            return gpa;
        }
        let shift = 12 + 9 * (level - 1);
        let at = (table & ADDRESS) + (gpa >> shift) % 512 * 8;
        let entry = self.mem.load(at, 8);
        let is_page = level == 1 || entry & 0x80 != 0;
        let flags =
            if self.eptp & 0x40 == 0 { 0 } else { 0x100 | if is_page && is_write { 0x200 } else { 0 } };
        self.references.push((true, level, at, flags));
        if is_page {
            entry & ADDRESS >> shift << shift | (gpa % (1 << shift))
        } else {
            self.host(level - 1, entry, gpa, is_write)
        }
    }
}

/// One case, laid out in memory.
struct Scene {
    mem: std::sync::Arc<Memory>,
    /// Where entries are, their sizes and first values.
    entries: Vec<(u64, usize, u64)>,
}

impl Scene {
    fn put(&mut self, at: u64, size: usize, value: u64) {
        self.entries.retain(|e| e.0 != at);
        self.mem.store(at, size, value);
        self.entries.push((at, size, value));
    }

    /// An entry, and beside it one that nothing may touch.
    fn put_entry(&mut self, at: u64, size: usize, value: u64) {
        self.put(at, size, value);
        let beside = at ^ size as u64;
        if !self.entries.iter().any(|e| e.0 == beside) {
            self.put(beside, size, 0x5A01);
        }
    }

    fn wipe(&mut self) {
        for (at, size, _) in std::mem::take(&mut self.entries) {
            self.mem.store(at, size, 0);
        }
    }

    /// Map item `i`'s guest-physical page for `gpa` on a host page of 4K, 2M or 1G (`level` 1 to
    /// 3); returns the host-physical address.
    fn map(&mut self, i: u64, gpa: u64, level: u8) -> u64 {
        let shift = 12 + 9 * (level - 1);
        let giga = (9 + (i * 3 + 1) % 8) * GIGA;
        // Another frame than the guest's: some address bits that the page leaves free flip.
        let frame = (giga + ((gpa % GIGA) ^ 0x2AAA_A000 & (GIGA - 1) >> shift << shift)) >> shift << shift;
        let tables = [EPT, EPT + 0x1000, 0x20000 + i * 0x1000, 0x30000 + i * 0x1000];
        for (above, table) in tables.iter().enumerate().take(4 - usize::from(level)) {
            let at = table + (gpa >> (39 - 9 * above)) % 512 * 8;
            self.put_entry(at, 8, tables[above + 1] | 7);
        }
        let at = tables[4 - usize::from(level)] + (gpa >> shift) % 512 * 8;
        self.put_entry(at, 8, frame | 0x37 | if level > 1 { 0x80 } else { 0 });
        frame | (gpa % (1 << shift))
    }

    /// Lay a walk out; `hosts` has the host level of each item, all 0 for no EPT.
    fn lay(&mut self, guest: &Guest, hosts: &[u8], gva: u64) -> u64 {
        let place = |i: usize| (i as u64 + 1) * GIGA + 0x0123_4000 * (i as u64 + 1);
        let place_of = |i: usize| place(i) & !0xFFF;
        for (i, &host) in hosts.iter().enumerate().take(guest.g()) {
            let level = guest.top - i as u8;
            let (shift, size) = (guest.shift(level), guest.entry);
            let gpa = place_of(i) + (gva >> shift & ((1 << guest.bits) - 1)) * size;
            let is_leaf = level == guest.leaf;
            let target =
                place_of(i + 1) >> if is_leaf { shift } else { 12 } << if is_leaf { shift } else { 12 };
            let at = if host == 0 { gpa } else { self.map(i as u64, gpa, host) };
            self.put_entry(at, size as usize, target | 7 | if is_leaf && level > 1 { 0x80 } else { 0 });
        }
        place_of(0)
    }
}

/// All ways to give each of `n` items one of three host page sizes.
fn assignments(n: usize) -> Vec<Vec<u8>> {
    let all = (0..3_usize.pow(n as u32))
        .map(|k| (0..n).map(|i| 1 + (k / 3_usize.pow(i as u32) % 3) as u8).collect());
    all.chain([vec![0; n]]).collect()
}

#[test]
fn every_walk_makes_the_oracles_references_in_its_order_and_sets_its_flags() {
    let mut scene = Scene { mem: Memory::new(18 * GIGA).unwrap(), entries: Vec::new() };
    let mut core = Home::new(scene.mem.clone(), Clock::Virtual, 0).unwrap();
    let (mut cases, mut uniform) = (0, Vec::new());
    for guest in &GUESTS {
        let g = guest.g();
        // Where a page may be: of a 4-level space the index of every level differs.
        let gva = match (guest.top, guest.entry) {
            (4, _) => 0x1234_5678_9ABC_u64 & 0x7FFF_FFFF_FFFF,
            (5, _) => 0x55_1234_5678_9ABC,
            (0, _) => GIGA + 0x0567_89AB,
            _ => 0x9876_5432,
        };
        for hosts in assignments(g + 1) {
            let has_ept = hosts[0] != 0;
            let eptps = if has_ept { &EPTPS[..] } else { &[0] };
            for (eptp, access) in
                eptps.iter().flat_map(|&eptp| [Access::Read, Access::Write, Access::Fetch].map(|a| (eptp, a)))
            {
                scene.wipe();
                let root = scene.lay(guest, &hosts, gva);
                if levels_of(eptp) == 5 {
                    scene.put_entry(EPT5, 8, EPT | 7);
                }
                let what = format!("{} on {hosts:?}, {access:?}, EPTP {eptp:#x}", guest.name);
                let mut space = Space {
                    cr0: 1 | if g == 0 { 0 } else { 1 << 31 },
                    cr3: root,
                    cr4: guest.cr4,
                    efer: guest.efer,
                    pdpte: [0; 4],
                    eptp,
                    by_mode: false,
                };
                space.pdpte[(gva >> 30 & 3) as usize] = root | 1;
                let gpa = data_address(guest, gva);
                if has_ept {
                    scene.map(g as u64, gpa, hosts[g]);
                }

                let mut oracle = Oracle {
                    mem: &scene.mem,
                    guest,
                    eptp,
                    is_write: access == Access::Write,
                    references: Vec::new(),
                };
                let hpa = if g == 0 {
                    oracle.host(levels_of(eptp), eptp, gva, oracle.is_write)
                } else {
                    oracle.guest(guest.top, root, gva)
                };
                let expected = oracle.references;
                let intent = Intent { access, user: true, smap: false };

                // An observer sees the same and changes nothing.
                let mut log = Vec::new();
                let seen =
                    Walker { log: Some(&mut log), ..Walker::observer(&scene.mem) }.walk(&space, gva, intent);
                let order =
                    |log: &[(bool, u8, u64, u64)]| log.iter().map(|r| (r.0, r.1, r.2)).collect::<Vec<_>>();
                assert_eq!(order(&expected), order(&log), "{what}, observed");
                assert_eq!(Ok((hpa, gpa)), seen.map(|w| (w.hpa, w.gpa)), "{what}");
                for &(at, size, value) in &scene.entries {
                    assert_eq!(value, scene.mem.load(at, size), "{what}: observed {at:#x}");
                }

                // The processor's own walk.
                let (mut counts, mut log) = (Counts::default(), Vec::new());
                let walked =
                    Walker { counts: Some(&mut counts), log: Some(&mut log), ..Walker::observer(&scene.mem) }
                        .walk(&space, gva, intent);
                assert_eq!((order(&expected), Ok(hpa)), (order(&log), walked.map(|w| w.hpa)), "{what}");
                check_flags(&scene, &expected, &what);
                check_counts(&counts, &expected, &what);
                let depth = |level: u8| match level {
                    0 => 0,
                    level => usize::from(levels_of(eptp) + 1 - level),
                };
                let formula: usize =
                    hosts[..g].iter().map(|&l| 1 + depth(l)).sum::<usize>() + depth(hosts[g]);
                assert_eq!(formula, log.len(), "{what}");
                if hosts.iter().all(|&l| l == hosts[0]) {
                    let h = depth(hosts[0]);
                    assert_eq!((g + 1) * (h + 1) - 1, log.len(), "{what}");
                    uniform.push((g, h, log.len()));
                }

                // And through the TLB: counted once.
                core.flush_guest();
                (core.cr0, core.cr3, core.cr4, core.efer) = (space.cr0, space.cr3, space.cr4, space.efer);
                (core.pdpte, core.vmx.eptp, core.vmx.vpid, core.cpl) = (space.pdpte, eptp, 1, 3);
                core.counts = Counts::default();
                core.refresh();
                core.flush_guest();
                for _ in 0..2 {
                    assert_eq!(Ok((hpa, false)), core.translate(gva, access), "{what}");
                    check_counts(&core.counts, &expected, &what);
                    assert_eq!(1, core.counts.tlb_misses + core.counts.itlb_misses, "{what}");
                }
                cases += 1;
            }
        }
    }
    let with_ept = 3 + 27 + 9 + 27 + 9 + 243 + 81 + 27 + 729 + 243 + 81;
    assert_eq!(3 * (EPTPS.len() * with_ept + GUESTS.len()), cases);
    for case in [(5, 5, 35), (4, 5, 29), (5, 4, 29), (4, 4, 24), (3, 2, 11), (0, 0, 0)] {
        assert!(uniform.contains(&case), "{case:?}");
    }
}

/// The levels of an EPT, as its EPTP says.
fn levels_of(eptp: u64) -> u8 {
    if eptp >> 3 & 7 == 4 { 5 } else { 4 }
}

/// The guest-physical address that `Scene::lay` gives the data.
fn data_address(guest: &Guest, gva: u64) -> u64 {
    let g = guest.g() as u64;
    if g == 0 {
        return gva;
    }
    let shift = guest.shift(guest.leaf);
    let place = (g + 1) * GIGA + 0x0123_4000 * (g + 1);
    (place >> shift << shift) | (gva % (1 << shift))
}

fn check_flags(scene: &Scene, expected: &[(bool, u8, u64, u64)], what: &str) {
    for &(at, size, value) in &scene.entries {
        let flags = expected.iter().filter(|r| r.2 == at).fold(0, |all, r| all | r.3);
        assert_eq!(value | flags, scene.mem.load(at, size), "{what}: entry at {at:#x}");
    }
}

fn check_counts(counts: &Counts, expected: &[(bool, u8, u64, u64)], what: &str) {
    let mut tally = [[0; 6]; 2];
    for r in expected {
        tally[usize::from(r.0)][usize::from(r.1)] += 1;
    }
    assert_eq!(tally, [counts.walk_guest, counts.walk_host], "{what}");
}
