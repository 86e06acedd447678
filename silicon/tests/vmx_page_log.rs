//! Page-modification logging (SDM 3C, "Page-Modification Logging"), on both engines.

mod vmx_bed;

use silicon::arch::bits::ept::{A, D};
use silicon::arch::exit::{Exit, reason};
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::secondary::ENABLE_PML;
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

const LOG: u64 = 0x9000;
/// The EPT's last table: `GUEST` is mapped in pages of 4 KBytes.
const LAST: u64 = EPT + 0x3000;
/// The guest's tables, which its walks write to as far as the EPT is concerned.
const TABLES: [u64; 3] = [PML4, PML4 + 0x1000, PML4 + 0x2000];

fn beds() -> [Bed; 2] {
    [EngineKind::Reference, EngineKind::Dbt].map(|engine| {
        let mut bed = Bed::on(engine);
        let mem = bed.core().mem.clone();
        for page in 0..512 {
            mem.store(LAST + 8 * page, 8, (GUEST + (page << 12)) | 0x37);
        }
        mem.store(EPT + 0x2000, 8, LAST | 7);
        bed.write(f::EPT_POINTER, EPT | 0x5E).set(SECONDARY, ENABLE_PML);
        bed.write(f::PML_ADDRESS, LOG).write(f::PML_INDEX, 511);
        bed
    })
}

/// What stands in the log, the oldest first.
fn logged(bed: &mut Bed) -> Vec<u64> {
    let index = bed.read(f::PML_INDEX);
    let first = if index > 511 { 0 } else { index + 1 };
    (first..512).rev().map(|i| bed.core().mem.load(LOG + 8 * i, 8)).collect()
}

fn flags(bed: &mut Bed, gpa: u64) -> u64 {
    bed.core().mem.load(LAST + (gpa >> 12) * 8, 8) & (A | D)
}

#[test]
fn each_page_that_becomes_dirty_is_logged_once() {
    for mut bed in beds() {
        // mov [5008h], al; mov [6000h], al; mov [5010h], al; mov al, [7000h]; vmcall; jmp
        bed.code(&[
            0x88, 0x04, 0x25, 0x08, 0x50, 0, 0, 0x88, 0x04, 0x25, 0, 0x60, 0, 0, 0x88, 0x04, 0x25, 0x10,
            0x50, 0, 0, 0x8A, 0x04, 0x25, 0, 0x70, 0, 0, 0x0F, 0x01, 0xC1, 0xEB, 0xDF,
        ]);
        assert_eq!(reason::VMCALL, bed.launch().reason);
        let all = [&TABLES[..], &[0x5000, 0x6000]].concat();
        assert_eq!((506, all.clone()), (bed.read(f::PML_INDEX), logged(&mut bed)));
        assert_eq!((A | D, A, A), (flags(&mut bed, 0x5000), flags(&mut bed, 0x7000), flags(&mut bed, CODE)));
        // Dirty pages are not logged again until their flag is cleared and the EPT invalidated.
        bed.write(f::GUEST_RIP, CODE);
        assert_eq!(reason::VMCALL, bed.resume().reason);
        assert_eq!(506, bed.read(f::PML_INDEX));
        bed.core().mem.store(LAST + 5 * 8, 8, (GUEST + 0x5000) | 0x37);
        vmx::invept(bed.core(), 1, EPT | 0x5E).unwrap();
        bed.write(f::GUEST_RIP, CODE);
        assert_eq!(reason::VMCALL, bed.resume().reason);
        assert_eq!([&all[..], &[0x5000]].concat(), logged(&mut bed));
    }
}

#[test]
fn without_accessed_and_dirty_flags_or_without_the_control_nothing_is_logged() {
    let without_flags: fn(&mut Bed) = |b| _ = b.write(f::EPT_POINTER, EPT | 0x1E);
    let without_control: fn(&mut Bed) = |b| _ = b.clear(SECONDARY, ENABLE_PML);
    for (change, dirty) in [(without_flags, 0), (without_control, A | D)] {
        for mut bed in beds() {
            bed.code(&[0x88, 0x04, 0x25, 0, 0x50, 0, 0, 0x0F, 0x01, 0xC1]);
            bed.write(f::PML_INDEX, 0xFFFF);
            change(&mut bed);
            assert_eq!(reason::VMCALL, bed.launch().reason);
            assert_eq!((0xFFFF, dirty), (bed.read(f::PML_INDEX), flags(&mut bed, 0x5000)));
        }
    }
}

#[test]
fn a_full_log_exits_before_the_access_and_its_flags() {
    for mut bed in beds() {
        // mov [5000h], al; mov [6000h], al; vmcall
        bed.code(&[0x88, 0x04, 0x25, 0, 0x50, 0, 0, 0x88, 0x04, 0x25, 0, 0x60, 0, 0, 0x0F, 0x01, 0xC1]);
        // Room for the three tables and one page.
        bed.write(f::PML_INDEX, 3).core().gpr[0] = 0x5A;
        let e = bed.launch();
        assert_eq!(Exit::new(reason::PML_FULL, 0), e);
        assert_eq!((0xFFFF, CODE + 7), (bed.read(f::PML_INDEX), bed.read(f::GUEST_RIP)));
        assert_eq!(0x1_0002, bed.read(f::GUEST_RFLAGS)); // RF, as after a fault
        assert_eq!(0, flags(&mut bed, 0x6000));
        let mem = bed.core().mem.clone();
        assert_eq!((0x5A, 0), (mem.load(GUEST + 0x5000, 1), mem.load(GUEST + 0x6000, 1)));
        assert_eq!((0x5000, PML4), (mem.load(LOG, 8), mem.load(LOG + 24, 8)));
        // With room again it goes on.
        bed.write(f::PML_INDEX, 511);
        assert_eq!(reason::VMCALL, bed.resume().reason);
        assert_eq!(vec![0x6000], logged(&mut bed));
        assert_eq!(0x5A, mem.load(GUEST + 0x6000, 1));
    }
}

#[test]
fn a_full_log_exits_even_for_an_accessed_flag_but_an_ept_violation_comes_first() {
    for index in [512, 0xFFFF] {
        for mut bed in beds() {
            bed.code(&[0x0F, 0x01, 0xC1]);
            bed.write(f::PML_INDEX, index);
            assert_eq!(reason::PML_FULL, bed.launch().reason);
            assert_eq!((0, index), (flags(&mut bed, PML4), bed.read(f::PML_INDEX)));
            assert_eq!(0, bed.core().mem.load(EPT, 8) & A);
            // All are dirty but the page of the code, which is not accessed.
            let mem = bed.core().mem.clone();
            for at in [EPT, EPT + 0x1000, EPT + 0x2000].into_iter().chain(TABLES.map(|t| LAST + (t >> 9))) {
                mem.store(at, 8, mem.load(at, 8) | A | D);
            }
            vmx::invept(bed.core(), 2, 0).unwrap();
            assert_eq!((reason::PML_FULL, 0), (bed.resume().reason, flags(&mut bed, CODE)));
            mem.store(LAST + 8, 8, (GUEST + 0x1000) | 0x33); // not executable
            vmx::invept(bed.core(), 2, 0).unwrap();
            assert_eq!(reason::EPT_VIOLATION, bed.resume().reason);
        }
    }
}

#[test]
fn the_event_that_was_on_its_way_is_reported() {
    for mut bed in beds() {
        bed.code(&[0x0F, 0x01, 0xC1]).gate(0x41, 0x100).code_at(0x100, &[0x0F, 0x01, 0xC1]);
        bed.write(f::ENTRY_INTERRUPTION_INFORMATION, 1 << 31 | 0x41).write(f::GUEST_RFLAGS, 0x202);
        bed.write(f::PML_INDEX, 2); // for the tables
        let e = bed.launch();
        assert_eq!((reason::PML_FULL, 1 << 31 | 0x41), (e.reason, e.idt_info));
        assert_eq!((CODE, 0x202), (bed.read(f::GUEST_RIP), bed.read(f::GUEST_RFLAGS)));
        bed.write(f::PML_INDEX, 511).write(f::ENTRY_INTERRUPTION_INFORMATION, u64::from(e.idt_info));
        assert_eq!((reason::VMCALL, CODE + 0x100), (bed.resume().reason, bed.read(f::GUEST_RIP)));
        assert_eq!(vec![STACK - 0x1000], logged(&mut bed));
    }
}

#[test]
fn the_capability_and_its_checks() {
    let caps = silicon::vmx::capabilities::read(0x48B).unwrap();
    assert_ne!(0, caps >> 32 & u64::from(ENABLE_PML));
    let rows: [fn(&mut Bed); 3] = [
        |b| _ = b.write(f::PML_ADDRESS, LOG + 8),
        |b| _ = b.write(f::PML_ADDRESS, 1 << 46),
        |b| _ = b.write(SECONDARY, u64::from(ENABLE_PML)),
    ];
    for broken in rows {
        let [mut bed, _] = beds();
        broken(&mut bed);
        assert_eq!(Err(vmx::VmFail(7)), bed.try_launch());
    }
}
