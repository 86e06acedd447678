//! A program of 64 bits in user mode, with data in every arena and beside them.

#![allow(dead_code)]

use std::sync::Mutex;

use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::dbt::promotion::Windows;
use silicon::mem::Memory;
use silicon::mmu::window::HIGH;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

/// One window of a process has the lowest arena near.
pub static ALONE: Mutex<()> = Mutex::new(());

const PML4: u64 = 0x1000;
const IDT: u64 = 0x8_0000;
/// Where a program's code is in memory.
pub const CODE_HPA: u64 = 0x10_0000;
const DATA_HPA: u64 = 0x11_0000;
const STACK_HPA: u64 = 0x12_0000;
/// #PF, #GP, #SS: halt.
const HANDLER: u64 = 0x13_0000;
const USER: u64 = 7;
/// To be read by programs, too.
const READ_ONLY: u64 = 5;

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
    map_as(mem, next, gva, hpa | USER);
}

fn map_as(mem: &Memory, next: &mut u64, gva: u64, entry: u64) {
    let mut table = PML4;
    for level in (1..4).rev() {
        let entry = table + 8 * (gva >> (12 + 9 * level) & 511);
        if mem.load(entry, 8) == 0 {
            mem.store(entry, 8, *next | USER);
            *next += 0x1000;
        }
        table = mem.load(entry, 8) & !0xFFF;
    }
    mem.store(table + 8 * (gva >> 12 & 511), 8, entry);
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

const CODE_TABLES: u64 = 0x3_0000;

/// Let a program of two pages be at other places, too, and its data 1 MByte behind it.
pub fn give_code(p: &mut Processor, places: &[u64]) {
    let (mem, mut next) = (&p.core.mem, CODE_TABLES);
    for at in places {
        (0..2).for_each(|i| map(mem, &mut next, at + (i << 12), CODE_HPA + (i << 12)));
        (0..16).for_each(|i| map(mem, &mut next, at + 0x10_0000 + (i << 12), DATA_HPA + (i << 12)));
    }
    assert!(next <= EDGE_TABLES);
}

/// Let there be data at pages.
pub fn give_data(p: &mut Processor, pages: &[u64]) {
    let (mem, mut next) = (&p.core.mem, EDGE_TABLES);
    for &at in pages {
        map(mem, &mut next, at, DATA_HPA);
    }
}

/// What programs read and cannot write, at a place that none of their own accesses reaches.
pub const TABLE: u64 = LIBRARY + 0x4000_0000;
const TABLE_HPA: u64 = 0x14_0000;
const MORE_TABLES: u64 = 0x7_0000;
const GDT: u64 = IDT + 0x400;
const TSS: u64 = IDT + 0x500;
const KERNEL_STACK: u64 = IDT + 0xC00;
/// Faults that were handled, by vector.
const FAULTS: u64 = IDT + 0xC00;

/// Let a program have what it reads at [`TABLE`].
pub fn give_table(p: &mut Processor, words: &[u64]) {
    let mem = &p.core.mem;
    (0..).zip(words).for_each(|(i, &word)| mem.store(TABLE_HPA + 8 * i, 8, word));
    let mut next = MORE_TABLES;
    let pages = (8 * words.len() as u64).div_ceil(4096);
    (0..pages).for_each(|i| map_as(mem, &mut next, TABLE + (i << 12), (TABLE_HPA + (i << 12)) | READ_ONLY));
}

/// Let #PF, #GP and #SS be counted, and the program go on where R15 says.
pub fn skip_faults(p: &mut Processor) {
    let c = &mut *p.core;
    let mem = &c.mem;
    let mut next = MORE_TABLES;
    map_as(mem, &mut next, IDT, IDT | 3); // the kernel's alone
    let descriptors = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0, 0x00CF_F300_0000_FFFF];
    (0..).zip(descriptors).for_each(|(i, d)| mem.store(GDT + 8 * i, 8, d));
    mem.store(GDT + 0x30, 8, 0x00AF_FB00_0000_FFFF);
    mem.store(TSS + 4, 8, KERNEL_STACK); // RSP0
    (c.gdtr.base, c.gdtr.limit) = (GDT, 0x37);
    c.tr = Segment { base: TSS, limit: 0x67, attr: 0x8B, selector: 0x38 };
    for vector in [12, 13, 14] {
        let (handler, count) = (HANDLER + 0x20 * vector, (FAULTS + 8 * vector) as u32);
        mem.store(IDT + 16 * vector, 8, handler & 0xFFFF | 8 << 16 | 0xEE00 << 32 | handler >> 16 << 48);
        let [a, b, c, d] = count.to_le_bytes();
        let code = [
            0x48, 0xFF, 0x04, 0x25, a, b, c, d, // inc qword [count]
            0x4C, 0x89, 0x7C, 0x24, 0x08, // mov [rsp + 8], r15
            0x48, 0x83, 0xC4, 0x08, // add rsp, 8
            0x48, 0xCF, // iretq
        ];
        mem.write_bytes(handler, &code);
    }
}

const EDGE_TABLES: u64 = 0x5_0000;

/// Let there be data at the first and last pages of arenas, and everywhere beside the high ones: a page
/// that is the same one for 512 GBytes.
pub fn give_edges(p: &mut Processor) {
    let mem = &p.core.mem;
    let tables = [EDGE_TABLES, EDGE_TABLES + 0x1000, EDGE_TABLES + 0x2000];
    for (table, entry) in tables.into_iter().zip([tables[1], tables[2], DATA_HPA]) {
        (0..512).for_each(|i| mem.store(table + 8 * i, 8, entry | USER));
    }
    let beside = |arena: u64| [arena - 1, arena, arena + 7, arena + 8];
    for slot in [HIGH[0] * 8, HIGH[1] * 8].into_iter().flat_map(beside).chain([7, 8]) {
        if slot < 255 {
            mem.store(PML4 + 8 * slot, 8, EDGE_TABLES | USER);
        }
    }
    let mut next = EDGE_TABLES + 0x3000;
    (0..2).for_each(|i| map(mem, &mut next, i << 12, DATA_HPA + (i << 12)));
}

/// How many faults were handled: #SS, #GP, #PF.
pub fn faults(p: &Processor) -> [u64; 3] {
    [12, 13, 14].map(|vector| p.core.mem.load(FAULTS + 8 * vector, 8))
}

/// Let programs use YMM registers.
pub fn enable_avx(p: &mut Processor) {
    (p.core.cr4, p.core.xcr0) = (p.core.cr4 | 1 << 18, 7);
    p.core.refresh();
}

/// All that is in a processor's memory, as one number.
pub fn memory_of(p: &Processor) -> u64 {
    (0..4 << 17).map(|i| p.core.mem.load(8 * i, 8)).fold(0, |h: u64, v| h.rotate_left(5) ^ v)
}

/// Addresses at, across and beyond every edge of an arena, of its guards, and of what is an address.
pub fn edges() -> Vec<u64> {
    let edges = [0, 1 << 31, 1 << 32, 1 << 42, 0x15 << 42, 0x16 << 42, 0x1F << 42, 1 << 47, OTHER];
    let guards = [0, 64 << 20, 2 << 30, 34 << 30, 64 << 30];
    let near = |edge: u64| [-4096, -9, -8, -1, 0, 1, 8].map(|by| edge.wrapping_add_signed(by));
    let places = edges.into_iter().flat_map(|edge| {
        guards.into_iter().flat_map(move |g: u64| [edge.wrapping_add(g), edge.wrapping_sub(g)])
    });
    let mut all: Vec<u64> = places.flat_map(near).collect();
    let data = [LOW, PIE, LIBRARY].map(|base| base + 0x10_8000);
    all.extend(data.into_iter().flat_map(near));
    all.extend(data.map(|at| at | 1 << 62)); // not canonical
    all
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
