//! A hypervisor that is code in the machine: the same VMX, with operands from registers and
//! memory, outcomes in RFLAGS, and VM exits that go to the host RIP.

mod vmx_bed;

use silicon::arch::bits::rflags;
use silicon::arch::exit::reason;
use silicon::arch::segment::TableRegister;
use silicon::arch::vmcs as f;
use silicon::processor::EngineKind;
use silicon::vmx::instructions as vmx;
use vmx_bed::*;

/// Where the hypervisor's code is, and its page tables (the first 2 MBytes, identically).
const HOST_CODE: u64 = 0x3_0000;
const HOST_EXIT: u64 = 0x3_0100;
const HOST_TABLES: u64 = 0x4_0000;
const HOST_DATA: u64 = 0x3_1000;

/// Root operation with paging; the processor is about to execute `code` at `HOST_CODE`.
fn host(bed: &mut Bed, code: &[u8]) {
    let core = bed.core();
    core.mem.write_bytes(HOST_CODE, code);
    core.mem.store(HOST_TABLES, 8, HOST_TABLES + 0x1007);
    core.mem.store(HOST_TABLES + 0x1000, 8, HOST_TABLES + 0x2007);
    core.mem.store(HOST_TABLES + 0x2000, 8, 0x87);
    (core.cr3, core.rip, core.gpr[4]) = (HOST_TABLES, HOST_CODE, 0x5_0000);
    core.refresh();
}

#[test]
fn exits_go_to_the_host_rip_and_the_loop_counts_them() {
    let mut bed = Bed::new();
    bed.code(&[0x0F, 0xA2, 0xEB, 0xFC]); // again: cpuid; jmp again
    // vmlaunch; hlt
    host(&mut bed, &[0x0F, 0x01, 0xC2, 0xF4]);
    bed.write(f::HOST_CR3, HOST_TABLES).write(f::HOST_RIP, HOST_EXIT);
    // mov ecx, GUEST_RIP; vmread rax, rcx; add rax, 2; vmwrite rcx, rax; inc ebx; cmp ebx, 100;
    // je +3; vmresume; hlt
    bed.core().mem.write_bytes(
        HOST_EXIT,
        &[
            0xB9, 0x1E, 0x68, 0x00, 0x00, 0x0F, 0x78, 0xC8, 0x48, 0x83, 0xC0, 0x02, 0x0F, 0x79, 0xC8, 0xFF,
            0xC3, 0x83, 0xFB, 0x64, 0x74, 0x03, 0x0F, 0x01, 0xC3, 0xF4,
        ],
    );

    let e = bed.run();

    assert_eq!(reason::HALT, e.reason);
    let core = bed.core();
    assert_eq!((100, 100, 100), (core.gpr[3], core.counts.entries, core.counts.exits[10]));
    assert_eq!((HOST_EXIT + 26, false), (core.rip, core.vmx.non_root));
}

#[test]
fn outcomes_are_in_rflags() {
    /// Code (followed by hlt), RAX, RCX; CF, ZF, VM-instruction error.
    type Row = (&'static [u8], u64, u64, bool, bool, u64);
    let rows: &[Row] = &[
        (&[0x0F, 0x78, 0xC8], 0, 0x6800, false, false, 0), // vmread rax, rcx
        (&[0x0F, 0x78, 0xC8], 0, 0x6C18, false, true, 12),
        (&[0x0F, 0x78, 0xC8], 0, 1 << 32, false, true, 12),
        (&[0x0F, 0x79, 0xC8], 0, 0x6400, false, true, 13), // vmwrite rcx, rax
        (&[0x0F, 0x01, 0xC3], 0, 0, false, true, 5),       // vmresume
        (&[0x0F, 0x01, 0xC1], 0, 0, false, true, 1),       // vmcall
        (&[0x66, 0x0F, 0xC7, 0x30], HOST_DATA, 0, false, true, 2), // vmclear [rax]
        (&[0x66, 0x0F, 0xC7, 0x30], HOST_DATA + 8, 0, false, true, 3),
        (&[0x0F, 0xC7, 0x30], HOST_DATA + 16, 0, false, false, 0), // vmptrld [rax]
        (&[0xF3, 0x0F, 0xC7, 0x30], HOST_DATA + 8, 0, false, true, 15), // vmxon [rax]
        (&[0x66, 0x0F, 0x38, 0x80, 0x08], HOST_DATA, 9, false, true, 28), // invept rcx, [rax]
        (&[0x66, 0x0F, 0x38, 0x80, 0x08], HOST_DATA, 2, false, false, 0),
        (&[0x66, 0x0F, 0x38, 0x81, 0x08], HOST_DATA, 2, false, false, 0), // invvpid rcx, [rax]
        (&[0x0F, 0x01, 0xC4], 0, 0, false, false, 0),                     // vmxoff
    ];
    for &(code, rax, rcx, cf, zf, number) in rows {
        let mut bed = Bed::new();
        host(&mut bed, &[code, &[0xF4]].concat());
        let core = bed.core();
        (core.gpr[0], core.gpr[1]) = (rax, rcx);
        core.rflags = 2 | rflags::ARITH;
        for (i, value) in [0x800, VMXON, OTHER_VMCS].into_iter().enumerate() {
            core.mem.store(HOST_DATA + 8 * i as u64, 8, value);
        }
        assert_eq!(reason::HALT, bed.run().reason, "{code:x?}");
        let core = bed.core();
        assert_eq!((cf, zf), (core.flag(rflags::CF), core.flag(rflags::ZF)), "{code:x?} {rax:#x}");
        assert!(!core.flag(rflags::OF | rflags::SF | rflags::PF | rflags::AF));
        if number != 0 {
            assert_eq!(number, bed.read(f::VM_INSTRUCTION_ERROR), "{code:x?}");
        }
    }
}

#[test]
fn vmptrst_and_a_read_into_memory_write_memory() {
    let mut bed = Bed::new();
    // vmptrst [rax]; vmread [rax+8], rcx; hlt
    host(&mut bed, &[0x0F, 0xC7, 0x38, 0x0F, 0x78, 0x48, 0x08, 0xF4]);
    let core = bed.core();
    (core.gpr[0], core.gpr[1]) = (HOST_DATA, u64::from(f::GUEST_CR3));
    bed.run();
    let mem = &bed.core().mem;
    assert_eq!((VMCS, PML4), (mem.load(HOST_DATA, 8), mem.load(HOST_DATA + 8, 8)));
}

#[test]
fn without_a_current_vmcs_carry_is_set() {
    let mut bed = Bed::root();
    host(&mut bed, &[0x0F, 0x01, 0xC2, 0xF4]);
    assert_eq!(reason::HALT, bed.run().reason);
    assert!(bed.core().flag(rflags::CF) && !bed.core().flag(rflags::ZF));
}

#[test]
fn privilege_and_mode_come_first() {
    let no_vmx: fn(&mut Bed) = |b| vmx::vmxoff(b.core()).unwrap();
    let level_3: fn(&mut Bed) = |b| b.core().cpl = 3;
    let no_vmxe: fn(&mut Bed) = |b| {
        vmx::vmxoff(b.core()).unwrap();
        b.core().cr4 &= !0x2000;
    };
    let locked: fn(&mut Bed) = |b| {
        vmx::vmxoff(b.core()).unwrap();
        b.core().msr.feature_control = 1;
    };
    let code32: fn(&mut Bed) = |b| b.core().seg[1].attr = 0xC09B;
    for (name, code, arrange, expected) in [
        ("VMLAUNCH outside VMX operation", &[0x0F, 0x01, 0xC2][..], no_vmx, 6),
        ("VMCALL outside VMX operation", &[0x0F, 0x01, 0xC1], no_vmx, 6),
        ("VMXON without CR4.VMXE", &[0xF3, 0x0F, 0xC7, 0x30], no_vmxe, 6),
        ("VMXON locked out", &[0xF3, 0x0F, 0xC7, 0x30], locked, 13),
        ("VMREAD at level 3", &[0x0F, 0x78, 0xC8], level_3, 13),
        ("VMCALL in compatibility mode", &[0x0F, 0x01, 0xC1], code32, 6),
        ("VMFUNC, not offered", &[0x0F, 0x01, 0xD4], |_| (), 6),
    ] {
        let mut bed = Bed::new();
        host(&mut bed, code);
        bed.core().gpr[0] = HOST_DATA;
        arrange(&mut bed);
        bed.core().refresh();
        let trap = silicon::cpu::step::step(bed.core()).unwrap_err();
        let silicon::cpu::trap::Trap::Exception(e) = trap else { panic!("{name}: {trap:?}") };
        assert_eq!(expected, e.vector, "{name}");
    }
}

#[test]
fn vmxon_in_the_machine_brings_root_operation() {
    let mut bed = Bed::root();
    vmx::vmxoff(bed.core()).unwrap();
    host(&mut bed, &[0xF3, 0x0F, 0xC7, 0x30, 0xF4]);
    bed.core().gpr[0] = HOST_DATA;
    bed.core().mem.store(HOST_DATA, 8, VMXON);
    assert_eq!(reason::HALT, bed.run().reason);
    let core = bed.core();
    assert!(core.vmx.is_on && core.vmx.vmxon_region == VMXON && !core.flag(rflags::ARITH));
}

#[test]
fn a_kick_stops_the_run_and_is_no_interrupt_to_a_hypervisor_in_the_machine() {
    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]).set(PIN, silicon::vmx::controls::pin::EXTERNAL_INTERRUPT_EXITING);
    host(&mut bed, &[0x0F, 0x01, 0xC2]);
    assert_eq!(reason::BUDGET, bed.run().reason);
    bed.core().agent.ring(silicon::bus::news::KICK);
    assert_eq!(reason::KICK, bed.run().reason);
    assert!(bed.core().vmx.non_root && !bed.core().vmx.is_host_outside);
}

#[test]
fn a_preemption_timer_expires_in_time_after_an_entry_by_code_in_the_machine() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for ticks in [0, 1, 5] {
            let mut bed = Bed::on(engine);
            bed.code(&[0x90; 64]).set(PIN, TIMER_ON).write(f::PREEMPTION_TIMER_VALUE, ticks);
            host(&mut bed, &[0x90, 0x90, 0x0F, 0x01, 0xC2, 0xF4]); // nop; nop; vmlaunch; hlt
            bed.write(f::HOST_CR3, HOST_TABLES).write(f::HOST_RIP, HOST_EXIT);
            bed.core().mem.write_bytes(HOST_EXIT, &[0xF4]);
            assert_eq!(reason::HALT, bed.run().reason);
            // The clock counts VMLAUNCH itself.
            let done = ticks.saturating_sub(1);
            let found = (bed.read(f::EXIT_REASON), bed.read(f::GUEST_RIP) - CODE);
            assert_eq!((u64::from(reason::PREEMPTION_TIMER), done), found, "{engine:?} {ticks}");
        }
    }
}

#[test]
fn vm_entry_under_mov_ss_fails_and_under_sti_does_not() {
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for (code, number) in [
            (&[0x8E, 0xD0, 0x0F, 0x01, 0xC2, 0xF4][..], 26), // mov ss, eax; vmlaunch; hlt
            (&[0x8E, 0xD0, 0x0F, 0x01, 0xC3, 0xF4], 26),     // mov ss, eax; vmresume; hlt
            (&[0x8E, 0xD0, 0x90, 0x0F, 0x01, 0xC3, 0xF4], 5), // a NOP between: VMRESUME, not launched
            (&[0xFB, 0x0F, 0x01, 0xC3, 0xF4], 5),            // sti; vmresume; hlt
        ] {
            let mut bed = Bed::on(engine);
            host(&mut bed, code);
            let core = bed.core();
            core.mem.store(0x5_1008, 8, 0x00AF_9B00_0000_FFFF);
            core.mem.store(0x5_1010, 8, 0x00CF_9300_0000_FFFF);
            core.gdtr = TableRegister { base: 0x5_1000, limit: 0x17 };
            core.gpr[0] = 0x10;
            assert_eq!(reason::HALT, bed.run().reason, "{engine:?} {code:x?}");
            assert!(bed.core().flag(rflags::ZF));
            assert_eq!(number, bed.read(f::VM_INSTRUCTION_ERROR), "{engine:?} {code:x?}");
        }
    }
}
