//! VM entries and exits as host software outside sees them.

mod vmx_bed;

use silicon::arch::exit::reason;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{entry, exit, pin, secondary};
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

#[test]
fn a_64_bit_guest_under_ept_runs_until_its_exception() {
    let mut bed = Bed::new();
    // mov rax, 0x1122334455667788; mov [0x9000], rax; ud2
    bed.code(&[0x48, 0xB8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11])
        .code_at(10, &[0x48, 0x89, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00, 0x0F, 0x0B]);

    let e = bed.launch();

    assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0306, false), (e.reason, e.intr_info, e.entry_failure));
    assert_eq!(CODE + 18, bed.read(f::GUEST_RIP));
    assert_eq!(0x1122_3344_5566_7788, bed.core().mem.load(GUEST + 0x9000, 8));
    assert_eq!(0x1122_3344_5566_7788, bed.core().gpr[0]);
}

#[test]
fn an_exit_loads_the_host_and_leaves_the_guest_in_the_vmcs() {
    let mut bed = Bed::new();
    bed.code(&[0xBC, 0x34, 0x12, 0x00, 0x00, 0xFD, 0x0F, 0x0B]); // mov esp, 0x1234; std; ud2

    bed.launch();

    assert_eq!((0x1234, CODE + 6), (bed.read(f::GUEST_RSP), bed.read(f::GUEST_RIP)));
    assert_eq!(2 | 1 << 10 | 1 << 16, bed.read(f::GUEST_RFLAGS)); // DF, and RF for the fault
    let core = bed.core();
    assert_eq!((0x7000, 0xFFFF_8000_0000_1000, 2), (core.gpr[4], core.rip, core.rflags));
    assert!(!core.vmx.non_root && core.vmx.eptp == 0);
}

#[test]
fn an_access_outside_the_ept_reports_addresses_and_kind() {
    let mut bed = Bed::new();
    bed.guest_store(PML4 + 0x2008, 0x20_0087); // the guest maps 2M to 4M, the EPT does not
    bed.code(&[0xC6, 0x04, 0x25, 0x56, 0x34, 0x21, 0x00, 0x01]); // mov byte [0x213456], 1

    let e = bed.launch();

    assert_eq!((reason::EPT_VIOLATION, 0x182), (e.reason, e.qualification));
    assert_eq!((0x21_3456, 0x21_3456), (e.gpa, e.gla));
    assert_eq!(0x21_3456, bed.read(f::GUEST_PHYSICAL_ADDRESS));
    assert_eq!(CODE, bed.read(f::GUEST_RIP));
}

#[test]
fn what_an_exit_saves_the_next_entry_loads() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0x0B]).launch();
    let saved: Vec<u64> =
        f::FIELDS.iter().filter(|x| f::type_of(x.0) == f::Type::Guest).map(|x| bed.read(x.0)).collect();
    bed.resume();
    let again: Vec<u64> =
        f::FIELDS.iter().filter(|x| f::type_of(x.0) == f::Type::Guest).map(|x| bed.read(x.0)).collect();
    assert_eq!(saved, again);
    assert_eq!((2, 2), (bed.core().counts.entries, bed.core().counts.exits[0]));
}

#[test]
fn only_a_clear_vmcs_is_launched_and_only_a_launched_one_resumed() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0x0B]);
    assert_eq!(Err(vmx::VmFail(5)), vmx::vmresume(bed.core()));
    bed.launch();
    assert_eq!(Err(vmx::VmFail(4)), vmx::vmlaunch(bed.core()));
    bed.resume();
    bed.relaunchable().launch();
    assert_eq!(4, bed.read(f::VM_INSTRUCTION_ERROR));
}

#[test]
fn the_preemption_timer_counts_the_tsc_and_its_rest_is_saved() {
    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]); // jmp $
    bed.set(PIN, pin::ACTIVATE_PREEMPTION_TIMER).write(f::PREEMPTION_TIMER_VALUE, 100);
    let before = bed.core().retired();
    assert_eq!(reason::PREEMPTION_TIMER, bed.launch().reason);
    assert_eq!(100, bed.core().retired() - before);
    bed.set(f::EXIT_CONTROLS, exit::SAVE_PREEMPTION_TIMER).write(f::PREEMPTION_TIMER_VALUE, 0);
    assert_eq!(reason::PREEMPTION_TIMER, bed.resume().reason);
    assert_eq!(0, bed.read(f::PREEMPTION_TIMER_VALUE));
    // An exit for another reason saves what is left.
    bed.code(&[0x90, 0x90, 0x0F, 0x0B]).write(f::PREEMPTION_TIMER_VALUE, 100);
    assert_eq!(reason::EXCEPTION_OR_NMI, bed.resume().reason);
    assert_eq!(98, bed.read(f::PREEMPTION_TIMER_VALUE));
}

#[test]
fn a_kick_is_an_external_interrupt_if_those_exit() {
    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]).set(PIN, pin::EXTERNAL_INTERRUPT_EXITING);
    vmx::vmlaunch(bed.core()).unwrap();
    bed.core().agent.ring(silicon::bus::news::KICK);
    let e = bed.run();
    assert_eq!((reason::EXTERNAL_INTERRUPT, 0), (e.reason, e.intr_info));
    bed.clear(PIN, pin::EXTERNAL_INTERRUPT_EXITING);
    vmx::vmresume(bed.core()).unwrap();
    bed.core().agent.ring(silicon::bus::news::KICK);
    assert_eq!(reason::KICK, bed.run().reason);
    assert!(bed.core().vmx.non_root);
    assert_eq!(reason::BUDGET, bed.run().reason);
}

#[test]
fn an_injected_interrupt_runs_the_guests_handler() {
    let mut bed = Bed::new();
    bed.gate(0x30, 0x10).code(&[0xEB, 0xFE]).code_at(0x10, &[0x0F, 0x0B]);
    bed.write(f::GUEST_RFLAGS, 0x202).write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0030);
    let e = bed.launch();
    assert_eq!((reason::EXCEPTION_OR_NMI, CODE + 0x10), (e.reason, bed.read(f::GUEST_RIP)));
    assert_eq!(0x30, bed.read(f::ENTRY_INTERRUPTION_INFORMATION)); // the valid bit is gone
    let frame = bed.read(f::GUEST_RSP);
    assert_eq!((STACK - 40, CODE), (frame, bed.core().mem.load(GUEST + frame, 8)));
}

#[test]
fn an_exit_during_delivery_has_idt_vectoring_information() {
    let mut bed = Bed::new();
    bed.gate(14, 0x10).write(f::GUEST_RSP, 0x20_1000); // the stack is outside the EPT
    bed.guest_store(PML4 + 0x2008, 0x20_0087);
    bed.write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0B0E);
    bed.write(f::ENTRY_EXCEPTION_ERROR_CODE, 7);
    let e = bed.launch();
    assert_eq!((reason::EPT_VIOLATION, 0x8000_0B0E, 7), (e.reason, e.idt_info, e.idt_error));
    assert_eq!(0x8000_0B0E, bed.read(f::IDT_VECTORING_INFORMATION));
    assert_eq!((CODE, 0x20_1000), (bed.read(f::GUEST_RIP), bed.read(f::GUEST_RSP)));
}

#[test]
fn a_real_mode_guest_is_unrestricted() {
    let mut bed = Bed::new();
    bed.clear(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST);
    bed.write(f::GUEST_CR0, 0x30).write(f::GUEST_EFER, 0);
    for n in 0..6 {
        bed.write(f::GUEST_ES + 2 * n, 0).write(f::GUEST_ES_LIMIT + 2 * n, 0xFFFF);
        bed.write(f::GUEST_ES_ACCESS_RIGHTS + 2 * n, if n == 1 { 0x9B } else { 0x93 });
    }
    bed.code(&[0xB8, 0x34, 0x12, 0x8E, 0xD8, 0x0F, 0x0B]); // mov ax, 1234h; mov ds, ax; ud2
    let e = bed.launch();
    assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0306), (e.reason, e.intr_info));
    assert_eq!(0x1234, bed.core().gpr[0] & 0xFFFF);
    assert_eq!(0, bed.read(f::ENTRY_CONTROLS) & u64::from(entry::IA32E_MODE_GUEST));
}

#[test]
fn the_resume_flag_lasts_one_instruction_on_every_engine() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        let mut bed = Bed::on(engine);
        bed.code(&[0x90, 0x90, 0x0F, 0x01, 0xC1]).write(f::GUEST_RFLAGS, 0x1_0002); // nop; nop; vmcall
        assert_eq!(reason::VMCALL, bed.launch().reason);
        assert_eq!(2, bed.read(f::GUEST_RFLAGS), "{engine:?}");
    }
}

#[test]
fn pending_debug_exceptions_are_delivered_unless_mov_ss_holds_them() {
    const B0_AND_STEP: u64 = 0x5001; // B0, enabled breakpoint, BS
    for (shadow, rip) in [(0, CODE), (1, CODE), (2, CODE + 1)] {
        let mut bed = Bed::new();
        bed.code(&[0x90, 0x90]).write(f::GUEST_PENDING_DEBUG_EXCEPTIONS, B0_AND_STEP);
        bed.write(f::GUEST_RFLAGS, 0x302).write(f::GUEST_INTERRUPTIBILITY_STATE, shadow);
        let e = bed.launch();
        assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0301, 0x4001), (e.reason, e.intr_info, e.qualification));
        assert_eq!(rip, bed.read(f::GUEST_RIP), "shadow {shadow}");
    }
}

#[test]
fn virtual_nmi_blocking_is_apart_from_the_processors() {
    let mut bed = Bed::new();
    bed.set(PIN, pin::NMI_EXITING | pin::VIRTUAL_NMIS).gate(2, 0x10);
    bed.code_at(0x10, &[0x0F, 0x01, 0xC1, 0x48, 0xCF]); // vmcall; iretq
    bed.code(&[0x0F, 0xA2]).write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0202);
    assert_eq!(reason::VMCALL, bed.launch().reason);
    assert_eq!((8, false), (bed.read(f::GUEST_INTERRUPTIBILITY_STATE), bed.core().nmi_blocked));
    bed.write(f::GUEST_RIP, CODE + 0x13);
    assert_eq!(reason::CPUID, bed.resume().reason); // IRET ended the blocking
    assert_eq!(0, bed.read(f::GUEST_INTERRUPTIBILITY_STATE));
}

#[test]
fn translations_outlive_exits_with_a_vpid_and_not_without() {
    for (with_vpid, walks) in [(true, 0), (false, 1)] {
        let mut bed = Bed::new();
        bed.code(&[0xA0, 0, 0x90, 0, 0, 0, 0, 0, 0, 0x0F, 0x01, 0xC1]); // mov al, [0x9000]; vmcall
        if !with_vpid {
            bed.clear(SECONDARY, secondary::ENABLE_VPID);
        }
        bed.launch();
        let before = bed.core().counts.clone();
        bed.write(f::GUEST_RIP, CODE);
        assert_eq!(reason::VMCALL, bed.resume().reason);
        let after = &bed.core().counts;
        assert_eq!(walks, after.tlb_misses - before.tlb_misses);
        assert_eq!(walks, after.itlb_misses - before.itlb_misses);
    }
    // INVVPID and INVEPT drop them.
    let drops: [fn(&mut Bed); 3] = [
        |b| vmx::invvpid(b.core(), 1, 1, 0).unwrap(),
        |b| vmx::invept(b.core(), 1, EPT | 0x1E).unwrap(),
        |b| vmx::invept(b.core(), 2, 0).unwrap(),
    ];
    for drop in drops {
        let mut bed = Bed::new();
        bed.code(&[0xA0, 0, 0x90, 0, 0, 0, 0, 0, 0, 0x0F, 0x01, 0xC1]);
        bed.launch();
        drop(&mut bed);
        let before = bed.core().counts.tlb_misses;
        bed.write(f::GUEST_RIP, CODE).resume();
        assert_eq!(1, bed.core().counts.tlb_misses - before);
    }
}
