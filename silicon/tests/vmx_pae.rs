//! A guest with PAE paging: where its PDPTE registers come from, and where they go (SDM 3A, "PDPTE
//! Registers"; SDM 3C, "Loading Guest Page-Directory-Pointer-Table Entries", "Saving Guest State").

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{entry, secondary};
use vmx_bed::*;

/// Tables of four entries each, and directories that map the first 2 MBytes to themselves.
const FIRST: u64 = 0x3_0020;
const SECOND: u64 = 0x3_0040;
const DIRECTORY: u64 = 0x3_1000;
const OTHER_DIRECTORY: u64 = 0x3_2000;
const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];
const PDPTES: [u32; 4] = [f::GUEST_PDPTE0, f::GUEST_PDPTE1, f::GUEST_PDPTE2, f::GUEST_PDPTE3];

/// A guest in 32-bit code under EPT, whose CR3 names a table of four zeros.
fn guest(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    bed.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST).write(f::GUEST_EFER, 0);
    bed.write(f::GUEST_CS_ACCESS_RIGHTS, 0xC09B).write(f::GUEST_CR3, FIRST);
    bed.write(f::GUEST_PDPTE0, DIRECTORY | 1);
    bed.guest_store(DIRECTORY, 0x87);
    bed.guest_store(OTHER_DIRECTORY, 0x87);
    bed.guest_store(SECOND, OTHER_DIRECTORY | 1);
    bed.guest_store(SECOND + 24, 0x5001);
    bed
}

/// The same guest without EPT, its physical addresses those of the host.
fn guest_without_ept(engine: EngineKind) -> Bed {
    let mut bed = guest(engine);
    bed.clear(f::SECONDARY_CONTROLS, secondary::ENABLE_EPT | secondary::UNRESTRICTED_GUEST);
    bed.write(f::GUEST_CR3, GUEST + FIRST);
    bed.guest_store(DIRECTORY, GUEST | 0x87);
    bed.guest_store(OTHER_DIRECTORY, GUEST | 0x87);
    bed.guest_store(FIRST, GUEST + DIRECTORY + 1);
    bed.guest_store(SECOND, GUEST + OTHER_DIRECTORY + 1);
    bed
}

/// MOV EAX, `cr3`; MOV CR3, EAX; VMCALL.
fn load_cr3(cr3: u64) -> Vec<u8> {
    let mut code = vec![0xB8];
    code.extend_from_slice(&(cr3 as u32).to_le_bytes());
    code.extend_from_slice(&[0x0F, 0x22, 0xD8]);
    code.extend_from_slice(&VMCALL);
    code
}

fn pdptes(bed: &mut Bed) -> [u64; 4] {
    PDPTES.map(|field| bed.read(field))
}

fn on_both(test: fn(EngineKind)) {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        test(engine);
    }
}

#[test]
fn under_ept_an_entry_takes_the_fields_and_not_what_cr3_names() {
    on_both(|engine| {
        let mut bed = guest(engine);
        assert_eq!(reason::VMCALL, bed.code(&VMCALL).launch().reason, "{engine:?}");
        assert_eq!([DIRECTORY | 1, 0, 0, 0], pdptes(&mut bed));
    });
}

#[test]
fn mov_to_cr3_loads_the_registers_and_an_exit_saves_them() {
    on_both(|engine| {
        let mut bed = guest(engine);
        assert_eq!(reason::VMCALL, bed.code(&load_cr3(SECOND)).launch().reason, "{engine:?}");
        assert_eq!([OTHER_DIRECTORY | 1, 0, 0, 0x5001], pdptes(&mut bed));
        assert_eq!(SECOND, bed.read(f::GUEST_CR3));
        // An edit of the table in memory means nothing before the next load.
        bed.guest_store(SECOND, 0);
        bed.code(&VMCALL).write(f::GUEST_RIP, CODE);
        assert_eq!(reason::VMCALL, bed.resume().reason, "{engine:?}");
        assert_eq!(OTHER_DIRECTORY | 1, bed.read(f::GUEST_PDPTE0));
    });
}

#[test]
fn reserved_bits_of_a_present_entry_refuse_the_load_whole() {
    on_both(|engine| {
        for bad in [2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 46, 1 << 63] {
            let mut bed = guest(engine);
            bed.guest_store(SECOND + 16, bad); // not present: nothing is checked
            bed.guest_store(SECOND + 24, 0x5001 | bad);
            let e = bed.code(&load_cr3(SECOND)).launch();
            let what = (e.reason, e.intr_info, e.intr_error, bed.read(f::GUEST_RIP));
            assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0B0D, 0, CODE + 5), what, "{bad:x} {engine:?}");
            assert_eq!((FIRST, DIRECTORY | 1), (bed.read(f::GUEST_CR3), bed.read(f::GUEST_PDPTE0)));
        }
    });
}

#[test]
fn a_table_outside_the_ept_is_a_violation_without_a_linear_address() {
    on_both(|engine| {
        let mut bed = guest(engine);
        let e = bed.code(&load_cr3(0x20_0020)).launch();
        assert_eq!((reason::EPT_VIOLATION, 1, 0x20_0020), (e.reason, e.qualification, e.gpa), "{engine:?}");
        assert_eq!((FIRST, CODE + 5), (bed.read(f::GUEST_CR3), bed.read(f::GUEST_RIP)));
    });
}

#[test]
fn an_absent_register_is_a_page_fault_without_a_reference() {
    on_both(|engine| {
        let mut bed = guest(engine);
        // mov al, [0x40000000]
        let e = bed.code(&[0xA0, 0, 0, 0, 0x40]).launch();
        let what = (e.reason, e.intr_info, e.intr_error, e.qualification);
        assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0B0E, 0, 0x4000_0000), what, "{engine:?}");
        // The fetch's walk alone: one entry of a directory, which maps a large page.
        assert_eq!([0, 0, 1, 0, 0], bed.core().counts.walk_guest[..5]);
    });
}

#[test]
fn without_ept_an_entry_reads_what_cr3_names_and_so_does_mov_to_cr3() {
    on_both(|engine| {
        let mut bed = guest_without_ept(engine);
        bed.write(f::GUEST_PDPTE0, 0); // not looked at
        assert_eq!(reason::VMCALL, bed.code(&VMCALL).launch().reason, "{engine:?}");
        let e = bed.code(&load_cr3(GUEST + SECOND)).write(f::GUEST_RIP, CODE).resume();
        assert_eq!(reason::VMCALL, e.reason, "{engine:?}");
        assert_eq!([GUEST + OTHER_DIRECTORY + 1, 0, 0, 0x5001], pdptes(&mut bed));
    });
}

#[test]
fn without_ept_an_entry_refuses_reserved_bits() {
    let mut bed = guest_without_ept(EngineKind::Reference);
    bed.guest_store(FIRST + 8, 0x5003);
    let e = bed.code(&VMCALL).launch();
    assert_eq!((33, true, 2), (e.reason, e.entry_failure, e.qualification));
}

#[test]
fn paging_in_another_format_leaves_the_fields_alone() {
    let mut bed = Bed::new();
    bed.write(f::GUEST_PDPTE1, 0x1234_5000).code(&VMCALL).launch();
    assert_eq!(0x1234_5000, bed.read(f::GUEST_PDPTE1));
}
