//! What the walker's caches save, to the last reference, and what they must not hide: faults that
//! end what was cached, accessed and dirty flags, rights.

use silicon::cpu::state::{Clock, Core};
use silicon::dbt::home::Home;
use silicon::mem::Memory;
use silicon::mmu::walk::Access;
use silicon::vmx::instructions as vmx;

const TABLES: u64 = 0x10_0000; // PML4, PDPT, PD, PT: one page each
const PT: u64 = TABLES + 0x3000;
const EPT: u64 = 0x20_0000; // the same, for the first 2 MBytes, page by page
const EPT_PT: u64 = EPT + 0x3000;
const BASE: u64 = 1 << 39;
const DATA: u64 = 0x8000;
const AD: u64 = 0x40;

/// A guest with four levels on an EPT of four, caches of these sizes; `eptp_flags` 0: no EPT.
fn guest(structures: u64, nested: u64, eptp_flags: u64) -> Home {
    let mem = Memory::new(16 << 20).unwrap();
    for level in 0..3 {
        let index = u64::from(level == 0);
        mem.store(TABLES + level * 0x1000 + index * 8, 8, TABLES + (level + 1) * 0x1000 + 0x27);
        mem.store(EPT + level * 0x1000, 8, EPT + (level + 1) * 0x1000 + 7);
    }
    for page in 0..512 {
        mem.store(EPT_PT + page * 8, 8, page << 12 | 0x37);
    }
    for page in 0..16 {
        mem.store(PT + page * 8, 8, (DATA + (page << 12)) | 0x27);
    }
    let mut core = Home::new(mem, Clock::Virtual, 0).unwrap();
    core.vmx.is_on = true;
    (core.cr0, core.cr3, core.cr4, core.efer) = (0x8001_0033, TABLES, 0x20, 0xD00);
    if eptp_flags != 0 {
        (core.vmx.vpid, core.vmx.eptp) = (1, EPT | eptp_flags);
    }
    core.tlb.caches.resize(structures, nested);
    core.refresh();
    core
}

/// The references that a read takes.
fn cost(core: &mut Core, gva: u64) -> u64 {
    let sum = |core: &Core| core.counts.walk_guest.iter().chain(&core.counts.walk_host).sum::<u64>();
    let before = sum(core);
    core.translate(gva, Access::Read).unwrap();
    sum(core) - before
}

#[test]
fn every_combination_saves_what_it_should() {
    // (EPT, structures, nested): the first walk; the next page; a second name of the first frame.
    for (flags, structures, nested, first, next, alias) in [
        (0, 0, 0, 4, 4, 4),
        (0, 8, 0, 4, 1, 1),
        (0, 8, 8, 4, 1, 1),
        (0x1E, 0, 0, 24, 24, 24),
        (0x1E, 0, 8, 24, 8, 4), // of the next page, only the data's own address is new
        (0x1E, 8, 0, 24, 5, 5),
        (0x1E, 8, 8, 24, 5, 1),
    ] {
        let mut core = guest(structures, nested, flags);
        core.mem.store(PT + 15 * 8, 8, DATA | 0x27);
        let seen = [BASE, BASE + 0x1000, BASE + 0xF000].map(|gva| cost(&mut core, gva));
        assert_eq!([first, next, alias], seen, "EPTP flags {flags:#x}, {structures}, {nested}");
        assert_eq!(0, cost(&mut core, BASE), "a TLB hit walks nothing");
    }
}

#[test]
fn hits_and_misses_are_counted_where_there_is_a_cache() {
    let mut core = guest(8, 8, 0x1E);
    cost(&mut core, BASE);
    cost(&mut core, BASE + 0x1000);
    let c = &core.counts;
    assert_eq!(([0, 0, 1, 0, 0, 0], 1), (c.structure_hits, c.structure_misses));
    assert_eq!((0, 6), (c.nested_hits, c.nested_misses)); // 5 of the first walk, 1 of the second
    let mut plain = guest(0, 0, 0x1E);
    cost(&mut plain, BASE);
    assert_eq!((0, 0), (plain.counts.structure_misses, plain.counts.nested_misses));
}

#[test]
fn mov_to_cr3_drops_tables_and_keeps_guest_physical_mappings() {
    let mut core = guest(8, 8, 0x1E);
    cost(&mut core, BASE);
    core.flush_non_global();
    assert_eq!(4, cost(&mut core, BASE));
    vmx::invept(&mut core, 1, EPT | 0x1E).unwrap();
    assert_eq!(24, cost(&mut core, BASE));
}

#[test]
fn a_page_fault_ends_what_was_cached_on_the_way() {
    // SDM 3A: no INVLPG is needed where an entry becomes more permissive, at most a fault comes.
    for flags in [0, 0x1E] {
        let mut core = guest(8, 8, flags);
        let pde = TABLES + 0x2000;
        core.mem.store(pde, 8, PT | 0x25); // read-only
        cost(&mut core, BASE);
        core.mem.store(pde, 8, PT | 0x27);
        let _ = core.translate(BASE + 0x1000, Access::Write);
        assert!(core.translate(BASE + 0x1000, Access::Write).is_ok());
    }
}

#[test]
fn an_ept_violation_ends_the_mapping_that_it_hit() {
    // SDM 3C: no INVEPT is needed for the address of a violation.
    let mut core = guest(0, 8, 0x1E);
    let slot = EPT_PT + (DATA >> 12) * 8;
    core.mem.store(slot, 8, DATA | 0x31); // read-only
    let read = core.translate(BASE, Access::Read).unwrap().0;
    assert_eq!(DATA, read);
    assert!(core.translate(BASE, Access::Write).is_err());
    core.mem.store(slot, 8, 0x9_F000 | 0x37);
    assert_eq!(0x9_F000, core.translate(BASE, Access::Read).unwrap().0);
}

#[test]
fn accessed_and_dirty_flags_are_set_as_without_caches() {
    let flags = |core: &Core| {
        let guest = (0..16).map(|n| core.mem.load(PT + n * 8, 8) & 0x60);
        let host = (0..512).map(|n| core.mem.load(EPT_PT + n * 8, 8) >> 8 & 3);
        guest.chain(host).collect::<Vec<_>>()
    };
    let run = |structures, nested| {
        let mut core = guest(structures, nested, 0x1E | AD);
        for n in 0..16 {
            core.mem.store(PT + n * 8, 8, core.mem.load(PT + n * 8, 8) & !0x60);
        }
        core.mem.store(PT + 15 * 8, 8, DATA | 7);
        core.translate(BASE, Access::Read).unwrap();
        core.translate(BASE + 0xF000, Access::Write).unwrap(); // the same frame, clean so far
        core.translate(BASE + 0x2000, Access::Read).unwrap();
        core.translate(BASE + 0x2000, Access::Write).unwrap();
        core.translate(BASE + 0x3000, Access::Fetch).unwrap();
        flags(&core)
    };
    let plain = run(0, 0);
    assert!(plain.contains(&0x60) && plain.contains(&3));
    for (structures, nested) in [(8, 0), (0, 8), (8, 8), (1, 1)] {
        assert_eq!(plain, run(structures, nested), "{structures} {nested}");
    }
}
