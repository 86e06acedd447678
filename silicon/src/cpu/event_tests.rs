//! Every way an event can take, on small tables in memory.

use crate::arch::bits::rflags;
use crate::arch::exception::{Exception, vector};
use crate::arch::exit::reason;
use crate::arch::segment::seg;
use crate::cpu::event::{Event, Kind, deliver, deliver_or_raise, raise};
use crate::cpu::state::{Activity, Core, Mode};
use crate::cpu::step::step;
use crate::cpu::testbed::*;
use crate::cpu::trap::Trap;
use crate::dbt::home::Home;

fn external(vector: u8) -> Event {
    Event { vector, kind: Kind::External, error: None, length: 0 }
}

fn software(vector: u8) -> Event {
    Event { vector, kind: Kind::Software, error: None, length: 2 }
}

fn gp_fault() -> Exception {
    Exception::coded(vector::GP, 0x18)
}

#[test]
fn real_mode_pushes_flags_cs_ip_and_clears_if_and_tf() {
    let mut core = real();
    core.rflags |= rflags::IF | rflags::TF | rflags::CF;
    core.mem.store(0x21 * 4, 4, 0x1234_0056);
    deliver(&mut core, software(0x21)).unwrap();
    assert_eq!((0x56, 0x1_2340), (core.rip, core.seg[seg::CS].base));
    assert_eq!(vec![0x1002, 0, 0x303], words(&core, 0x6FFA, 2, 3));
    assert_eq!(0x6FFA, core.gpr[4]);
    assert_eq!(rflags::CF | rflags::FIXED1, core.rflags);
    assert_eq!(1, core.counts.injected[0x21]);
}

#[test]
fn real_mode_exceptions_push_no_error_code() {
    let mut core = real();
    core.mem.store(13 * 4, 4, 0x100);
    raise(&mut core, gp_fault()).unwrap();
    assert_eq!((0x6FFA, 0x100), (core.gpr[4], core.rip));
}

#[test]
fn a_short_idt_in_real_mode_ends_in_shutdown() {
    let mut core = real();
    core.idtr.limit = 0;
    let Err(Trap::Stop(stop)) = raise(&mut core, gp_fault()) else { panic!() };
    assert_eq!((reason::SHUTDOWN, Activity::Shutdown), (stop.reason, core.activity));
    assert_eq!((None, 0x1000), (core.vectoring, core.rip));
}

#[test]
fn a_32_bit_gate_of_the_same_level_keeps_the_stack() {
    let mut core = protected(0);
    core.rflags |= rflags::IF | rflags::NT;
    set_gate(&core, 13, CODE0, 0x1_5000, 0x8E);
    raise(&mut core, gp_fault()).unwrap();
    let flags = 0x202 | rflags::NT | rflags::RF;
    assert_eq!(vec![0x18, 0x1000, 8, flags], words(&core, 0x6FF0, 4, 4));
    assert_eq!((0x1_5000, 0x6FF0, 2), (core.rip, core.gpr[4], core.rflags));
}

#[test]
fn a_trap_gate_leaves_if_alone() {
    let mut core = protected(0);
    core.rflags |= rflags::IF;
    set_gate(&core, 0x40, CODE0, 0x5000, 0x8F);
    deliver(&mut core, external(0x40)).unwrap();
    assert!(core.flag(rflags::IF));
    assert_eq!(vec![0x1000, 8, 0x202], words(&core, 0x6FF4, 4, 3));
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut core = protected(0);
    set_gate(&core, 0x40, CODE0, 0xABCD_5000, 0x86);
    deliver(&mut core, external(0x40)).unwrap();
    assert_eq!((0x5000, 0x6FFA), (core.rip, core.gpr[4]));
}

#[test]
fn an_inner_level_takes_its_stack_from_the_tss() {
    let mut core = protected(3);
    set_gate(&core, 0x80, CODE0, 0x5000, 0xEE);
    deliver(&mut core, software(0x80)).unwrap();
    let frame = vec![0x1002, 0x1B, 2, 0x7000, 0x23];
    assert_eq!(frame, words(&core, 0x5FEC, 4, 5));
    assert_eq!((0, 0x5FEC), (core.cpl, core.gpr[4]));
    assert_eq!((CODE0, DATA0), (core.seg[seg::CS].selector, core.seg[seg::SS].selector));
}

/// The error codes of "INT n/INTO/INT3/INT1", in the order of its checks.
#[test]
fn protected_mode_error_codes() {
    type Prepare = fn(&mut Core);
    let rows: [(&str, Prepare, Event, (u8, u32)); 13] = [
        ("IDT limit", |c| c.idtr.limit = 0x3FF, software(0x80), (vector::GP, 0x402)),
        ("IDT limit, EXT", |c| c.idtr.limit = 0x3FF, external(0x80), (vector::GP, 0x403)),
        ("type", |c| set_gate(c, 0x80, CODE0, 0, 0xEC), external(0x80), (vector::GP, 0x403)),
        ("gate DPL", |c| set_gate(c, 0x80, CODE0, 0, 0x8E), software(0x80), (vector::GP, 0x402)),
        ("gate P", |c| set_gate(c, 0x80, CODE0, 0, 0x6E), software(0x80), (vector::NP, 0x402)),
        ("null CS", |c| set_gate(c, 0x80, 3, 0, 0xEE), external(0x80), (vector::GP, 1)),
        ("CS limit", |c| set_gate(c, 0x80, 0x90, 0, 0xEE), external(0x80), (vector::GP, 0x91)),
        ("CS is data", |c| set_gate(c, 0x80, DATA0, 0, 0xEE), external(0x80), (vector::GP, 0x11)),
        (
            "CS absent",
            |c| {
                set_descriptor(c, SPARE, descriptor(0, 0xFFFF, 0x1B, 4));
                set_gate(c, 0x80, SPARE, 0, 0xEE);
            },
            software(0x80),
            (vector::NP, 0x48),
        ),
        ("TSS limit", |c| c.tr.limit = 8, software(0x80), (vector::TS, 0x28)),
        ("SS null", |c| c.mem.store(TSS + 8, 2, 0), software(0x80), (vector::TS, 0)),
        ("SS RPL", |c| c.mem.store(TSS + 8, 2, 0x13), external(0x80), (vector::TS, 0x11)),
        ("SS absent", |c| c.mem.store(TSS + 8, 2, u64::from(ABSENT)), software(0x80), (vector::SS, 0x38)),
    ];
    for (name, prepare, event, (vector, code)) in rows {
        let mut core = protected(3);
        set_gate(&core, 0x80, CODE0, 0x5000, 0xEE);
        prepare(&mut core);
        let before = (core.gpr, core.rip, core.seg, core.cpl, core.rflags);
        assert_eq!((vector, Some(code)), fault(deliver(&mut core, event)), "{name}");
        assert_eq!(before, (core.gpr, core.rip, core.seg, core.cpl, core.rflags), "{name}");
        assert_eq!(Some(event), core.vectoring);
    }
}

#[test]
fn an_inner_stack_without_room_is_ss_with_its_selector() {
    let mut core = protected(3);
    set_gate(&core, 0x80, CODE0, 0x5000, 0xEE);
    set_descriptor(&core, SPARE, descriptor(0, 0xFF, 0x93, 4));
    core.mem.store(TSS + 8, 2, u64::from(SPARE));
    assert_eq!((vector::SS, Some(0x48)), fault(deliver(&mut core, software(0x80))));
}

#[test]
fn from_virtual_8086_mode_the_data_segments_are_saved_and_cleared() {
    let mut core = protected(3);
    core.rflags |= rflags::VM | rflags::IF;
    for (i, s) in core.seg.iter_mut().enumerate() {
        *s = crate::cpu::segment::v86_segment(0x100 + i as u16);
    }
    core.refresh();
    assert_eq!(Mode::V86, core.mode);
    set_gate(&core, 13, CODE0, 0x5000, 0x8E);
    raise(&mut core, Exception::coded(vector::GP, 0)).unwrap();
    let flags = rflags::VM | rflags::RF | 0x202;
    let frame = vec![0, 0x1000, 0x101, flags, 0x7000, 0x102, 0x100, 0x103, 0x104, 0x105];
    assert_eq!(frame, words(&core, 0x6000 - 40, 4, 10));
    assert_eq!((Mode::Bits32, 0), (core.mode, core.cpl));
    assert!(core.seg[seg::DS].is_unusable() && core.seg[seg::GS].is_unusable());
}

#[test]
fn a_virtual_8086_interrupt_needs_a_gate_to_level_0() {
    let mut core = protected(3);
    core.rflags |= rflags::VM;
    core.refresh();
    set_gate(&core, 0x40, CONFORMING, 0x5000, 0xEE);
    assert_eq!((vector::GP, Some(0x41)), fault(deliver(&mut core, external(0x40))));
}

#[test]
fn long_mode_same_level_aligns_the_stack_and_always_pushes_ss() {
    let mut core = long(0);
    core.gpr[4] = 0x7009;
    set_gate(&core, 0x40, LONG0, 0x10_0000, 0x8E);
    deliver(&mut core, external(0x40)).unwrap();
    let frame = vec![0x1000, u64::from(LONG0), 2, 0x7009, u64::from(DATA0)];
    assert_eq!(frame, words(&core, 0x7000 - 40, 8, 5));
    assert_eq!((0x10_0000, DATA0), (core.rip, core.seg[seg::SS].selector));
}

#[test]
fn long_mode_inner_level_loads_rsp0_and_a_null_ss() {
    let mut core = long(3);
    set_gate(&core, 14, LONG0, 0x10_0000, 0x8E);
    raise(&mut core, Exception::page_fault(0x00AB_C000, 6)).unwrap();
    let frame = vec![6, 0x1000, u64::from(LONG3), 2 | rflags::RF, 0x7000, u64::from(DATA3)];
    assert_eq!(frame, words(&core, 0x6000 - 48, 8, 6));
    assert_eq!((0x00AB_C000, 0, 0), (core.cr2, core.cpl, core.seg[seg::SS].selector));
    assert!(core.seg[seg::SS].is_unusable());
}

#[test]
fn long_mode_ist_switches_stacks_without_a_change_of_level() {
    let mut core = long(0);
    core.mem.store(TSS + 0x24 + 8, 8, 0x5008);
    set_gate(&core, 2, LONG0, 0x10_0000, 0x8E);
    let place = IDT + 32;
    core.mem.store(place, 8, core.mem.load(place, 8) | 2 << 32);
    deliver(&mut core, Event { vector: 2, kind: Kind::Nmi, error: None, length: 0 }).unwrap();
    assert_eq!((0x5000 - 40, DATA0), (core.gpr[4], core.seg[seg::SS].selector));
}

#[test]
fn long_mode_refuses_16_bit_gates_task_gates_and_legacy_code() {
    for (access, selector, code) in [(0x86, LONG0, 0x403), (0x85, LONG0, 0x403), (0x8E, CODE0, 9)] {
        let mut core = long(0);
        set_gate(&core, 0x80, selector, 0x5000, access);
        assert_eq!((vector::GP, Some(code)), fault(deliver(&mut core, external(0x80))));
    }
}

#[test]
fn long_mode_a_stack_that_is_not_canonical_is_ss() {
    let mut core = long(3);
    core.mem.store(TSS + 4, 8, 1 << 60);
    set_gate(&core, 0x80, LONG0, 0x5000, 0xEE);
    assert_eq!((vector::SS, Some(0)), fault(deliver(&mut core, software(0x80))));
    assert_eq!(3, core.cpl);
}

#[test]
fn a_missing_gate_makes_a_contributory_fault_double() {
    let mut core = protected(0);
    set_gate(&core, 8, CODE0, 0x5000, 0x8E);
    raise(&mut core, gp_fault()).unwrap();
    assert_eq!(0x5000, core.rip);
    assert_eq!(vec![0, 0x1000, 8, 2], words(&core, core.gpr[4], 4, 4));
    assert_eq!((0, 1), (core.counts.injected[13], core.counts.injected[8]));
}

#[test]
fn an_interrupt_that_faults_is_no_double_fault() {
    let mut core = protected(0);
    set_gate(&core, 13, CODE0, 0x5000, 0x8E);
    deliver_or_raise(&mut core, external(0x40)).unwrap();
    assert_eq!(vec![0x203, 0x1000], words(&core, core.gpr[4], 4, 2));
}

#[test]
fn a_page_fault_while_a_page_fault_is_delivered_is_double_and_cr2_the_second() {
    let mut core = long(3);
    core.mem.store(TSS + 4, 8, 0x50_0000);
    core.mem.store(TSS + 0x24, 8, 0x6000);
    set_gate(&core, 14, LONG0, 0x10_0000, 0x8E);
    set_gate(&core, 8, LONG0, 0x11_0000, 0x8E);
    let place = IDT + 16 * 8;
    core.mem.store(place, 8, core.mem.load(place, 8) | 1 << 32);
    raise(&mut core, Exception::page_fault(0x60_0000, 4)).unwrap();
    assert_eq!((0x11_0000, 0x50_0000 - 8), (core.rip, core.cr2));
}

#[test]
fn a_fault_while_a_double_fault_is_delivered_is_shutdown() {
    let mut core = protected(0);
    let Err(Trap::Stop(stop)) = raise(&mut core, gp_fault()) else { panic!() };
    assert_eq!(reason::SHUTDOWN, stop.reason);
    assert_eq!(0, core.counts.injected.iter().sum::<u64>());
}

#[test]
fn a_debug_exception_sets_dr6_and_clears_general_detect() {
    let mut core = protected(0);
    core.dr[7] |= 1 << 13;
    core.dr[6] |= 2;
    set_gate(&core, 1, CODE0, 0x5000, 0x8E);
    let e = Exception { vector: vector::DB, error: None, payload: 1 << 14, is_trap: true };
    raise(&mut core, e).unwrap();
    assert_eq!((0xFFFF_4FF0, 0x400), (core.dr[6], core.dr[7]));
    assert_eq!(2, core.mem.load(core.gpr[4] + 8, 4), "a trap does not set RF");
}

#[test]
fn a_task_gate_switches_tasks_and_pushes_the_error_code_there() {
    let mut core = protected(0);
    for (offset, value) in [
        (0x20, 0x5000),
        (0x24, 2),
        (0x28 + 16, 0x4800),
        (0x28, 0xAAAA),
        (0x48, DATA0),
        (0x4C, CODE0),
        (0x50, DATA0),
        (0x54, DATA0),
        (0x58, 0),
        (0x5C, 0),
    ] {
        core.mem.store(TSS2 + offset, 4, u64::from(value));
    }
    set_gate(&core, 8, TSS2_SEL, 0, 0x85);
    raise(&mut core, gp_fault()).unwrap();
    assert_eq!((0x5000, 0xAAAA, TSS2_SEL), (core.rip, core.gpr[0], core.tr.selector));
    assert_eq!((0x47FC, 0), (core.gpr[4], core.mem.load(0x47FC, 4)));
    assert!(core.flag(rflags::NT) && core.cr0 & 8 != 0);
    assert_eq!(u64::from(TSS_SEL), core.mem.load(TSS2, 2), "back link");
    assert_eq!(0x1000, core.mem.load(TSS + 0x20, 4), "old EIP");
    let busy = |s: u16| core.mem.load(GDT + u64::from(s) + 5, 1);
    assert_eq!((0x8B, 0x8B), (busy(TSS_SEL), busy(TSS2_SEL)));
}

#[test]
fn vme_redirects_int_n_when_the_bitmap_bit_is_clear() {
    let mut core = protected(3);
    core.rflags |= rflags::VM | rflags::VIF;
    core.cr4 |= 1;
    core.seg = core.seg.map(|_| crate::cpu::segment::v86_segment(0));
    core.tr.limit = 0x200;
    core.mem.store(TSS + 0x66, 2, 0x68 + 32);
    core.mem.store(0x21 * 4, 4, 0x0100_0050);
    core.refresh();
    deliver(&mut core, software(0x21)).unwrap();
    assert_eq!((0x50, 0x1000, Mode::V86), (core.rip, core.seg[seg::CS].base, core.mode));
    assert_eq!(vec![0x1002, 0, 0x3202], words(&core, core.gpr[4], 2, 3));
    assert!(!core.flag(rflags::VIF));
}

/// In non-root operation with an exception bitmap.
fn guest(bitmap: u64) -> Home {
    let mut core = protected(3);
    core.vmx.non_root = true;
    core.vmx.controls.exception_bitmap = bitmap;
    core
}

fn exit_of(result: crate::cpu::trap::Exec<()>) -> crate::arch::exit::Exit {
    match result {
        Err(Trap::Exit(exit)) => *exit,
        other => panic!("expected a VM exit, got {other:?}"),
    }
}

#[test]
fn an_exception_in_the_bitmap_exits_without_touching_cr2() {
    let mut core = guest(1 << vector::PF);
    let exit = exit_of(raise(&mut core, Exception::page_fault(0x1234, 6)));
    assert_eq!((reason::EXCEPTION_OR_NMI, 0x1234, 6), (exit.reason, exit.qualification, exit.intr_error));
    assert_eq!((0, None), (core.cr2, core.vectoring));
}

#[test]
fn an_exception_that_exits_during_delivery_leaves_the_first_event_for_idt_vectoring() {
    let mut core = guest(1 << vector::GP);
    let first = Exception::page_fault(0x1234, 6);
    let exit = exit_of(raise(&mut core, first)); // no gate for #PF
    assert_eq!((0x8000_0B0D, 0x73), (exit.intr_info, exit.intr_error));
    assert_eq!((Some(first.into()), 0x1234), (core.vectoring, core.cr2));
}

#[test]
fn a_double_fault_that_exits_is_not_during_delivery() {
    let mut core = guest(1 << vector::DF);
    let exit = exit_of(raise(&mut core, gp_fault()));
    assert_eq!((0x8000_0B08, None), (exit.intr_info, core.vectoring));
}

#[test]
fn a_triple_fault_in_a_guest_is_exit_reason_2() {
    let mut core = guest(0);
    let exit = exit_of(raise(&mut core, gp_fault()));
    assert_eq!((reason::TRIPLE_FAULT, None), (exit.reason, core.vectoring));
    assert_eq!(Activity::Active, core.activity);
}

#[test]
fn a_task_gate_in_a_guest_always_exits() {
    let mut core = guest(0);
    set_gate(&core, 0x40, TSS2_SEL, 0, 0xE5);
    let exit = exit_of(deliver_or_raise(&mut core, external(0x40)));
    assert_eq!((reason::TASK_SWITCH, 0xC000_0068), (exit.reason, exit.qualification));
    assert_eq!(Some(external(0x40)), core.vectoring);
}

#[test]
fn int1_takes_the_debug_condition_that_mov_ss_held_back() {
    let mut core = protected(0);
    set_gate(&core, vector::DB, CODE0, 0x1_5000, 0x8E);
    (core.dr[0], core.dr[7], core.gpr[3]) = (0x2000, 0x0007_0401, 0x2000);
    core.mem.store(0x2000, 2, u64::from(DATA0));
    assert!(core.mem.write_bytes(core.rip, &[0x8E, 0x13, 0xF1])); // mov ss,[ebx]; int1
    for _ in 0..2 {
        assert_eq!(Ok(()), step(&mut core));
    }
    assert_eq!((0x1_5000, 1, 0), (core.rip, core.dr[6] & 0xF, core.pending_db));
    assert_eq!(1, core.counts.injected[1]);
}
