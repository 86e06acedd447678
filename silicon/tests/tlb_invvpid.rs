//! INVVPID of an individual address (SDM 3D, "VMX Instruction Reference"; SDM 3C, "Operations that
//! Invalidate Cached Mappings"): what it must drop, and by counts of misses and references that it
//! drops no more.

use silicon::arch::bits::cr4;
use silicon::cpu::state::{Clock, Core};
use silicon::dbt::home::Home;
use silicon::mem::Memory;
use silicon::mmu::walk::Access;
use silicon::vmx::instructions as vmx;

const ROOT: u64 = 0x1_0000;
const SMALL: u64 = 1 << 39;
const FAR: u64 = SMALL + (2 << 21); // a small page below another table
const GLOBAL: u64 = SMALL + 0x5000;
const LARGE: u64 = SMALL + (1 << 21);
const EPTS: [u64; 2] = [0x2_0000, 0x3_0000];
const READ_WRITE_EXECUTE: u64 = 0x37; // of memory type write-back

/// Tables with small pages, one of them global, and a large one; EPTs that map each frame to itself.
fn core() -> Home {
    let mem = Memory::new(16 << 20).unwrap();
    mem.store(ROOT + 8, 8, ROOT + 0x1003);
    mem.store(ROOT + 0x1000, 8, ROOT + 0x2003);
    mem.store(ROOT + 0x2000, 8, ROOT + 0x3003);
    mem.store(ROOT + 0x2008, 8, 4 << 20 | 0x83);
    mem.store(ROOT + 0x2010, 8, ROOT + 0x4003);
    for page in 0..8 {
        let global = u64::from(page == 5) << 8;
        mem.store(ROOT + 0x3000 + page * 8, 8, ((8 << 20) + (page << 12)) | 3 | global);
        mem.store(ROOT + 0x4000 + page * 8, 8, ((9 << 20) + (page << 12)) | 3);
    }
    for ept in EPTS {
        mem.store(ept, 8, ept + 0x1007);
        mem.store(ept + 0x1000, 8, ept + 0x2007);
        for n in 0..8 {
            mem.store(ept + 0x2000 + n * 8, 8, n << 21 | 0x80 | READ_WRITE_EXECUTE);
        }
    }
    let mut core = Home::new(mem, Clock::Virtual, 0).unwrap();
    core.vmx.is_on = true;
    (core.cr0, core.cr4, core.efer) = (0x8001_0033, cr4::PAE | cr4::PGE | cr4::PCIDE, 0xD00);
    core
}

/// Go on in this space.
fn enter(core: &mut Core, vpid: u16, ept: u64, pcid: u64) {
    core.cr3 = ROOT | pcid;
    (core.vmx.vpid, core.vmx.eptp) = (vpid, if ept == 0 { 0 } else { ept | 0x1E });
    core.refresh();
}

/// Read and fetch at each address; how many of the reads, and of the fetches, missed.
fn misses(core: &mut Core, at: &[u64]) -> (u64, u64) {
    let before = (core.counts.tlb_misses, core.counts.itlb_misses);
    for &gva in at {
        core.translate(gva, Access::Read).unwrap();
        core.translate(gva, Access::Fetch).unwrap();
    }
    (core.counts.tlb_misses - before.0, core.counts.itlb_misses - before.1)
}

#[test]
fn one_page_of_one_vpid_goes() {
    let mut core = core();
    let pages = [SMALL, SMALL + 0x1000, SMALL + 0x2000, GLOBAL, LARGE, FAR];
    for vpid in [1, 2] {
        enter(&mut core, vpid, 0, 0);
        assert_eq!((6, 6), misses(&mut core, &pages));
    }
    for gva in [SMALL + 0x1234, GLOBAL, LARGE + 0xFFF, FAR] {
        // A global page's data translation leaves none of other spaces: each VPID fills it anew.
        enter(&mut core, 1, 0, 0);
        misses(&mut core, &pages);
        vmx::invvpid(&mut core, 0, 1, gva).unwrap();
        assert_eq!((1, 1), misses(&mut core, &[gva]), "{gva:#x} stayed");
        assert_eq!((0, 0), misses(&mut core, &pages), "{gva:#x} was not all that went");
        enter(&mut core, 2, 0, 0);
        assert_eq!((1, 0), misses(&mut core, &pages), "{gva:#x} of VPID 1 dropped VPID 2's at once");
        vmx::invvpid(&mut core, 0, 1, gva).unwrap();
        assert_eq!((0, 0), misses(&mut core, &pages), "{gva:#x} of VPID 1 dropped VPID 2's");
        enter(&mut core, 1, 0, 0);
        assert_eq!(1, misses(&mut core, &pages).1, "{gva:#x} of VPID 1 was not dropped from VPID 2");
    }
}

#[test]
fn a_large_page_goes_as_a_whole() {
    let mut core = core();
    let pieces = [LARGE, LARGE + 0x7000, LARGE + (2 << 20) - 0x1000];
    for at in pieces {
        enter(&mut core, 1, 0, 0);
        misses(&mut core, &pieces);
        misses(&mut core, &[SMALL, FAR]);
        vmx::invvpid(&mut core, 0, 1, at + 5).unwrap();
        assert_eq!((0, 0), misses(&mut core, &[SMALL, FAR]));
        assert_eq!((3, 3), misses(&mut core, &pieces));
    }
}

#[test]
fn the_address_goes_for_all_pcids_and_ept_roots() {
    let mut core = core();
    let spaces = EPTS.into_iter().flat_map(|ept| (0..3).map(move |pcid| (ept, pcid)));
    let visit = |core: &mut Core, at: u64| -> Vec<(u64, u64)> {
        let each = |(ept, pcid)| {
            enter(core, 1, ept, pcid);
            misses(core, &[at])
        };
        spaces.clone().map(each).collect()
    };
    // (Of a global page the data TLB holds one translation only: the fetches tell the spaces apart.)
    let fetches = |of: Vec<(u64, u64)>| of.into_iter().map(|m| m.1).collect::<Vec<_>>();
    for (page, other, filled) in [(SMALL, FAR, [1; 6]), (GLOBAL, SMALL, [1, 0, 0, 1, 0, 0])] {
        visit(&mut core, page);
        visit(&mut core, other);
        vmx::invvpid(&mut core, 0, 1, page).unwrap();
        assert_eq!(vec![0; 6], fetches(visit(&mut core, other)));
        assert_eq!(filled.to_vec(), fetches(visit(&mut core, page)), "{page:#x}");
    }
}

#[test]
fn the_walker_forgets_the_tables_on_the_way_to_the_address() {
    let mut core = core();
    core.tlb.caches.resize(16, 0);
    let references = |core: &mut Core, at: u64| {
        let before: u64 = core.counts.walk_guest.iter().sum();
        core.translate(at, Access::Read).unwrap();
        core.counts.walk_guest.iter().sum::<u64>() - before
    };
    for vpid in [1, 2] {
        enter(&mut core, vpid, 0, 0);
        misses(&mut core, &[SMALL, FAR]);
    }
    enter(&mut core, 1, 0, 0);
    assert_eq!(1, references(&mut core, SMALL + 0x1000), "the way to a neighbour is known");
    vmx::invvpid(&mut core, 0, 1, SMALL).unwrap();
    assert_eq!(1, references(&mut core, FAR + 0x1000), "another table's place was forgotten");
    assert_eq!(4, references(&mut core, SMALL), "the place of a table was remembered");
    enter(&mut core, 2, 0, 0);
    assert_eq!(1, references(&mut core, SMALL + 0x2000), "another VPID's was forgotten");
}

#[test]
fn a_vpid_of_very_many_spaces_keeps_nothing_stale() {
    let mut core = core();
    let pcids = 0..200;
    for pcid in pcids.clone() {
        enter(&mut core, 1, 0, pcid);
        misses(&mut core, &[SMALL, GLOBAL]);
    }
    core.mem.store(ROOT + 0x3000, 8, 10 << 20 | 3);
    vmx::invvpid(&mut core, 0, 1, SMALL).unwrap();
    for pcid in pcids {
        enter(&mut core, 1, 0, pcid);
        for access in [Access::Read, Access::Fetch] {
            assert_eq!(Some(10 << 20), core.translate(SMALL, access).ok().map(|t| t.0));
        }
    }
}
