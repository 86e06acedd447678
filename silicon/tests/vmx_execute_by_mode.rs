//! Mode-based execute control for EPT (SDM 3C, "EPT Violations"), on both engines.

mod vmx_bed;

use silicon::arch::bits::ept::{R, W, X, XU};
use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{entry, secondary::MODE_BASED_EXECUTE};
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

const LAST: u64 = EPT + 0x3000;
/// Code in two pages: one of the user's, one of the supervisor's.
const USERS: u64 = 0x5000;
const OURS: u64 = 0x6000;

/// A guest in whose tables `OURS` is a supervisor's page; `CODE` jumps to `RAX`.
fn bed(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    let mem = bed.core().mem.clone();
    for at in [EPT, EPT + 0x1000] {
        mem.store(at, 8, mem.load(at, 8) | XU);
    }
    for page in 0..512 {
        mem.store(LAST + 8 * page, 8, (GUEST + (page << 12)) | 0x37 | XU);
        bed.guest_store(PML4 + 0x3000 + 8 * page, page << 12 | if page == OURS >> 12 { 3 } else { 7 });
    }
    mem.store(EPT + 0x2000, 8, LAST | 7 | XU);
    bed.guest_store(PML4 + 0x2000, (PML4 + 0x3000) | 7);
    bed.code(&[0xFF, 0xE0]).set(SECONDARY, MODE_BASED_EXECUTE);
    for at in [USERS, OURS] {
        mem.write_bytes(GUEST + at, &[0x90, 0x0F, 0x01, 0xC1]); // nop; vmcall
    }
    bed
}

fn allow(bed: &mut Bed, gpa: u64, rights: u64) {
    bed.core().mem.store(LAST + (gpa >> 9), 8, (GUEST + gpa) | 0x30 | rights);
    vmx::invept(bed.core(), 2, 0).unwrap();
}

#[test]
fn a_fetch_needs_the_right_of_its_linear_address() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for (at, needs, other) in [(USERS, XU, X), (OURS, X, XU)] {
            let mut bed = bed(engine);
            bed.core().gpr[0] = at;
            allow(&mut bed, at, R | W | needs);
            assert_eq!((reason::VMCALL, at + 1), (bed.launch().reason, bed.read(f::GUEST_RIP)));
            allow(&mut bed, at, R | W | other);
            bed.write(f::GUEST_RIP, CODE);
            let e = bed.resume();
            let shown = if other == X { 7 << 3 } else { 3 << 3 | 1 << 6 };
            assert_eq!((reason::EPT_VIOLATION, 4 | shown | 0x180), (e.reason, e.qualification));
            assert_eq!((at, at, at), (e.gpa, e.gla, bed.read(f::GUEST_RIP)));
            // Without the control X alone counts, and bit 6 of the qualification is 0.
            bed.clear(SECONDARY, MODE_BASED_EXECUTE);
            allow(&mut bed, at, R | XU);
            let e = bed.resume();
            assert_eq!((reason::EPT_VIOLATION, 4 | 1 << 3 | 0x180), (e.reason, e.qualification));
            allow(&mut bed, at, R | X);
            assert_eq!(reason::VMCALL, bed.resume().reason);
        }
    }
}

#[test]
fn the_privilege_level_does_not_matter() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        let mut bed = bed(engine);
        bed.write(f::GUEST_CS, 0x1B).write(f::GUEST_CS_ACCESS_RIGHTS, 0xA0FB);
        bed.write(f::GUEST_SS, 0x23).write(f::GUEST_SS_ACCESS_RIGHTS, 0xC0F3);
        bed.core().gpr[0] = USERS;
        allow(&mut bed, USERS, R | XU);
        assert_eq!((reason::VMCALL, USERS + 1), (bed.launch().reason, bed.read(f::GUEST_RIP)));
        allow(&mut bed, USERS, R | X);
        assert_eq!((reason::EPT_VIOLATION, 0x180 | 5 << 3 | 4), {
            let e = bed.resume();
            (e.reason, e.qualification)
        });
    }
}

#[test]
fn without_paging_linear_addresses_are_user_mode() {
    for (rights, expected) in [(R | XU, reason::VMCALL), (R | X, reason::EPT_VIOLATION)] {
        for engine in [EngineKind::Reference, EngineKind::Dbt] {
            let mut bed = bed(engine);
            bed.write(f::GUEST_CR0, 0x31).write(f::GUEST_EFER, 0).write(f::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
            bed.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).core().gpr[0] = USERS;
            allow(&mut bed, USERS, rights);
            assert_eq!(expected, bed.launch().reason);
        }
    }
}

#[test]
fn an_entry_with_the_users_right_alone_is_present_only_under_the_control() {
    let mut bed = bed(EngineKind::Reference);
    bed.core().gpr[0] = USERS;
    allow(&mut bed, USERS, XU);
    assert_eq!(reason::VMCALL, bed.launch().reason);
    bed.clear(SECONDARY, MODE_BASED_EXECUTE).write(f::GUEST_RIP, USERS);
    allow(&mut bed, USERS, XU | W);
    let e = bed.resume();
    assert_eq!(reason::EPT_MISCONFIG, e.reason); // written, not read
    allow(&mut bed, USERS, XU);
    let e = bed.resume();
    assert_eq!((reason::EPT_VIOLATION, 0x184), (e.reason, e.qualification));
}

#[test]
fn the_capability_and_its_check() {
    let caps = silicon::vmx::capabilities::read(0x48B).unwrap();
    assert_ne!(0, caps >> 32 & u64::from(MODE_BASED_EXECUTE));
    let mut bed = bed(EngineKind::Reference);
    bed.write(SECONDARY, u64::from(MODE_BASED_EXECUTE));
    assert_eq!(Err(vmx::VmFail(7)), bed.try_launch());
}
