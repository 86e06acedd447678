//! A program of 64 bits in user mode, with data in every arena and beside them.

#![allow(dead_code)]

use std::sync::Mutex;

use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::dbt::promotion::Windows;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

/// One window of a process has the lowest arena near.
pub static ALONE: Mutex<()> = Mutex::new(());

const PML4: u64 = 0x1000;
const IDT: u64 = 0x8_0000;
const CODE_HPA: u64 = 0x10_0000;
const DATA_HPA: u64 = 0x11_0000;
const STACK_HPA: u64 = 0x12_0000;
/// #PF, #GP, #SS: halt.
const HANDLER: u64 = 0x13_0000;
const USER: u64 = 7;

/// Where programs are, and what they work on: without and with a place of their own.
pub const LOW: u64 = 0x40_0000;
/// See [`LOW`].
pub const PIE: u64 = 0x5555_5555_0000;
/// See [`LOW`].
pub const LIBRARY: u64 = 0x7F12_3456_0000;
/// See [`LOW`].
pub const STACK: u64 = 0x7FFD_1234_0000;
/// In none of the arenas.
pub const OTHER: u64 = 0x6000_0000_0000;

fn map(mem: &Memory, next: &mut u64, gva: u64, hpa: u64) {
    let mut table = PML4;
    for level in (1..4).rev() {
        let entry = table + 8 * (gva >> (12 + 9 * level) & 511);
        if mem.load(entry, 8) == 0 {
            mem.store(entry, 8, *next | USER);
            *next += 0x1000;
        }
        table = mem.load(entry, 8) & !0xFFF;
    }
    mem.store(table + 8 * (gva >> 12 & 511), 8, hpa | USER);
}

/// A processor at a program at `at`, at CPL 3: its data at all places but its code's, its stack.
pub fn machine(engine: EngineKind, windows: Windows, at: u64, program: &[u8]) -> Processor {
    let mem = Memory::new(4 << 20).unwrap();
    mem.write_bytes(CODE_HPA, program);
    let mut next = 0x2000;
    map(&mem, &mut next, at, CODE_HPA);
    for base in [LOW, PIE, LIBRARY, OTHER] {
        (0..16).for_each(|i| map(&mem, &mut next, base + 0x10_0000 + (i << 12), DATA_HPA + (i << 12)));
    }
    (0..16).for_each(|i| map(&mem, &mut next, STACK + (i << 12), STACK_HPA + (i << 12)));
    map(&mem, &mut next, HANDLER, HANDLER);
    map(&mem, &mut next, IDT, IDT);
    assert!(next <= IDT);
    for vector in [12, 13, 14] {
        mem.store(IDT + 16 * vector, 8, HANDLER & 0xFFFF | 8 << 16 | 0xEE00 << 32 | HANDLER >> 16 << 48);
    }
    mem.write_bytes(HANDLER, &[0xF4]); // hlt
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    p.use_windows(windows);
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = (0x8005_0033, PML4, 0x6A0, 0xD01);
    c.seg = [Segment { base: 0, limit: 0, attr: 1 << 16, selector: 0 }; 6];
    c.seg[seg::SS] = Segment { base: 0, limit: u32::MAX, attr: 0xC0F3, selector: 0x2B };
    c.seg[seg::CS] = Segment { base: 0, limit: 0, attr: 0xA0FB, selector: 0x33 };
    c.seg[seg::FS].base = LIBRARY + 0x10_3000;
    c.cpl = 3;
    (c.idtr.base, c.idtr.limit) = (IDT, 0xFFF);
    (c.rip, c.gpr[4]) = (at, STACK + 0x8000);
    c.refresh();
    p
}

/// Let programs make system calls; where in memory their handler's code is to be.
pub fn system_calls(p: &mut Processor) -> u64 {
    let handler = HANDLER + 0x800;
    (p.core.msr.star, p.core.msr.lstar) = (0x0020_0008 << 32, handler);
    handler
}

pub fn run(p: &mut Processor, budget: u64) {
    assert_eq!(reason::BUDGET, p.run(budget, &mut || false).reason);
}

/// What a program and who counts may see.
pub fn seen(p: &mut Processor) -> (u64, String) {
    (state_hash(&mut p.core), format!("{:?}", p.core.counts))
}
