//! Processors for the programs of [`crate::address_forms::code32`].

#![allow(dead_code)]

use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::dbt::promotion::Windows;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

use crate::address_forms::code32::{BASES, CODE, INDICES, TABLE};
use crate::random::Rng;

const DIRECTORY: u64 = 0x1000;
/// Of the first 4 MBytes, of those at 2 GBytes, of the last.
const TABLES: [(u64, u64); 3] = [(0, 0x2000), (512, 0x3000), (1023, 0x4000)];
const IDT: u64 = 0x8000;
const GDT: u64 = 0x8800;
const TSS: u64 = 0x8900;
const KERNEL_STACK: u64 = 0xA000;
/// Faults that were handled, by vector.
const FAULTS: u64 = 0xA000;
const HANDLER: u64 = 0xB000;
const DATA: u32 = 0x20_0000;
const STACK: u32 = 0x28_0000;
const USER: u64 = 7;
/// To be read by programs, too.
const READ_ONLY: u64 = 5;
/// Not theirs.
const SUPERVISOR: u64 = 3;

/// Addresses at, across and beyond the edges of what is mapped, of 2 and of 4 GBytes, and of data.
pub fn edges() -> Vec<u32> {
    let edges = [0, 0x1_0000, 1 << 31, 0xFFFF_0000, DATA, DATA + 0x1_0000, CODE, TABLE];
    let near = |edge: u32| [-4096, -9, -8, -4, -2, -1, 0, 1, 8].map(|by| edge.wrapping_add_signed(by));
    edges.into_iter().flat_map(near).collect()
}

fn words(rng: &mut Rng) -> Vec<u32> {
    let mut all = edges();
    while all.len() < BASES as usize {
        let place = [DATA, DATA, STACK, 0xFFFF_8000, 1 << 31, 0][rng.below(6) as usize];
        all.push(place + rng.below(0x8000) as u32);
    }
    let signed = [-1, -8, -(1 << 30), i32::MIN].map(i32::cast_unsigned);
    all.extend(signed);
    all.extend([0, 1, 8, 0xFF8, 0x1000, 0x7FFF_FFFF, 0x8000_0000, 0x2000_0000, 0x4000_0000, 2, 4, 0xFFFF]);
    assert_eq!(BASES + INDICES, all.len() as u32);
    all
}

/// Map pages of a linear address: its own frames in the first 4 MBytes, those behind `DATA` elsewhere.
fn map(mem: &Memory, gva: u32, pages: u64, hpa: u64, rights: u64) {
    let directory = u64::from(gva >> 22);
    let table = TABLES.iter().find(|t| t.0 == directory).expect("one of those").1;
    mem.store(DIRECTORY + 4 * directory, 4, table | USER);
    let first = u64::from(gva >> 12 & 1023);
    (0..pages).for_each(|i| mem.store(table + 4 * (first + i), 4, (hpa + (i << 12)) | rights));
}

fn flat(selector: u16, attr: u32, base: u64, limit: u32) -> Segment {
    Segment { base, limit, attr, selector }
}

/// A processor about to run the program of a seed.
pub fn bed(engine: EngineKind, windows: Windows, seed: u64, code: &[u8], has_avx: bool) -> Processor {
    let mem = Memory::new(4 << 20).unwrap();
    for (gva, pages, hpa, rights) in [
        (0x8000, 4, 0x8000, SUPERVISOR),
        (CODE, 1, CODE.into(), READ_ONLY),
        (TABLE, 1, TABLE.into(), READ_ONLY),
        (DATA, 16, DATA.into(), USER),
        (STACK, 16, STACK.into(), USER),
        (0, 4, 0x30_0000, USER),
        (1 << 31, 8, 0x31_0000, USER),
        (0xFFFF_0000, 16, 0x32_0000, USER),
    ] {
        map(&mem, gva, pages, hpa, rights);
    }
    mem.write_bytes(CODE.into(), code);
    let words = words(&mut Rng(seed ^ 0x7AB1E));
    (0..).zip(words).for_each(|(i, w)| mem.store(u64::from(TABLE) + 4 * i, 4, w.into()));
    let descriptors = [0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
    let of_programs = [0x00CF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF];
    (0..).zip(descriptors.into_iter().chain(of_programs)).for_each(|(i, d)| mem.store(GDT + 8 * i, 8, d));
    mem.store(TSS + 4, 4, KERNEL_STACK);
    mem.store(TSS + 8, 4, 0x10);
    for vector in [12, 13, 14] {
        let handler = HANDLER + 0x40 * vector;
        let gate = handler & 0xFFFF | 8 << 16 | 0xEE00 << 32 | handler >> 16 << 48;
        mem.store(IDT + 8 * vector, 8, gate);
        let [a, b, c, d] = ((FAULTS + 8 * vector) as u32).to_le_bytes();
        let code = [
            0xFF, 0x05, a, b, c, d,    // inc dword [count]
            0x50, // push eax
            0x66, 0x0F, 0x7E, 0xF0, // movd eax, xmm6
            0x89, 0x44, 0x24, 0x08, // mov [esp + 8], eax
            0x58, // pop eax
            0x83, 0xC4, 0x04, // add esp, 4
            0xCF, // iretd
        ];
        mem.write_bytes(handler, &code);
    }
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    p.use_windows(windows);
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4) = (0x8001_0033, DIRECTORY, 0x600);
    if has_avx {
        (c.cr4, c.xcr0) = (c.cr4 | 1 << 18, 7);
    }
    c.seg = [flat(0x23, 0xC0F3, 0, u32::MAX); 6];
    c.seg[seg::CS] = flat(0x1B, 0xC0FB, 0, u32::MAX);
    c.seg[seg::FS].base = u64::from(DATA) + 0x8000;
    // Its addresses go round 4 GBytes; that of some programs has a limit, too.
    c.seg[seg::GS].base = 0xFFFF_F000;
    if seed.is_multiple_of(4) {
        c.seg[seg::GS].limit = 0x1_0FFF;
    }
    c.cpl = 3;
    (c.idtr.base, c.idtr.limit) = (IDT, 0x7FF);
    (c.gdtr.base, c.gdtr.limit) = (GDT, 0x27);
    c.tr = flat(0x28, 0x8B, TSS, 0x67);
    (c.rip, c.gpr[4]) = (CODE.into(), u64::from(STACK) + 0x8000);
    c.fx.0[160 + 16 * 7..][..4].copy_from_slice(&(seed as u32).to_le_bytes());
    c.refresh();
    p
}

/// How many rounds its program has begun.
pub fn rounds(p: &Processor) -> u64 {
    let bytes = p.core.fx.0[160 + 16 * 5..][..4].try_into().unwrap();
    u32::from_le_bytes(bytes).into()
}

/// How many faults were handled: #SS, #GP, #PF.
pub fn faults(p: &Processor) -> [u64; 3] {
    [12, 13, 14].map(|vector| p.core.mem.load(FAULTS + 8 * vector, 4))
}
