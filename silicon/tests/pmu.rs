//! Performance monitoring, version 2: exact counts and exact overflows under both engines.

use silicon::arch::exit::reason;
use silicon::arch::segment::{TableRegister, seg};
use silicon::cpu::msr;
use silicon::cpu::state::{Clock, Core};
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot;

const ENGINES: [EngineKind; 2] = [EngineKind::Reference, EngineKind::Dbt];
const FULL: u64 = 1 << 48;
const PMC0: u32 = 0xC1;
const PERFEVTSEL0: u32 = 0x186;
const DEBUGCTL: u32 = 0x1D9;
const FIXED0: u32 = 0x309;
const FIXED_CTRL: u32 = 0x38D;
const STATUS: u32 = 0x38E;
const GLOBAL: u32 = 0x38F;
const CLEAR: u32 = 0x390;
const A_PMC0: u32 = 0x4C1;
const LVT_PC: u32 = 0x834;
const ALL: u64 = 7 << 32 | 0xF;
/// EN, INT, and the event "instructions retired".
const INSTRUCTIONS: u64 = 1 << 22 | 1 << 20 | 0xC0;
const OS: u64 = 1 << 17;
const USR: u64 = 1 << 16;

const CODE: u64 = 0x1000;
const USER: u64 = 0x3000;
const NMI: u64 = 0x4000;
const VECTOR_40: u64 = 0x4100;
const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const TSS: u64 = 0x6100;

/// A loop of 11 instructions, of which one is a repeated string instruction.
const LOOP: [u8; 34] = [
    0xB9, 5, 0, 0, 0, // mov ecx, 5
    0xBF, 0, 0, 1, 0, // mov edi, 10000h
    0xF3, 0xAA, // rep stosb
    0x48, 0xFF, 0xC3, // inc rbx
    0x48, 0x89, 0xDA, // mov rdx, rbx
    0x83, 0xE2, 3, // and edx, 3
    0x75, 2, // jnz +2
    0x90, 0x90, // nop; nop
    0x53, // push rbx
    0x5A, // pop rdx
    0x0F, 0x1F, 0, // nop dword [rax]
    0xEB, 0xE0, // jmp to the start
    0x90, 0x90,
];

/// 64-bit code at level 0, with an IDT, SYSCALL to level 0 and SYSRET to level 3.
fn machine(kind: EngineKind) -> Processor {
    let mem = Memory::new(4 << 20).unwrap();
    let mut p = Processor::new(mem.clone(), kind, Clock::Virtual, 0).unwrap();
    let core = &mut *p.core;
    for (at, entry) in [(0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0x87), (0xA008, 0x20_0087)] {
        mem.store(at, 8, entry);
    }
    for (n, raw) in
        [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF_u64]
            .iter()
            .enumerate()
    {
        mem.store(GDT + 8 * n as u64, 8, *raw);
    }
    for (vector, at) in [(2, NMI), (0x40, VECTOR_40)] {
        mem.store(IDT + 16 * vector, 8, at & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (at >> 16) << 48);
        mem.write_bytes(at, &[0xF4, 0xEB, 0xFD]); // hlt
    }
    mem.store(TSS + 4, 8, 0x20_8000);
    core.gdtr = TableRegister { base: GDT, limit: 0x2F };
    core.idtr = TableRegister { base: IDT, limit: 0xFFF };
    core.tr.base = TSS;
    core.tr.limit = 0x67;
    core.tr.attr = 0x8B;
    core.seg[seg::CS].attr = 0xA09B;
    core.seg[seg::CS].selector = 8;
    core.seg[seg::CS].base = 0;
    core.seg[seg::SS].selector = 0x10;
    core.seg[seg::SS].attr = 0xC093;
    (core.cr0, core.cr3, core.cr4, core.efer, core.rip) = (0x8001_0033, 0x8000, 0x20, 0x501, CODE);
    core.gpr[4] = 0x20_7000;
    core.msr.star = 0x1B << 48 | 8 << 32;
    core.msr.lstar = CODE;
    core.refresh();
    mem.write_bytes(CODE, &LOOP);
    write(core, 0x1B, 0xFEE0_0D00); // x2APIC
    write(core, 0x80F, 0x1FF);
    p
}

fn write(core: &mut Core, index: u32, value: u64) {
    assert!(msr::write(core, index, value).is_ok(), "{index:#x} {value:#x}");
}

fn read(core: &mut Core, index: u32) -> u64 {
    msr::read(core, index).unwrap()
}

fn run(p: &mut Processor, budget: u64) -> u32 {
    p.run(budget, &mut || false).reason
}

#[test]
fn instructions_and_cycles_are_counted_exactly() {
    for kind in ENGINES {
        let mut p = machine(kind);
        let core = &mut *p.core;
        write(core, FIXED_CTRL, 0x333);
        write(core, PERFEVTSEL0, INSTRUCTIONS | OS);
        write(core, PERFEVTSEL0 + 1, INSTRUCTIONS | USR);
        write(core, PERFEVTSEL0 + 2, 1 << 22 | OS | 0x3C);
        write(core, PERFEVTSEL0 + 3, 1 << 22 | OS | 0xC4); // branches: not counted
        write(core, GLOBAL, ALL);
        let mut total = 0;
        for n in [1, 2, 3, 100, 12_345, 500_000] {
            assert_eq!(reason::BUDGET, run(&mut p, n));
            total += n;
            let core = &mut *p.core;
            let counted: Vec<u64> =
                (FIXED0..FIXED0 + 3).chain(PMC0..PMC0 + 4).map(|i| read(core, i)).collect();
            assert_eq!(vec![total, total, total, total, 0, total, 0], counted, "{kind:?}");
        }
        write(&mut p.core, GLOBAL, 0xE);
        assert_eq!(reason::BUDGET, run(&mut p, 1000));
        assert_eq!((total, total), (read(&mut p.core, FIXED0), read(&mut p.core, PMC0)));
        assert_eq!(total + 1000, read(&mut p.core, PMC0 + 2));
    }
}

/// Until a counter with `n` to go interrupts: (retired, RIP that was pushed, level, status).
fn overflow(kind: EngineKind, n: u64, lvt: u64, arm: fn(&mut Core, u64)) -> (u64, u64, u64, u64) {
    let mut p = machine(kind);
    write(&mut p.core, LVT_PC, lvt);
    arm(&mut p.core, n);
    write(&mut p.core, GLOBAL, ALL);
    assert_eq!(reason::HALT, run(&mut p, 100_000));
    let core = &mut *p.core;
    assert_eq!(1 << 16, read(core, LVT_PC) & 1 << 16, "the entry is masked");
    let (rip, cs) = (core.mem.load(core.gpr[4], 8), core.mem.load(core.gpr[4] + 8, 8));
    // The HLT of the handler has retired.
    (core.retired() - 1, rip, cs & 3, read(core, STATUS))
}

fn fixed(core: &mut Core, n: u64) {
    write(core, FIXED0, FULL - n);
    write(core, FIXED_CTRL, 0xB);
}

fn general(core: &mut Core, n: u64) {
    write(core, A_PMC0 + 3, FULL - n);
    write(core, PERFEVTSEL0 + 3, INSTRUCTIONS | OS);
}

#[test]
fn an_overflow_interrupts_at_the_end_of_its_instruction() {
    for n in (1..120).chain([1000, 4321, 99_000]) {
        let mut plain = machine(EngineKind::Reference);
        assert_eq!(reason::BUDGET, run(&mut plain, n));
        let expected = (n, plain.core.rip, 0);
        for kind in ENGINES {
            let (retired, rip, level, status) = overflow(kind, n, 0x400, fixed);
            assert_eq!((expected, 1 << 32), ((retired, rip, level), status), "{kind:?}, {n}");
            let (retired, rip, level, status) = overflow(kind, n, 0x400, general);
            assert_eq!((expected, 1 << 3), ((retired, rip, level), status), "{kind:?}, {n}");
        }
    }
}

#[test]
fn a_fixed_vector_waits_for_interrupts_to_be_enabled() {
    for kind in ENGINES {
        let mut p = machine(kind);
        write(&mut p.core, LVT_PC, 0x40);
        fixed(&mut p.core, 50);
        write(&mut p.core, GLOBAL, ALL);
        assert_eq!(reason::BUDGET, run(&mut p, 60));
        assert_eq!(Some(0x40), p.core.apic.pending());
        p.core.rflags |= 1 << 9;
        assert_eq!(reason::HALT, run(&mut p, 100));
        assert_eq!((VECTOR_40 + 1, 61), (p.core.rip, p.core.retired()));
    }
}

/// Level 3: `dec rbx; jnz; syscall; jmp`; level 0: `inc rbx; sysretq`.
fn two_levels(core: &mut Core) {
    core.mem.write_bytes(USER, &[0x48, 0xFF, 0xCB, 0x75, 0xFB, 0x0F, 0x05, 0xEB, 0xF7]);
    core.mem.write_bytes(CODE, &[0x48, 0x83, 0xC3, 3, 0x48, 0x0F, 0x07]);
    (core.gpr[1], core.gpr[11], core.gpr[3], core.rip) = (USER, 2, 0, CODE);
}

fn user(core: &mut Core, n: u64) {
    two_levels(core);
    write(core, FIXED0, FULL - n);
    write(core, FIXED_CTRL, 0xA);
}

#[test]
fn levels_are_told_apart() {
    for kind in ENGINES {
        let mut p = machine(kind);
        two_levels(&mut p.core);
        write(&mut p.core, PERFEVTSEL0, INSTRUCTIONS & !(1 << 20) | USR);
        write(&mut p.core, PERFEVTSEL0 + 1, INSTRUCTIONS & !(1 << 20) | OS);
        write(&mut p.core, GLOBAL, ALL);
        // add; then sysretq, which counts at level 3; three rounds of two, and syscall counts at 0.
        for (n, at_user) in [(1, 0), (2, 1), (7, 6), (8, 7), (9, 7), (10, 7), (11, 8), (12, 9)] {
            let done = p.core.retired();
            assert_eq!(reason::BUDGET, run(&mut p, n - done));
            let counted = (read(&mut p.core, PMC0), read(&mut p.core, PMC0 + 1));
            assert_eq!((at_user, n - at_user), counted, "{kind:?}, {n}");
        }
    }
}

#[test]
fn an_overflow_of_one_level_is_exact() {
    for n in 1..60 {
        let [reference, dbt] = ENGINES.map(|kind| overflow(kind, n, 0x400, user));
        assert_eq!(reference, dbt, "{n}");
        let mut p = machine(EngineKind::Reference);
        two_levels(&mut p.core);
        let mut at_user = 0;
        while at_user < n {
            assert_eq!(reason::BUDGET, run(&mut p, 1));
            at_user += u64::from(p.core.cpl == 3);
        }
        assert_eq!((p.core.retired(), p.core.rip, 3, 1 << 32), reference, "{n}");
    }
}

#[test]
fn freezing_stops_every_counter_at_the_interrupt() {
    for kind in ENGINES {
        let mut p = machine(kind);
        write(&mut p.core, LVT_PC, 0x400);
        write(&mut p.core, DEBUGCTL, 1 << 12);
        fixed(&mut p.core, 50);
        write(&mut p.core, PERFEVTSEL0, INSTRUCTIONS | OS);
        write(&mut p.core, GLOBAL, ALL);
        assert_eq!(reason::HALT, run(&mut p, 100));
        let core = &mut *p.core;
        assert_eq!((0, 50, 0), (read(core, GLOBAL), read(core, PMC0), read(core, FIXED0)));
        write(core, CLEAR, 1 << 32);
        assert_eq!(0, read(core, STATUS));
    }
}

#[test]
fn registers_refuse_reserved_bits() {
    let mut p = machine(EngineKind::Reference);
    let core = &mut *p.core;
    write(core, PMC0, 0x1_8000_0000); // sign-extended from bit 31
    assert_eq!(0xFFFF_8000_0000, read(core, PMC0));
    for (index, value) in [
        (A_PMC0, FULL),
        (FIXED0, FULL),
        (PERFEVTSEL0, 1 << 21),
        (PERFEVTSEL0, 1 << 32),
        (FIXED_CTRL, 4),
        (FIXED_CTRL, 1 << 12),
        (GLOBAL, 1 << 4),
        (GLOBAL, 1 << 35),
        (STATUS, 0),
        (CLEAR, 1 << 4),
        (0x345, 0),
        (PMC0 + 4, 0),
        (PERFEVTSEL0 + 4, 0),
        (FIXED0 + 3, 0),
    ] {
        assert!(msr::write(core, index, value).is_err(), "{index:#x} {value:#x}");
    }
    assert_eq!((None, None), (msr::read(core, PMC0 + 4), msr::read(core, 0x38C)));
}

#[test]
fn rdpmc_reads_from_level_3_if_cr4_lets_it() {
    for kind in ENGINES {
        for (pce, ecx) in [(true, 1_u64 << 30), (true, 0), (false, 0), (true, 4), (true, 3 | 1 << 30)] {
            let mut p = machine(kind);
            let core = &mut *p.core;
            two_levels(core);
            // nop; rdpmc; mov ebx, eax; jmp $
            core.mem.write_bytes(USER, &[0x90, 0x0F, 0x33, 0x89, 0xC3, 0xEB, 0xFE]);
            core.mem.store(IDT + 16 * 13, 8, NMI & 0xFFFF | 8 << 16 | 0x8E00 << 32);
            core.cr4 |= u64::from(pce) << 8;
            core.rip = CODE + 4;
            (core.gpr[1], core.gpr[3]) = (USER, 0xFF);
            core.refresh();
            write(core, PERFEVTSEL0, INSTRUCTIONS & !(1 << 20) | USR | OS);
            write(core, FIXED_CTRL, 3);
            write(core, GLOBAL, ALL);
            assert_eq!(reason::BUDGET, run(&mut p, 1)); // sysretq takes RIP from RCX
            p.core.gpr[1] = ecx;
            let why = run(&mut p, 10);
            let is_there = pce && ecx & 0xF == 0;
            assert_eq!(if is_there { reason::BUDGET } else { reason::HALT }, why, "{kind:?} {pce} {ecx:#x}");
            assert_eq!(if is_there { 2 } else { 0xFF }, p.core.gpr[3], "{kind:?} {pce} {ecx:#x}");
        }
    }
}

#[test]
fn a_processor_that_is_saved_goes_on_counting() {
    let mut p = machine(EngineKind::Dbt);
    write(&mut p.core, LVT_PC, 0x400);
    fixed(&mut p.core, 777);
    write(&mut p.core, GLOBAL, ALL);
    assert_eq!(reason::BUDGET, run(&mut p, 700));
    let bytes = snapshot::save(&mut p.core);
    let mut other = machine(EngineKind::Reference);
    snapshot::load(&mut other.core, &bytes).unwrap();
    assert_eq!(snapshot::state_hash(&mut p.core), snapshot::state_hash(&mut other.core));
    for each in [&mut p, &mut other] {
        assert_eq!(reason::HALT, run(each, 10_000));
        assert_eq!(778, each.core.retired());
    }
}
