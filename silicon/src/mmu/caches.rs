//! Translation caches of the walker: paging-structure caches and a nested TLB.
//!
//! Source: SDM 3A, "Paging-Structure Caches"; SDM 3C, "Information That May Be Cached" (of EPT).
//! A *paging-structure cache* holds, for the linear addresses below one entry, where that entry's
//! table is; under EPT such an entry is a combined one, so it holds the table's host-physical
//! address.  The *nested TLB* holds guest-physical mappings: pages of the EPT.
//!
//! Both are off (they have no entries) unless somebody asks for them.  The manual lets a processor
//! have them or not, so no result may depend on them, only the number of references of a walk.
//!
//! Invariants: an entry goes whenever the manual says that it must.  Those of linear addresses are
//! tagged with the TLB's address-space number, so whatever gives a space a new number drops them;
//! INVLPG drops all of the current space.  The contents follow from the accesses alone: each set
//! replaces its least recently used way.

use crate::addr::PAGE_OFFSET;
use crate::mmu::format::Format;

/// Ways of a set.
const WAYS: usize = 4;
/// Most entries that one cache may have.
pub const MOST: u64 = 1 << 16;
/// Levels that have a paging-structure cache: entries of level 2, 3, 4 (and 5) name tables.
const LEVELS: usize = 6;

/// Where a table is, and what the entries on the way to it allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Guest-physical address.
    pub gpa: u64,
    /// Host-physical address.
    pub hpa: u64,
    /// What the EPT allows with the table.
    pub rights: u64,
    /// U/S combined so far.
    pub user: bool,
    /// R/W combined so far.
    pub write: bool,
    /// No XD so far.
    pub execute: bool,
}

/// A page of the EPT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Host-physical address of its first byte.
    pub hpa: u64,
    /// Rights combined over the levels.
    pub rights: u64,
    /// Writing it needs no walk.
    pub dirty: bool,
}

#[derive(Clone, Debug, Default)]
struct Way<T> {
    tag: u64,
    owner: u64, // 0: empty
    used: u64,
    value: T,
}

/// A set-associative cache.
#[derive(Clone, Debug)]
struct Cache<T> {
    ways: Vec<Way<T>>,
    clock: u64,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self { ways: Vec::new(), clock: 0 }
    }
}

impl<T: Copy + Default> Cache<T> {
    fn resize(&mut self, entries: usize) {
        if self.ways.len() != entries {
            self.ways = vec![Way::default(); entries];
            self.clock = 0;
        }
    }

    fn set(&mut self, tag: u64) -> &mut [Way<T>] {
        let sets = self.ways.len().div_ceil(WAYS);
        let first = (tag as usize % sets) * WAYS;
        let end = self.ways.len().min(first + WAYS);
        &mut self.ways[first..end]
    }

    fn get(&mut self, owner: u64, tag: u64) -> Option<T> {
        if self.ways.is_empty() {
            return None;
        }
        self.clock += 1;
        let now = self.clock;
        let way = self.set(tag).iter_mut().find(|w| w.owner == owner && w.tag == tag)?;
        way.used = now;
        Some(way.value)
    }

    fn put(&mut self, owner: u64, tag: u64, value: T) {
        if self.ways.is_empty() {
            return;
        }
        self.clock += 1;
        let used = self.clock;
        let set = self.set(tag);
        let place = set
            .iter()
            .position(|w| w.owner == owner && w.tag == tag)
            .or_else(|| set.iter().position(|w| w.owner == 0))
            .or_else(|| (0..set.len()).min_by_key(|&n| set[n].used))
            .unwrap_or(0);
        set[place] = Way { tag, owner, used, value };
    }

    fn drop_if(&mut self, is_dead: impl Fn(u64, u64) -> bool) {
        for way in self.ways.iter_mut().filter(|w| w.owner != 0) {
            if is_dead(way.owner, way.tag) {
                way.owner = 0;
            }
        }
    }
}

/// The caches of one processor.
#[derive(Clone, Debug, Default)]
pub struct Caches {
    structures: [Cache<Table>; LEVELS],
    nested: Cache<Mapping>,
}

impl Caches {
    /// Give each level's paging-structure cache, and the nested TLB, so many entries; 0 is off.
    /// What changes its size is emptied.
    pub fn resize(&mut self, structures: u64, nested: u64) {
        for cache in &mut self.structures[2..] {
            cache.resize(structures.min(MOST) as usize);
        }
        self.nested.resize(nested.min(MOST) as usize);
    }

    /// Entries of each level's paging-structure cache, and of the nested TLB.
    #[must_use]
    pub fn sizes(&self) -> (u64, u64) {
        (self.structures[2].ways.len() as u64, self.nested.ways.len() as u64)
    }

    /// Whether there are paging-structure caches.
    #[must_use]
    pub fn has_structures(&self) -> bool {
        !self.structures[2].ways.is_empty()
    }

    /// Whether there is a nested TLB.
    #[must_use]
    pub fn has_nested(&self) -> bool {
        !self.nested.ways.is_empty()
    }

    /// The table that the entry of `level` for an address names, if it is known.
    pub fn table(&mut self, asn: u32, level: u8, shift: u8, gva: u64) -> Option<Table> {
        self.structures[usize::from(level)].get(u64::from(asn), gva >> shift)
    }

    /// The entry of `level` for an address has been used, and names this table.
    pub fn note_table(&mut self, asn: u32, level: u8, shift: u8, gva: u64, table: Table) {
        self.structures[usize::from(level)].put(u64::from(asn), gva >> shift, table);
    }

    /// The page of an EPT that a guest-physical address is in, with log2 of its size.
    pub fn mapping(&mut self, eptp: u64, gpa: u64) -> Option<(Mapping, u8)> {
        [12, 21, 30].into_iter().find_map(|shift| {
            let found = self.nested.get(eptp, Self::nested_tag(gpa, shift))?;
            Some((found, shift))
        })
    }

    /// An EPT's page of 2 to the power `shift` bytes has been used.
    pub fn note_mapping(&mut self, eptp: u64, gpa: u64, shift: u8, mapping: Mapping) {
        self.nested.put(eptp, Self::nested_tag(gpa, shift), mapping);
    }

    /// Page numbers of different sizes must differ: the size's place among them goes on top.
    fn nested_tag(gpa: u64, shift: u8) -> u64 {
        gpa >> shift | u64::from(shift) << 56
    }

    /// INVLPG and its kin: everything that helps to translate addresses of this space.
    pub fn drop_space(&mut self, asn: u32) {
        for cache in &mut self.structures {
            cache.drop_if(|owner, _| owner == u64::from(asn));
        }
    }

    /// A fault of a walk (SDM 3A, "Operations that Invalidate TLBs and Paging-Structure Caches";
    /// SDM 3C, "Operations that Invalidate Cached Mappings"), or INVVPID of an individual address:
    /// what was used for this address in these spaces, under tables of any of these formats.
    pub fn drop_address(&mut self, asns: &[u32], gva: u64, formats: &[&Format]) {
        if !self.has_structures() {
            return;
        }
        for level in formats.iter().flat_map(|format| format.levels) {
            let dead = gva >> level.shift;
            self.structures[usize::from(level.number)]
                .drop_if(|owner, tag| tag == dead && asns.iter().any(|&n| u64::from(n) == owner));
        }
    }

    /// An EPT violation: the guest-physical mapping of this address.
    pub fn drop_mapping(&mut self, eptp: u64, gpa: u64) {
        self.nested.drop_if(|owner, tag| {
            owner == eptp && [12, 21, 30].into_iter().any(|shift| tag == Self::nested_tag(gpa, shift))
        });
    }

    /// INVEPT: the guest-physical mappings under one EPT root, or all.
    pub fn drop_ept(&mut self, root: Option<u64>) {
        self.nested.drop_if(|owner, _| root.is_none_or(|r| owner & !PAGE_OFFSET == r));
    }

    /// Drop everything.
    pub fn clear(&mut self) {
        for cache in &mut self.structures {
            cache.drop_if(|_, _| true);
        }
        self.nested.drop_if(|_, _| true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::format::LEVEL4;

    #[test]
    fn a_cache_of_no_entries_holds_nothing() {
        let mut c = Caches::default();
        c.note_mapping(1, 0x1000, 12, Mapping::default());
        c.note_table(1, 2, 21, 0, Table::default());
        assert_eq!((None, None), (c.mapping(1, 0x1000), c.table(1, 2, 21, 0)));
        assert!(!c.has_nested() && !c.has_structures());
    }

    #[test]
    fn the_least_recently_used_way_goes() {
        let mut c = Caches::default();
        c.resize(0, 4);
        for n in 0..4 {
            c.note_mapping(1, n << 12, 12, Mapping { hpa: n, ..Mapping::default() });
        }
        assert!(c.mapping(1, 0).is_some());
        c.note_mapping(1, 9 << 12, 12, Mapping::default());
        assert!(c.mapping(1, 0).is_some() && c.mapping(1, 1 << 12).is_none());
    }

    #[test]
    fn sizes_that_are_no_multiple_of_a_set_work() {
        for entries in [1, 2, 3, 5, 6, 7, 33] {
            let mut c = Caches::default();
            c.resize(entries, entries);
            for n in 0..100 {
                c.note_mapping(1, n << 12, 12, Mapping { hpa: n, ..Mapping::default() });
                assert_eq!(Some(n), c.mapping(1, n << 12).map(|(m, _)| m.hpa), "{entries}");
            }
        }
    }

    #[test]
    fn pages_of_different_sizes_are_told_apart() {
        let mut c = Caches::default();
        c.resize(0, 16);
        c.note_mapping(1, 5 << 21, 21, Mapping { hpa: 1, ..Mapping::default() });
        assert_eq!(None, c.mapping(1, 5 << 12));
        assert_eq!(Some(21), c.mapping(1, (5 << 21) + 0x3000).map(|(_, shift)| shift));
    }

    #[test]
    fn each_invalidation_drops_what_it_must_and_no_more() {
        let mut c = Caches::default();
        c.resize(8, 8);
        let fill = |c: &mut Caches| {
            c.note_table(1, 2, 21, 0x20_0000, Table::default());
            c.note_table(1, 2, 21, 0x40_0000, Table::default());
            c.note_table(2, 2, 21, 0x20_0000, Table::default());
            c.note_mapping(0x5000 | 0x1E, 0x1000, 12, Mapping::default());
            c.note_mapping(0x6000 | 0x1E, 0x1000, 12, Mapping::default());
        };
        let state = |c: &mut Caches| {
            (
                c.table(1, 2, 21, 0x20_0000).is_some(),
                c.table(1, 2, 21, 0x40_0000).is_some(),
                c.table(2, 2, 21, 0x20_0000).is_some(),
                c.mapping(0x501E, 0x1000).is_some(),
                c.mapping(0x601E, 0x1000).is_some(),
            )
        };
        fill(&mut c);
        assert_eq!((true, true, true, true, true), state(&mut c));
        c.drop_space(1);
        assert_eq!((false, false, true, true, true), state(&mut c));
        fill(&mut c);
        c.drop_address(&[1], 0x20_1234, &[&LEVEL4]);
        assert_eq!((false, true, true, true, true), state(&mut c));
        fill(&mut c);
        c.drop_ept(Some(0x5000));
        assert_eq!((true, true, true, false, true), state(&mut c));
        fill(&mut c);
        c.drop_mapping(0x601E, 0x1FFF);
        assert_eq!((true, true, true, true, false), state(&mut c));
        fill(&mut c);
        c.drop_ept(None);
        assert_eq!((true, true, true, false, false), state(&mut c));
        fill(&mut c);
        c.clear();
        assert_eq!((false, false, false, false, false), state(&mut c));
    }
}
