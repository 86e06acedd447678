//! For every control bit: 0, no exit; 1, exactly one exit, with the SDM's reason.

mod vmx_bed;

use silicon::arch::exit::{Exit, reason};
use silicon::arch::vmcs as f;
use silicon::cpu::trap::Trap;
use silicon::processor::EngineKind;
use silicon::vmx::controls::{pin, primary, secondary};
use silicon::vmx::instructions as vmx;
use silicon::vmx::intercept::Sensitive;
use vmx_bed::*;

const READ_DR: Sensitive = Sensitive::MovDr { dr: 7, from_dr: true, reg: 3 };

fn io(port: u16, size: u8) -> Sensitive {
    Sensitive::Io { port, size, is_in: true, is_string: false, is_rep: false, is_imm: true, gla: 0, info: 0 }
}

/// Enter the guest and ask what an instruction does there.
fn ask(bed: &mut Bed, what: Sensitive) -> Result<(), Trap> {
    vmx::vmlaunch(bed.core()).unwrap();
    bed.core().intercept(what, 3)
}

fn exit_of(answer: Result<(), Trap>) -> Option<Exit> {
    match answer {
        Ok(()) => None,
        Err(Trap::Exit(e)) => Some(*e),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn a_control_bit_alone_decides() {
    use primary as p;
    use secondary as s;
    let to_cr = |cr| Sensitive::MovToCr { cr, reg: 2, value: 0x1000 };
    let from_cr = |cr| Sensitive::MovFromCr { cr, reg: 2 };
    let table = Sensitive::GdtrIdtr { displacement: 0x55, info: 0x66 };
    let task = Sensitive::LdtrTr { displacement: 0x55, info: 0x66 };
    let invpcid = Sensitive::Invpcid { displacement: 0x55, info: 0x66 };
    let rows = [
        (PRIMARY, p::HLT_EXITING, Sensitive::Hlt, reason::HLT, 0),
        (PRIMARY, p::INVLPG_EXITING, Sensitive::Invlpg { gva: 0x77 }, reason::INVLPG, 0x77),
        (PRIMARY, p::INVLPG_EXITING, invpcid, reason::INVPCID, 0x55),
        (PRIMARY, p::MWAIT_EXITING, Sensitive::Mwait, reason::MWAIT, 0),
        (PRIMARY, p::MONITOR_EXITING, Sensitive::Monitor, reason::MONITOR, 0),
        (PRIMARY, p::RDPMC_EXITING, Sensitive::Rdpmc, reason::RDPMC, 0),
        (PRIMARY, p::RDTSC_EXITING, Sensitive::Rdtsc, reason::RDTSC, 0),
        (PRIMARY, p::RDTSC_EXITING, Sensitive::Rdtscp, reason::RDTSCP, 0),
        (PRIMARY, p::CR3_LOAD_EXITING, to_cr(3), reason::CR_ACCESS, 0x203),
        (PRIMARY, p::CR3_STORE_EXITING, from_cr(3), reason::CR_ACCESS, 0x213),
        (PRIMARY, p::CR8_LOAD_EXITING, to_cr(8), reason::CR_ACCESS, 0x208),
        (PRIMARY, p::CR8_STORE_EXITING, from_cr(8), reason::CR_ACCESS, 0x218),
        (PRIMARY, p::MOV_DR_EXITING, READ_DR, reason::MOV_DR, 0x317),
        (PRIMARY, p::UNCONDITIONAL_IO_EXITING, io(0x3F8, 1), reason::IO, 0x03F8_0048),
        (PRIMARY, p::PAUSE_EXITING, Sensitive::Pause, reason::PAUSE, 0),
        (SECONDARY, s::WBINVD_EXITING, Sensitive::Wbinvd, reason::WBINVD, 0),
        (SECONDARY, s::DESCRIPTOR_TABLE_EXITING, table, reason::GDTR_IDTR, 0x55),
        (SECONDARY, s::DESCRIPTOR_TABLE_EXITING, task, reason::LDTR_TR, 0x55),
        (SECONDARY, s::RDRAND_EXITING, Sensitive::Rdrand { info: 0x66 }, reason::RDRAND, 0),
        (SECONDARY, s::RDSEED_EXITING, Sensitive::Rdseed { info: 0x66 }, reason::RDSEED, 0),
    ];
    for (word, bit, what, why, qualification) in rows {
        let mut off = Bed::new();
        off.set(SECONDARY, s::ENABLE_RDTSCP | s::ENABLE_INVPCID);
        assert_eq!(Ok(()), ask(&mut off, what), "{what:?}");
        let mut on = Bed::new();
        on.set(SECONDARY, s::ENABLE_RDTSCP | s::ENABLE_INVPCID).set(word, bit);
        let e = exit_of(ask(&mut on, what)).unwrap();
        assert_eq!((why, qualification, 3), (e.reason, e.qualification, e.length), "{what:?}");
        let before = on.core().counts.exits[why as usize];
        silicon::vmx::exit::perform(on.core(), e);
        assert_eq!(before + 1, on.core().counts.exits[why as usize]);
        assert_eq!(u64::from(why), on.read(f::EXIT_REASON));
        assert_eq!(3, on.read(f::EXIT_INSTRUCTION_LENGTH));
    }
}

#[test]
fn some_instructions_always_exit_and_some_must_be_enabled() {
    for (what, why) in [
        (Sensitive::Cpuid, reason::CPUID),
        (Sensitive::Invd, reason::INVD),
        (Sensitive::Xsetbv, reason::XSETBV),
        (Sensitive::TaskSwitch { selector: 0x28, source: 2 }, reason::TASK_SWITCH),
        (Sensitive::Rdmsr { index: 0x10 }, reason::RDMSR),
        (Sensitive::Wrmsr { index: 0x10 }, reason::WRMSR),
    ] {
        let e = exit_of(ask(&mut Bed::new(), what)).unwrap();
        let q = if why == reason::TASK_SWITCH { 0x8000_0028 } else { 0 };
        assert_eq!((why, q), (e.reason, e.qualification));
    }
    for what in [Sensitive::Rdtscp, Sensitive::Invpcid { displacement: 0, info: 0 }] {
        assert!(matches!(ask(&mut Bed::new(), what), Err(Trap::Exception(e)) if e.vector == 6));
    }
}

#[test]
fn in_root_operation_nothing_exits() {
    let mut bed = Bed::new();
    bed.set(PRIMARY, primary::HLT_EXITING);
    for what in [Sensitive::Cpuid, Sensitive::Hlt, Sensitive::Rdtscp, READ_DR] {
        assert_eq!(Ok(()), bed.core().intercept(what, 1));
    }
}

#[test]
fn io_bitmaps_pick_ports_and_a_wrapping_access_exits() {
    // Ports 0x3F9 and 0x8001 are marked.
    for (port, size, exits) in [
        (0x3F8, 1, false),
        (0x3F8, 2, true),
        (0x3F9, 1, true),
        (0x3FA, 4, false),
        (0x8000, 1, false),
        (0x8001, 1, true),
        (0x7FFE, 4, true),
        (0x1, 1, false),
        (0xFFFF, 1, false),
        (0xFFFF, 2, true),
        (0xFFFD, 4, true),
    ] {
        let mut bed = Bed::new();
        bed.set(PRIMARY, primary::USE_IO_BITMAPS | primary::UNCONDITIONAL_IO_EXITING);
        bed.core().mem.store(IO_BITMAP_A + 0x3F9 / 8, 1, 1 << (0x3F9 % 8));
        bed.core().mem.store(IO_BITMAP_B, 1, 1 << 1);
        assert_eq!(exits, exit_of(ask(&mut bed, io(port, size))).is_some(), "{port:#x} {size}");
    }
}

#[test]
fn msr_bitmaps_pick_msrs_by_direction() {
    let marks = [(0, 0x10_u64), (1024, 0x81), (2048, 0x174), (3072, 0x82)];
    for (index, read, write) in [
        (0x10, true, false),
        (0x174, false, true),
        (0xC000_0081, true, false),
        (0xC000_0082, false, true),
        (0xC000_0083, false, false),
        (0x2000, true, true),
        (0xC000_2000, true, true),
        (0x4000_0000, true, true),
    ] {
        for (what, expected) in [(Sensitive::Rdmsr { index }, read), (Sensitive::Wrmsr { index }, write)] {
            let mut bed = Bed::new();
            bed.set(PRIMARY, primary::USE_MSR_BITMAPS);
            for (part, bit) in marks {
                bed.core().mem.store(MSR_BITMAPS + part + bit / 8, 1, 1 << (bit % 8));
            }
            assert_eq!(expected, exit_of(ask(&mut bed, what)).is_some(), "{what:x?}");
        }
    }
}

#[test]
fn host_owned_bits_are_shadowed_and_their_change_exits() {
    let mut bed = Bed::new();
    const MASK: u64 = 1 << 5 | 1 << 3 | 1;
    bed.write(f::CR0_GUEST_HOST_MASK, MASK).write(f::CR0_READ_SHADOW, 1 << 3 | 1);
    vmx::vmlaunch(bed.core()).unwrap();
    let core = bed.core();
    assert_eq!(0x8001_0019, core.read_cr_shadowed(0)); // NE reads 0, TS reads 1
    assert_eq!(0x8001_0031, core.filter_cr_write(0, 0x8001_0018));
    let write = |value| Sensitive::MovToCr { cr: 0, reg: 1, value };
    assert_eq!(Ok(()), core.intercept(write(0x8001_0019), 3));
    let e = exit_of(core.intercept(write(0x8001_0039), 3)).unwrap();
    assert_eq!((reason::CR_ACCESS, 0x100), (e.reason, e.qualification));
    // CLTS exits if the host owns TS and shows it set.
    assert_eq!(0x20, exit_of(core.intercept(Sensitive::Clts, 2)).unwrap().qualification);
    // LMSW cannot clear PE; MP is the guest's.
    let lmsw = |source, gla| Sensitive::Lmsw { source, gla };
    assert_eq!(Ok(()), core.intercept(lmsw(0xA, None), 3));
    let e = exit_of(core.intercept(lmsw(0x1, Some(0x99)), 3)).unwrap();
    assert_eq!((0x1_0070, 0x99), (e.qualification, e.gla));
}

#[test]
fn a_cr3_target_may_be_loaded() {
    for (count, exits) in [(0, true), (1, true), (2, false)] {
        let mut bed = Bed::new();
        bed.set(PRIMARY, primary::CR3_LOAD_EXITING).write(f::CR3_TARGET_COUNT, count);
        bed.write(f::CR3_TARGET_VALUE_0, 0x5000).write(f::CR3_TARGET_VALUE_1, 0x6000);
        let what = Sensitive::MovToCr { cr: 3, reg: 0, value: 0x6000 };
        assert_eq!(exits, exit_of(ask(&mut bed, what)).is_some());
    }
}

#[test]
fn a_pause_loop_exits_when_it_exceeds_the_window() {
    let mut bed = Bed::new();
    bed.set(SECONDARY, secondary::PAUSE_LOOP_EXITING).write(f::PLE_GAP, 10).write(f::PLE_WINDOW, 25);
    vmx::vmlaunch(bed.core()).unwrap();
    let core = bed.core();
    let mut pause = |ticks| {
        core.tsc_skew += ticks;
        core.intercept(Sensitive::Pause, 2).is_err()
    };
    assert_eq!([false; 4], [pause(1), pause(10), pause(10), pause(5)]); // 25 since the first
    assert_eq!([true, false, false], [pause(1), pause(11), pause(10)]); // 11 begins a new loop
}

#[test]
fn the_tsc_is_offset_and_scaled() {
    let mut bed = Bed::new();
    bed.core().tsc_skew = 1000;
    bed.set(PRIMARY, primary::USE_TSC_OFFSETTING).write(f::TSC_OFFSET, 5u64.wrapping_neg());
    vmx::vmlaunch(bed.core()).unwrap();
    assert_eq!(5u64.wrapping_neg(), bed.core().tsc_offset());
    let mut bed = Bed::new();
    bed.core().tsc_skew = 1000;
    bed.set(PRIMARY, primary::USE_TSC_OFFSETTING).set(SECONDARY, secondary::USE_TSC_SCALING);
    bed.write(f::TSC_OFFSET, 7).write(f::TSC_MULTIPLIER, 3 << 48);
    vmx::vmlaunch(bed.core()).unwrap();
    let core = bed.core();
    assert_eq!(3007, core.tsc().wrapping_add(core.tsc_offset()));
}

#[test]
fn the_exception_bitmap_and_the_page_fault_mask_pick_exceptions() {
    use silicon::arch::exception::{Exception, vector};
    let pf = |code| Exception::page_fault(0x1234, code);
    // (bitmap bit 14, mask, match) -> exits with error code 0, 1, 2, 3
    for (bit, mask, matched, exits) in [
        (1, 0, 0, [true, true, true, true]),
        (1, 1, 1, [false, true, false, true]),
        (0, 1, 1, [true, false, true, false]),
        (0, 0, 0, [false; 4]),
        (1, 0, 1, [false; 4]),
        (0, 0, 1, [true; 4]),
    ] {
        let mut bed = Bed::new();
        bed.write(f::EXCEPTION_BITMAP, bit << 14);
        bed.write(f::PAGE_FAULT_ERROR_CODE_MASK, mask).write(f::PAGE_FAULT_ERROR_CODE_MATCH, matched);
        vmx::vmlaunch(bed.core()).unwrap();
        let got = [0, 1, 2, 3].map(|c| silicon::vmx::exit::of_exception(bed.core(), &pf(c)).is_some());
        assert_eq!(exits, got, "{bit} {mask} {matched}");
    }
    for v in 0..32 {
        let mut bed = Bed::new();
        bed.write(f::EXCEPTION_BITMAP, 1 << v);
        vmx::vmlaunch(bed.core()).unwrap();
        for other in (0..32).filter(|&o| o != vector::NMI && o != vector::PF) {
            let exit = silicon::vmx::exit::of_exception(bed.core(), &Exception::plain(other));
            assert_eq!(v == other, exit.is_some());
        }
    }
}

#[test]
fn windows_open_when_nothing_blocks() {
    const BLOCKED_NMI: u64 = 8;
    const STI: u64 = 1;
    let virtual_nmis = pin::NMI_EXITING | pin::VIRTUAL_NMIS;
    for (control, rflags, shadow, activity, expected) in [
        (primary::INTERRUPT_WINDOW_EXITING, 0x202, 0, 0, Some(reason::INTERRUPT_WINDOW)),
        (primary::INTERRUPT_WINDOW_EXITING, 0x202, 0, 1, Some(reason::INTERRUPT_WINDOW)),
        (primary::INTERRUPT_WINDOW_EXITING, 0x002, 0, 0, None),
        (primary::NMI_WINDOW_EXITING, 0x002, 0, 0, Some(reason::NMI_WINDOW)),
        (primary::NMI_WINDOW_EXITING, 0x002, BLOCKED_NMI, 0, None),
    ] {
        let mut bed = Bed::new();
        bed.code(&[0xEB, 0xFE]).set(PRIMARY, control).set(PIN, virtual_nmis);
        bed.write(f::GUEST_RFLAGS, rflags).write(f::GUEST_INTERRUPTIBILITY_STATE, shadow);
        bed.write(f::GUEST_ACTIVITY_STATE, activity);
        let e = bed.launch();
        assert_eq!(expected.unwrap_or(reason::BUDGET), e.reason);
        if expected.is_some() {
            assert_eq!((CODE, activity), (bed.read(f::GUEST_RIP), bed.read(f::GUEST_ACTIVITY_STATE)));
        }
    }
    // Under STI one instruction executes first.
    let mut bed = Bed::new();
    bed.code(&[0x90, 0xEB, 0xFE]).set(PRIMARY, primary::INTERRUPT_WINDOW_EXITING);
    bed.write(f::GUEST_RFLAGS, 0x202).write(f::GUEST_INTERRUPTIBILITY_STATE, STI);
    assert_eq!((reason::INTERRUPT_WINDOW, CODE + 1), (bed.launch().reason, bed.read(f::GUEST_RIP)));
}

#[test]
fn the_monitor_trap_flag_lets_one_instruction_through() {
    let mut bed = Bed::new();
    bed.code(&[0x90, 0x90, 0x90]).set(PRIMARY, primary::MONITOR_TRAP_FLAG);
    for n in 1..3 {
        let e = if n == 1 { bed.launch() } else { bed.resume() };
        assert_eq!((reason::MTF, CODE + n), (e.reason, bed.read(f::GUEST_RIP)));
    }
    // After an injected event it comes before the handler's first instruction.
    bed.gate(0x40, 0x20).write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0040);
    bed.write(f::GUEST_RFLAGS, 0x202);
    let e = bed.resume();
    assert_eq!((reason::MTF, CODE + 0x20), (e.reason, bed.read(f::GUEST_RIP)));
    // A pending MTF VM exit can be injected without the control.
    bed.clear(PRIMARY, primary::MONITOR_TRAP_FLAG);
    bed.write(f::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0700);
    let e = bed.resume();
    assert_eq!((reason::MTF, CODE + 0x20), (e.reason, bed.read(f::GUEST_RIP)));
}

#[test]
fn nmis_exit_or_reach_the_guest() {
    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]).set(PIN, pin::NMI_EXITING);
    bed.core().nmi_pending = true;
    let e = bed.launch();
    assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0202), (e.reason, e.intr_info));
    assert!(bed.core().nmi_blocked && !bed.core().nmi_pending);

    let mut bed = Bed::new();
    bed.code(&[0xEB, 0xFE]).code_at(0x10, &[0x0F, 0x0B]).gate(2, 0x10);
    bed.core().nmi_pending = true;
    let e = bed.launch();
    assert_eq!((0x8000_0306, CODE + 0x10), (e.intr_info, bed.read(f::GUEST_RIP)));
    assert_eq!(8, bed.read(f::GUEST_INTERRUPTIBILITY_STATE));
}

#[test]
fn the_monitor_trap_flag_comes_before_a_single_step_and_leaves_it_pending() {
    let mut bed = Bed::new();
    bed.code(&[0x90, 0x90]).set(PRIMARY, primary::MONITOR_TRAP_FLAG);
    bed.write(f::GUEST_RFLAGS, 0x102);
    let e = bed.launch();
    assert_eq!((reason::MTF, CODE + 1), (e.reason, bed.read(f::GUEST_RIP)));
    assert_eq!(1 << 14, bed.read(f::GUEST_PENDING_DEBUG_EXCEPTIONS));
    // The trap comes with the next entry, before the next instruction.
    bed.clear(PRIMARY, primary::MONITOR_TRAP_FLAG);
    let e = bed.resume();
    assert_eq!((reason::EXCEPTION_OR_NMI, 0x8000_0301, 1 << 14), (e.reason, e.intr_info, e.qualification));
    assert_eq!(CODE + 1, bed.read(f::GUEST_RIP));
}

/// "NMI unblocking due to IRET": an IRET that faults ends the blocking of NMIs, and the exit says so.
#[test]
fn an_exit_tells_of_an_iret_that_unblocked_nmis() {
    const BLOCKED: u64 = 8;
    const UNBLOCKED: u64 = 1 << 12;
    for engine in [EngineKind::Reference, EngineKind::Dbt] {
        for (blocked, code, told) in [
            (BLOCKED, &[0x48, 0xCF][..], UNBLOCKED), // iretq
            (0, &[0x48, 0xCF], 0),
            (BLOCKED, &[0x58], 0), // pop rax
        ] {
            let mut bed = Bed::on(engine);
            bed.code(code).write(f::GUEST_INTERRUPTIBILITY_STATE, blocked);
            bed.write(f::GUEST_RSP, 0x7F00_0000_0000); // nothing is mapped there
            assert_eq!(reason::EXCEPTION_OR_NMI, bed.launch().reason);
            assert_eq!(0x8000_0B0E | told, bed.read(f::EXIT_INTERRUPTION_INFORMATION));
            let left = if told == 0 { blocked } else { 0 };
            assert_eq!(left, bed.read(f::GUEST_INTERRUPTIBILITY_STATE) & BLOCKED);
        }
    }
}
