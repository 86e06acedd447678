//! APIC virtualization (SDM 3C, "APIC Virtualization and Virtual Interrupts"): which accesses exit,
//! and how; the capabilities.  What virtual interrupts do is in `vmx_virtual_interrupts.rs`.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{exit, pin, primary, secondary as s};
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

type Break = fn(&mut Bed);

const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];

/// All of it, by MSR.
fn plain(engine: EngineKind) -> Bed {
    let mut bed = Bed::on(engine);
    bed.virtualize_apic(true, true, true);
    bed
}

#[test]
fn the_exits_of_virtualized_writes_come_before_a_single_step_and_leave_it_pending() {
    // wrmsr of EOI, whose vector exits, and of SELF_IPI with an illegal vector
    for (index, value, exit) in
        [(0x80B, 0, (reason::VIRTUALIZED_EOI, 0x66)), (0x83F, 3, (reason::APIC_WRITE, 0x3F0))]
    {
        for engine in [EngineKind::Reference, EngineKind::Dbt] {
            let mut bed = plain(engine);
            bed.code(&[0x0F, 0x30]).write(f::GUEST_RFLAGS, 0x102).write(f::GUEST_INTERRUPT_STATUS, 0x6600);
            bed.write(f::EOI_EXIT_BITMAP_1, 1 << (0x66 - 64));
            (bed.core().gpr[0], bed.core().gpr[1]) = (value, index);
            let e = bed.launch();
            assert_eq!(exit, (e.reason, e.qualification));
            let pending = bed.read(f::GUEST_PENDING_DEBUG_EXCEPTIONS);
            assert_eq!((CODE + 2, 1 << 14), (bed.read(f::GUEST_RIP), pending));
        }
    }
}

#[test]
fn fetches_and_wide_or_crossing_accesses_of_the_access_page_exit() {
    // mov rax, [rbx]; mov eax, [rbx]; mov [rbx], eax; jmp rbx
    const READ_8: &[u8] = &[0x48, 0x8B, 0x03];
    const READ: &[u8] = &[0x8B, 0x03];
    const WRITE: &[u8] = &[0x89, 0x03];
    const JUMP: &[u8] = &[0xFF, 0xE3];
    for (code, offset, kind) in [
        (READ_8, 0x80, Some(0)),
        (READ, 0x81, Some(0)),
        (READ, 0x8C, Some(0)),
        (READ, 0x90, Some(0)),  // arbitration priority
        (READ, 0xA0, Some(0)),  // processor priority
        (READ, 0x390, Some(0)), // current count
        (READ, 0x30, None),
        (READ, 0x1F0, None),
        (READ, 0x3E0, None),
        (WRITE, 0x30, Some(1)),
        (WRITE, 0x100, Some(1)),
        (WRITE, 0x3F0, Some(1)),
        (WRITE, 0x400, Some(1)),
        (WRITE, 0x310, None),
        (JUMP, 0x80, Some(2)),
    ] {
        for engine in [EngineKind::Reference, EngineKind::Dbt] {
            let mut bed = Bed::on(engine);
            bed.virtualize_apic(false, true, true);
            bed.code(&[code, &VMCALL].concat()).core().gpr[3] = PAGE + offset;
            let e = bed.launch();
            let want = kind.map_or((reason::VMCALL, 0), |kind| (reason::APIC_ACCESS, offset | kind << 12));
            assert_eq!(want, (e.reason, e.qualification), "{code:x?} {offset:#x}");
        }
    }
}

#[test]
fn the_capabilities_and_their_checks() {
    let caps = |index| silicon::vmx::capabilities::read(index).unwrap() >> 32;
    let second = s::VIRTUALIZE_X2APIC_MODE | s::APIC_REGISTER_VIRTUALIZATION | s::VIRTUAL_INTERRUPT_DELIVERY;
    assert_eq!(u64::from(second), caps(0x48B) & u64::from(second));
    assert_ne!(0, caps(0x481) & caps(0x48D) & u64::from(pin::PROCESS_POSTED_INTERRUPTS));
    let rows: [(&str, Break); 11] = [
        ("both sorts of APIC", |b| _ = b.set(SECONDARY, s::VIRTUALIZE_APIC_ACCESSES)),
        ("no TPR shadow", |b| _ = b.clear(PRIMARY, primary::USE_TPR_SHADOW)),
        ("no interrupt exits", |b| _ = b.clear(PIN, pin::EXTERNAL_INTERRUPT_EXITING)),
        ("posting without delivery", |b| _ = b.clear(SECONDARY, s::VIRTUAL_INTERRUPT_DELIVERY)),
        ("no acknowledgment", |b| _ = b.clear(f::EXIT_CONTROLS, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT)),
        ("a wide vector", |b| _ = b.write(f::POSTED_INTERRUPT_NOTIFICATION_VECTOR, 0x100)),
        ("an unaligned descriptor", |b| _ = b.write(f::POSTED_INTERRUPT_DESCRIPTOR, DESCRIPTOR + 32)),
        ("a descriptor beyond the width", |b| _ = b.write(f::POSTED_INTERRUPT_DESCRIPTOR, 1 << 46)),
        ("registers without the shadow", |b| {
            b.clear(PIN, pin::PROCESS_POSTED_INTERRUPTS).clear(PRIMARY, primary::USE_TPR_SHADOW);
            b.write(SECONDARY, u64::from(s::APIC_REGISTER_VIRTUALIZATION));
        }),
        ("x2APIC mode without the shadow", |b| {
            b.clear(PIN, pin::PROCESS_POSTED_INTERRUPTS).clear(PRIMARY, primary::USE_TPR_SHADOW);
            b.write(SECONDARY, u64::from(s::VIRTUALIZE_X2APIC_MODE));
        }),
        ("a threshold that counts", |b| {
            b.clear(PIN, pin::PROCESS_POSTED_INTERRUPTS).clear(SECONDARY, s::VIRTUAL_INTERRUPT_DELIVERY);
            b.write(f::TPR_THRESHOLD, 1);
        }),
    ];
    for (name, broken) in rows {
        let mut bed = plain(EngineKind::Reference);
        broken(&mut bed);
        assert_eq!(Err(vmx::VmFail(7)), bed.try_launch(), "{name}");
    }
    // Under "virtual-interrupt delivery" there is no threshold.
    let mut bed = plain(EngineKind::Reference);
    bed.code(&VMCALL).write(f::TPR_THRESHOLD, 0x1F);
    assert_eq!(reason::VMCALL, bed.launch().reason);
}
