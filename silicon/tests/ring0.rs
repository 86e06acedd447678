//! Ring 0 outside the processor, and sensitive instructions above it, in both engines.

use silicon::arch::exit::{Exit, reason};
use silicon::arch::segment::{Segment, TableRegister, seg};
use silicon::cpu::ring0::{Ring0, Sensitive};
use silicon::cpu::state::{Clock, Core};
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const GDT: u64 = 0x1000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x6000;
const STACK: u64 = 0x7000;
const IF: u64 = 1 << 9;
const GP: u32 = 0x8000_0B0D;

fn descriptor(access: u64, flags: u64) -> u64 {
    0xF_0000_0000_FFFF | access << 40 | flags << 52
}

/// 32-bit code, or 64-bit, at a level, with flat segments of that level at 8, 16 and 24.
fn machine(kind: EngineKind, is_64: bool, cpl: u8, code: &[u8]) -> Processor {
    let mem = Memory::new(1 << 20).unwrap();
    let mut processor = Processor::new(mem.clone(), kind, Clock::Virtual, 0).unwrap();
    let core: &mut Core = &mut processor.core;
    let dpl = u64::from(cpl) << 5;
    let flags = if is_64 { 0xA } else { 0xC };
    for (n, raw) in [(1, descriptor(0x9B | dpl, flags)), (2, descriptor(0x93 | dpl, 0xC))] {
        mem.store(GDT + 8 * n, 8, raw);
    }
    core.gdtr = TableRegister { base: GDT, limit: 0x17 };
    let selector = |n: u16| n | u16::from(cpl);
    let flat = |n, attr: u64| Segment { base: 0, limit: u32::MAX, attr: attr as u32, selector: selector(n) };
    core.seg = [flat(16, 0xC093 | dpl); 6];
    core.seg[seg::CS] = flat(8, if is_64 { 0xA09B } else { 0xC09B } | dpl);
    core.cr0 = 0x8000_0033;
    (core.cr3, core.cr4, core.cpl) = (0x8000, 0x20, cpl);
    core.efer = if is_64 { 0x500 } else { 0 };
    for (at, entry) in [(0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0x87)] {
        mem.store(at, 8, entry);
    }
    if !is_64 {
        core.pdpte[0] = 0xA001;
        mem.store(0xA000, 8, 0x87);
    }
    (core.gpr[4], core.gpr[7], core.rip) = (STACK, DATA, CODE);
    core.rflags |= IF;
    let (cs, ss) = (u64::from(selector(8)), u64::from(selector(16)));
    // What RETF, IRET and POP of a segment register find, in words of both sizes.
    let word = if is_64 { 8 } else { 4 };
    for (n, value) in [CODE + 0x100, cs, 2, STACK, ss].into_iter().enumerate() {
        mem.store(STACK + word as u64 * n as u64, word, value);
    }
    mem.store(DATA, 8, (CODE + 0x100) | (cs << 32));
    mem.store(DATA + 8, 8, ss << 32);
    mem.write_bytes(CODE, code);
    core.refresh();
    processor
}

fn run(processor: &mut Processor) -> Exit {
    processor.run(1, &mut || false)
}

/// The published list, by an instruction of each that executes at level 1: the bytes, and whether
/// it is of 64-bit code.
const LIST: &[(&str, bool, &[u8])] = &[
    ("sgdt", true, &[0x0F, 0x01, 0x07]),
    ("sidt", true, &[0x0F, 0x01, 0x0F]),
    ("sldt", true, &[0x0F, 0x00, 0xC0]),
    ("smsw", true, &[0x0F, 0x01, 0xE0]),
    ("str", true, &[0x0F, 0x00, 0xC8]),
    ("pushfq", true, &[0x9C]),
    ("pushf", true, &[0x66, 0x9C]),
    ("popfq", true, &[0x9D]),
    ("popf", true, &[0x66, 0x9D]),
    ("pushfd", false, &[0x9C]),
    ("popfd", false, &[0x9D]),
    ("lar", true, &[0x0F, 0x02, 0xC2]),
    ("lsl", true, &[0x0F, 0x03, 0xC2]),
    ("verr", true, &[0x0F, 0x00, 0xE2]),
    ("verw", true, &[0x0F, 0x00, 0xEA]),
    ("mov eax, cs", true, &[0x8C, 0xC8]),
    ("mov ds, edx", true, &[0x8E, 0xDA]),
    ("push fs", true, &[0x0F, 0xA0]),
    ("push cs", false, &[0x0E]),
    ("pop ds", false, &[0x1F]),
    ("les", false, &[0xC4, 0x07]),
    ("call far", true, &[0xFF, 0x1F]),
    ("jmp far", true, &[0xFF, 0x2F]),
    ("retf", true, &[0x48, 0xCB]),
    ("retf", false, &[0xCB]),
    ("iretq", true, &[0x48, 0xCF]),
    ("iretd", false, &[0xCF]),
];

fn prepared(kind: EngineKind, row: &(&str, bool, &[u8]), ring0: Ring0) -> Processor {
    let mut processor = machine(kind, row.1, 1, row.2);
    let core: &mut Core = &mut processor.core;
    core.ring0 = ring0;
    core.gpr[2] = 17;
    if matches!(row.0, "pop ds") {
        core.mem.store(STACK, 4, 17);
    }
    if row.0 == "les" {
        core.mem.store(DATA + 4, 2, 17);
    }
    processor
}

#[test]
fn each_sensitive_instruction_is_silent_or_traps_or_stops() {
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        for row in LIST {
            let what = format!("{kind:?} {} {}", row.0, row.1);
            let silent = Ring0 { is_outside: true, sensitive: Sensitive::Silent };
            let mut processor = prepared(kind, row, silent);
            assert_eq!(reason::BUDGET, run(&mut processor).reason, "{what}");
            assert_eq!(1, processor.core.retired(), "{what}");

            let mut processor = prepared(kind, row, Ring0 { sensitive: Sensitive::Trap, ..silent });
            let exit = run(&mut processor);
            assert_eq!((reason::EVENT, GP, 0), (exit.reason, exit.intr_info, exit.intr_error), "{what}");
            assert_eq!((CODE, IF | 2), (exit.gla, exit.gpa), "{what}");
            assert_eq!(0, processor.core.retired(), "{what}");

            let mut processor = prepared(kind, row, Ring0 { sensitive: Sensitive::Stop, ..silent });
            let exit = run(&mut processor);
            let expected = (reason::SENSITIVE, row.2.len() as u32, CODE);
            assert_eq!(expected, (exit.reason, exit.length, exit.gla), "{what}");
            assert_eq!(0, processor.core.retired(), "{what}");
        }
    }
}

#[test]
fn they_are_no_others() {
    // mov eax, ebx; push rax; call near; ret; cli needs no option to trap.
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        for code in [&[0x89, 0xD8][..], &[0x50], &[0xE8, 0, 0, 0, 0], &[0x0F, 0x1F, 0x00]] {
            let mut processor = machine(kind, true, 1, code);
            processor.core.ring0 = Ring0 { is_outside: true, sensitive: Sensitive::Trap };
            assert_eq!(reason::BUDGET, run(&mut processor).reason, "{kind:?} {code:x?}");
        }
    }
}

#[test]
fn what_leads_to_level_0_ends_the_run_and_has_not_been_delivered() {
    let rows: [(&[u8], u32, u32, u32, u64); 8] = [
        (&[0xFA], GP, 0, 0, 0),                                             // cli
        (&[0xF4], GP, 0, 0, 0),                                             // hlt
        (&[0x0F, 0xA2], GP, 0, 0, 0),                                       // cpuid, as with CPUID faulting
        (&[0x0F, 0x0B], 0x8000_0306, 0, 0, 0),                              // ud2
        (&[0xCD, 0x80], 0x8000_0480, 0, 2, 0),                              // int 80h
        (&[0xCC], 0x8000_0603, 0, 1, 0),                                    // int3
        (&[0x8B, 0x04, 0x25, 0, 0, 0x40, 0], 0x8000_0B0E, 0, 0, 0x40_0000), // mov eax, [400000h]
        (&[0x0F, 0x05], 0x8000_0306, 0, 0, 0),                              // syscall, not enabled
    ];
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        for (code, info, error, length, payload) in rows {
            let mut processor = machine(kind, true, 1, code);
            processor.core.ring0.is_outside = true;
            let before = (processor.core.gpr, processor.core.cr2);
            let exit = run(&mut processor);
            let got = (exit.reason, exit.intr_info, exit.intr_error, exit.length, exit.qualification);
            assert_eq!((reason::EVENT, info, error, length, payload), got, "{kind:?} {code:x?}");
            assert_eq!((before, CODE), ((processor.core.gpr, processor.core.cr2), processor.core.rip));
        }
    }
}

#[test]
fn an_interrupt_of_the_processors_own_timer_comes_out() {
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        let mut processor = machine(kind, true, 3, &[0xEB, 0xFE]); // jmp $
        let core: &mut Core = &mut processor.core;
        core.ring0.is_outside = true;
        core.apic.write(0xF0, 0x1FF, 0); // enabled by its spurious-vector register
        core.apic.raise_vector(0xFD, false);
        let exit = processor.run(1000, &mut || false);
        assert_eq!((reason::EVENT, 0x8000_00FD), (exit.reason, exit.intr_info), "{kind:?}");
        assert_eq!(CODE, exit.gla);
    }
}
