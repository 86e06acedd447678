//! "Load PKRS" of VM entries and exits (SDM 3C, "VM-Entry Controls", "VM-Exit Controls", "Saving MSRs"), on both
//! engines: what a VMCS says counts for the very next instruction.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{entry, exit};
use vmx_bed::*;

const CR4_PKS: u64 = 1 << 24;
/// A supervisor's page with key 1.
const KEYED: u64 = 0x6000;
/// Access or only writes refused to key 1.
const AD: u64 = 1 << 2;
const WD: u64 = 1 << 3;
/// mov ecx, 50; again: mov rax, [rdx]; loop again; mov [rdx], rax; vmcall
const PROGRAM: [u8; 16] =
    [0xB9, 50, 0, 0, 0, 0x48, 0x8B, 0x02, 0xE2, 0xFB, 0x48, 0x89, 0x02, 0x0F, 0x01, 0xC1];
const READS: u64 = CODE + 5;
const WRITES: u64 = CODE + 10;

fn bed(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    for page in 0..512 {
        let rights = if page == KEYED >> 12 { 1 << 59 | 3 } else { 7 };
        bed.guest_store(PML4 + 0x3000 + 8 * page, page << 12 | rights);
    }
    bed.guest_store(PML4 + 0x2000, (PML4 + 0x3000) | 7);
    bed.code(&PROGRAM).write(f::GUEST_CR4, 0x2020 | CR4_PKS).set(f::ENTRY_CONTROLS, entry::LOAD_PKRS);
    bed
}

/// Run the program with a value of IA32_PKRS: why it ended, where, and the error code of a page fault.
fn run(bed: &mut Bed, pkrs: u64) -> (u32, u64, u32) {
    bed.relaunchable().write(f::GUEST_PKRS, pkrs).write(f::GUEST_RIP, CODE);
    bed.core().gpr[2] = KEYED;
    let e = bed.launch();
    (e.reason, bed.read(f::GUEST_RIP), if e.reason == reason::VMCALL { 0 } else { e.intr_error })
}

#[test]
fn an_entry_loads_the_guests_rights() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        let mut bed = bed(engine);
        for _ in 0..2 {
            assert_eq!((reason::VMCALL, CODE + 13, 0), run(&mut bed, 0), "{engine:?}");
            assert_eq!((reason::EXCEPTION_OR_NMI, WRITES, 0x23), run(&mut bed, WD), "{engine:?}");
            assert_eq!((reason::VMCALL, CODE + 13, 0), run(&mut bed, 0), "{engine:?}");
            assert_eq!((reason::EXCEPTION_OR_NMI, READS, 0x21), run(&mut bed, AD | WD), "{engine:?}");
        }
    }
}

#[test]
fn an_exit_saves_the_guests_and_loads_the_hosts() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        let mut bed = bed(engine);
        bed.write(f::HOST_PKRS, 0x55);
        for (is_loaded, expected) in [(false, 0x30), (true, 0x55)] {
            if is_loaded {
                bed.set(f::EXIT_CONTROLS, exit::LOAD_PKRS);
            }
            run(&mut bed, 0x30);
            assert_eq!((0x30, expected), (bed.read(f::GUEST_PKRS), bed.core().msr.pkrs), "{engine:?}");
        }
        // Not loaded, it goes on with what there is, and that is saved.
        bed.clear(f::ENTRY_CONTROLS, entry::LOAD_PKRS);
        run(&mut bed, 0xC0);
        assert_eq!(0x55, bed.read(f::GUEST_PKRS), "{engine:?}");
    }
}
