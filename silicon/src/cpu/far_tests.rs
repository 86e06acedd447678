//! Far transfers by instruction bytes: code at 1000, stack at 7000, tables of the testbed.

use crate::arch::bits::{cr0, rflags};
use crate::arch::exception::vector;
use crate::arch::segment::seg;
use crate::cpu::segment::{null_segment, v86_segment};
use crate::cpu::state::{Core, Mode};
use crate::cpu::step::step;
use crate::cpu::testbed::*;
use crate::dbt::home::Home;

/// Put code where the core stands.
fn with_code(mut core: Home, bytes: &[u8]) -> Home {
    assert!(core.mem.write_bytes(0x1000, bytes));
    core.rip = 0x1000;
    core
}

fn put_words(core: &Core, sp: u64, size: usize, words: &[u64]) {
    for (i, &w) in words.iter().enumerate() {
        core.mem.store(sp + (i * size) as u64, size, w);
    }
}

/// JMP FAR selector:2000 in 32-bit code.
fn far_jump(selector: u16) -> Vec<u8> {
    let mut bytes = vec![0xEA, 0, 0x20, 0, 0];
    bytes.extend(selector.to_le_bytes());
    bytes
}

/// CALL FAR selector:2000 in 32-bit code.
fn far_call(selector: u16) -> Vec<u8> {
    let mut bytes = far_jump(selector);
    bytes[0] = 0x9A;
    bytes
}

#[test]
fn real_mode_far_call_and_return() {
    let mut core = with_code(real(), &[0x9A, 0x34, 0x02, 0x00, 0x01]); // call 0100:0234
    core.mem.store(0x1234, 1, 0xCB); // retf
    step(&mut core).unwrap();
    assert_eq!((0x234, 0x1000, 0x6FFC), (core.rip, core.seg[seg::CS].base, core.gpr[4]));
    assert_eq!(vec![0x1005, 0], words(&core, 0x6FFC, 2, 2));
    step(&mut core).unwrap();
    assert_eq!((0x1005, 0, 0x7000), (core.rip, core.seg[seg::CS].base, core.gpr[4]));
}

#[test]
fn real_mode_int_and_iret_come_back() {
    let mut core = with_code(real(), &[0xCD, 0x10]);
    core.rflags |= rflags::IF;
    core.mem.store(0x40, 4, 0x2000);
    core.mem.store(0x2000, 1, 0xCF);
    step(&mut core).unwrap();
    assert!(!core.flag(rflags::IF));
    step(&mut core).unwrap();
    assert_eq!((0x1002, 0x202, 0x7000), (core.rip, core.rflags, core.gpr[4]));
}

#[test]
fn entering_protected_mode_by_a_far_jump() {
    let mut core = real();
    core.gdtr = crate::arch::segment::TableRegister { base: GDT, limit: 0x8F };
    set_descriptor(&core, CODE0, descriptor(0, 0xF_FFFF, 0x9A, 0xC));
    core.cr0 |= cr0::PE;
    core.refresh();
    let mut core = with_code(core, &[0xEA, 0x00, 0x20, 0x08, 0x00]); // jmp 8:2000
    assert_eq!(Mode::Bits16, core.mode);
    step(&mut core).unwrap();
    assert_eq!((0x2000, Mode::Bits32, CODE0), (core.rip, core.mode, core.seg[seg::CS].selector));
    assert_eq!(0x9B, core.mem.load(GDT + 8 + 5, 1), "the accessed flag is set");
}

/// The #GP and #NP of "JMP—Jump", far.
#[test]
fn far_jump_error_codes() {
    let dpl3 = descriptor(0, 0xF_FFFF, 0xFB, 0xC);
    let short = descriptor(0, 0xFFF, 0x9B, 0x4);
    let absent = descriptor(0, 0xF_FFFF, 0x1B, 0xC);
    type Row = (&'static str, u8, u16, u64, (u8, u32));
    let rows: [Row; 8] = [
        ("null", 0, 3, 0, (vector::GP, 0)),
        ("beyond the table", 0, 0x90, 0, (vector::GP, 0x90)),
        ("no LDT", 0, 0x0C, 0, (vector::GP, 0x0C)),
        ("data", 0, DATA0, 0, (vector::GP, 0x10)),
        ("DPL above CPL", 0, SPARE, dpl3, (vector::GP, 0x48)),
        ("RPL above CPL", 0, CODE0 | 3, 0, (vector::GP, 8)),
        ("beyond the limit", 0, SPARE, short, (vector::GP, 0)),
        ("absent", 0, SPARE, absent, (vector::NP, 0x48)),
    ];
    for (name, cpl, selector, spare, (v, code)) in rows {
        let mut core = with_code(protected(cpl), &far_jump(selector));
        set_descriptor(&core, SPARE, spare);
        assert_eq!((v, Some(code)), fault(step(&mut core)), "{name}");
        assert_eq!((0x1000, CODE0), (core.rip, core.seg[seg::CS].selector), "{name}");
    }
    let mut core = with_code(protected(3), &far_jump(CODE0));
    assert_eq!((vector::GP, Some(8)), fault(step(&mut core)), "inner code needs a gate");
}

#[test]
fn conforming_code_keeps_the_privilege_level() {
    let mut core = with_code(protected(3), &far_jump(CONFORMING));
    step(&mut core).unwrap();
    assert_eq!((3, CONFORMING | 3), (core.cpl, core.seg[seg::CS].selector));
}

#[test]
fn a_call_gate_to_an_inner_level_copies_parameters_and_retf_drops_them() {
    let mut core = with_code(protected(3), &far_call(SPARE | 3));
    set_descriptor(&core, SPARE, gate(CODE0, 0x2_0000, 0xEC) | 2 << 32);
    put_words(&core, 0x7000, 4, &[0x111, 0x222]);
    core.mem.write_bytes(0x2_0000, &[0xCA, 8, 0]); // retf 8
    step(&mut core).unwrap();
    assert_eq!((0, 0x2_0000, CODE0), (core.cpl, core.rip, core.seg[seg::CS].selector));
    let frame = vec![0x1007, u64::from(CODE3), 0x111, 0x222, 0x7000, u64::from(DATA3)];
    assert_eq!(frame, words(&core, core.gpr[4], 4, 6));
    core.seg[seg::DS] = core.seg[seg::SS]; // level 0: must not survive
    step(&mut core).unwrap();
    assert_eq!((3, 0x1007, 0x7008), (core.cpl, core.rip, core.gpr[4]));
    assert_eq!((CODE3, DATA3), (core.seg[seg::CS].selector, core.seg[seg::SS].selector));
    assert!(core.seg[seg::DS].is_unusable() && !core.seg[seg::ES].is_unusable());
}

#[test]
fn a_call_gate_checks_its_own_dpl_first() {
    let mut core = with_code(protected(3), &far_call(SPARE | 3));
    set_descriptor(&core, SPARE, gate(CODE0, 0x2_0000, 0x8C));
    assert_eq!((vector::GP, Some(0x48)), fault(step(&mut core)));
}

#[test]
fn a_jump_through_a_gate_cannot_raise_privilege() {
    let mut core = with_code(protected(3), &far_jump(SPARE | 3));
    set_descriptor(&core, SPARE, gate(CODE0, 0x2_0000, 0xEC));
    assert_eq!((vector::GP, Some(8)), fault(step(&mut core)));
}

#[test]
fn iret_to_an_outer_level_and_its_flag_rules() {
    let mut core = with_code(protected(0), &[0xCF]);
    let flags = 0x3202 | rflags::AC;
    put_words(&core, 0x7000, 4, &[0x5000, u64::from(CODE3), flags, 0x6500, u64::from(DATA3)]);
    step(&mut core).unwrap();
    assert_eq!((3, 0x5000, 0x6500, flags), (core.cpl, core.rip, core.gpr[4], core.rflags));
    // From level 3 with IOPL 0 neither IF nor IOPL change.
    let mut core = with_code(protected(3), &[0xCF]);
    put_words(&core, 0x7000, 4, &[0x5000, u64::from(CODE3), 0x3203]);
    step(&mut core).unwrap();
    assert_eq!((3, 0x700C, 3), (core.rflags, core.gpr[4], core.cpl));
}

#[test]
fn iret_to_an_outer_level_clears_null_selectors_but_no_base() {
    let mut core = with_code(long(0), &[0x48, 0xCF]);
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        core.seg[index] = null_segment(3);
    }
    core.seg[seg::FS].base = 0x1234_5678_9000;
    put_words(&core, 0x7000, 8, &[0x5000, u64::from(LONG3), 2, 0x6508, u64::from(DATA3)]);
    step(&mut core).unwrap();
    let selectors = [seg::ES, seg::DS, seg::FS, seg::GS].map(|index| core.seg[index].selector);
    assert_eq!(([0; 4], 0x1234_5678_9000), (selectors, core.seg[seg::FS].base));
}

#[test]
fn a_return_to_an_outer_level_nulls_selectors_and_keeps_bases() {
    let iret = [0x5000, 0, 2, 0x6508, u64::from(DATA3)];
    let retf = [0x5000, 0, 0x6508, u64::from(DATA3), 0];
    for (core, bytes, size, code, frame) in [
        (long(0), &[0x48, 0xCF][..], 8, LONG3, iret),
        (long(0), &[0xCF], 4, LONG3, iret),
        (long(0), &[0x66, 0xCF], 2, LONG3, iret),
        (long(0), &[0x48, 0xCB], 8, LONG3, retf),
        (protected(0), &[0xCF], 4, CODE3, iret),
        (protected(0), &[0xCB], 4, CODE3, retf),
    ] {
        let mut core = with_code(core, bytes);
        let is_long = core.is_long();
        let base = if is_long { 0x1234_5678_9000 } else { 0x5678_9000 };
        for index in [seg::FS, seg::GS] {
            assert_eq!(0, core.seg[index].dpl());
            core.seg[index].base = base;
        }
        let mut frame = frame;
        frame[1] = code.into();
        put_words(&core, 0x7000, size, &frame);
        step(&mut core).unwrap();
        assert_eq!((3, 0x5000), (core.cpl, core.rip));
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = core.seg[index];
            let expected = if index >= seg::FS { base } else { 0 };
            assert_eq!((0, true, expected), (s.selector, s.is_unusable(), s.base), "{bytes:x?} {index}");
        }
    }
}

#[test]
fn iret_to_an_inner_level_is_gp_of_cs() {
    let mut core = with_code(protected(3), &[0xCF]);
    put_words(&core, 0x7000, 4, &[0x5000, u64::from(CODE0), 2]);
    assert_eq!((vector::GP, Some(8)), fault(step(&mut core)));
    assert_eq!(0x7000, core.gpr[4]);
}

#[test]
fn iret_to_virtual_8086_mode_and_an_interrupt_back() {
    let mut core = with_code(protected(0), &[0xCF]);
    let flags = rflags::VM | 0x202;
    let frame = [0x50, 0x200, flags, 0x900, 0x300, 0x301, 0x302, 0x303, 0x304];
    put_words(&core, 0x7000, 4, &frame);
    step(&mut core).unwrap();
    assert_eq!((Mode::V86, 3, 0x50, 0x900), (core.mode, core.cpl, core.rip, core.gpr[4]));
    assert_eq!(v86_segment(0x301), core.seg[seg::ES]);
    // INT n with IOPL 0 goes to the monitor.
    core.mem.write_bytes(0x2050, &[0xCD, 0x21]);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
}

#[test]
fn iret_ends_blocking_by_nmi_even_if_it_faults() {
    for (cs, ok) in [(CODE0, true), (DATA0, false)] {
        let mut core = with_code(protected(0), &[0xCF]);
        core.nmi_blocked = true;
        put_words(&core, 0x7000, 4, &[0x5000, u64::from(cs), 2]);
        assert_eq!(ok, step(&mut core).is_ok());
        assert!(!core.nmi_blocked);
    }
}

#[test]
fn iretq_pops_ss_and_rsp_at_the_same_level_too() {
    let mut core = with_code(long(0), &[0x48, 0xCF]);
    put_words(&core, 0x7000, 8, &[0x5000, u64::from(LONG0), 0x202, 0x6508, 0]);
    step(&mut core).unwrap();
    assert_eq!((0x5000, 0x6508, 0x202), (core.rip, core.gpr[4], core.rflags));
    assert!(core.seg[seg::SS].is_unusable());
}

#[test]
fn iretq_to_level_3_and_to_compatibility_mode() {
    for (cs, mode) in [(LONG3, Mode::Bits64), (CODE3, Mode::Bits32)] {
        let mut core = with_code(long(0), &[0x48, 0xCF]);
        let frame = [0x5000, u64::from(cs), 2, 0x6508, u64::from(DATA3)];
        put_words(&core, 0x7000, 8, &frame);
        step(&mut core).unwrap();
        assert_eq!((mode, 3, 0x6508), (core.mode, core.cpl, core.gpr[4]));
    }
}

#[test]
fn iretq_refuses_nt_a_null_user_stack_and_odd_addresses() {
    let rows: [(u64, u64, u64, u64, u32); 4] = [
        (0x5000, u64::from(LONG3), 0, 0, 0),
        (1 << 50, u64::from(LONG0), 0, 0, 0),
        (0x5000, u64::from(LONG3), u64::from(DATA0), 0, 0x10),
        (0x5000, u64::from(LONG0), 0, rflags::NT, 0),
    ];
    for (rip, cs, ss, now, code) in rows {
        let mut core = with_code(long(0), &[0x48, 0xCF]);
        core.rflags |= now;
        put_words(&core, 0x7000, 8, &[rip, cs, 2, 0x6508, ss]);
        assert_eq!((vector::GP, Some(code)), fault(step(&mut core)));
        assert_eq!((0x1000, 0x7000, 0), (core.rip, core.gpr[4], core.cpl));
    }
}

#[test]
fn a_64_bit_call_gate_loads_rsp0_and_pushes_eight_byte_words() {
    let mut core = with_code(long(3), &[0xFF, 0x1C, 0x25, 0, 0x40, 0, 0]); // call far [4000]
    core.mem.store(0x4004, 2, u64::from(SPARE));
    set_descriptor(&core, SPARE, gate(LONG0, 0x2_0000, 0xEC));
    set_descriptor(&core, SPARE + 8, 0);
    step(&mut core).unwrap();
    assert_eq!((0x2_0000, 0, 0x6000 - 32), (core.rip, core.cpl, core.gpr[4]));
    let frame = vec![0x1007, u64::from(LONG3), 0x7000, u64::from(DATA3)];
    assert_eq!(frame, words(&core, core.gpr[4], 8, 4));
    assert!(core.seg[seg::SS].is_unusable());
}

#[test]
fn a_far_call_in_long_mode_to_a_tss_is_gp() {
    let mut core = with_code(long(0), &[0xFF, 0x2C, 0x25, 0, 0x40, 0, 0]); // jmp far [4000]
    core.mem.store(0x4004, 2, u64::from(TSS_SEL));
    set_descriptor(&core, TSS_SEL + 8, 0);
    assert_eq!((vector::GP, Some(0x28)), fault(step(&mut core)));
}

fn with_second_task(core: &Core) {
    for (offset, value) in [
        (0x20, 0x5000_u64),
        (0x24, 2),
        (0x38, 0x4800),
        (0x48, u64::from(DATA0)),
        (0x4C, u64::from(CODE0)),
        (0x50, u64::from(DATA0)),
        (0x54, u64::from(DATA0)),
    ] {
        core.mem.store(TSS2 + offset, 4, value);
    }
    core.mem.store(0x5000, 1, 0xCF);
}

#[test]
fn call_to_a_tss_nests_and_iret_comes_back() {
    let mut core = with_code(protected(0), &far_call(TSS2_SEL));
    with_second_task(&core);
    core.gpr[3] = 0x77;
    step(&mut core).unwrap();
    assert_eq!((0x5000, TSS2_SEL, 0), (core.rip, core.tr.selector, core.gpr[3]));
    assert!(core.flag(rflags::NT));
    step(&mut core).unwrap();
    assert_eq!((0x1007, TSS_SEL, 0x77), (core.rip, core.tr.selector, core.gpr[3]));
    assert!(!core.flag(rflags::NT));
    let access = |s: u16| core.mem.load(GDT + u64::from(s) + 5, 1);
    assert_eq!((0x8B, 0x89), (access(TSS_SEL), access(TSS2_SEL)));
}

#[test]
fn jump_to_a_busy_tss_is_gp_and_to_a_short_one_ts() {
    let mut core = with_code(protected(0), &far_jump(TSS_SEL));
    assert_eq!((vector::GP, Some(0x28)), fault(step(&mut core)));
    let mut core = with_code(protected(0), &far_jump(TSS2_SEL));
    set_descriptor(&core, TSS2_SEL, descriptor(TSS2, 0x66, 0x89, 0));
    assert_eq!((vector::TS, Some(0x68)), fault(step(&mut core)));
}

#[test]
fn a_bad_selector_of_the_new_task_faults_in_the_new_task() {
    let mut core = with_code(protected(0), &far_jump(TSS2_SEL));
    with_second_task(&core);
    core.mem.store(TSS2 + 0x54, 2, u64::from(CODE0) | 4); // DS in an LDT that is not there
    set_gate(&core, 10, CODE0, 0x6_0000, 0x8E);
    step(&mut core).unwrap();
    assert_eq!((0x6_0000, TSS2_SEL), (core.rip, core.tr.selector));
    assert_eq!(vec![0x0C, 0x5000], words(&core, core.gpr[4], 4, 2));
}

#[test]
fn int3_pushes_the_next_instruction_and_needs_the_gate_dpl() {
    let mut core = with_code(protected(3), &[0xCC]);
    set_gate(&core, 3, CODE0, 0x5000, 0x8E);
    assert_eq!((vector::GP, Some(0x1A)), fault(step(&mut core)));
    set_gate(&core, 3, CODE0, 0x5000, 0xEE);
    core.vectoring = None;
    step(&mut core).unwrap();
    assert_eq!(0x1001, core.mem.load(core.gpr[4], 4));
}
