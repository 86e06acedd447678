//! A machine for unit tests: tables at fixed places in a small memory.

use crate::arch::bits::{cr0, cr4, efer};
use crate::arch::exception::Exception;
use crate::arch::segment::{Segment, TableRegister, seg};
use crate::cpu::state::{Clock, Core};
use crate::cpu::trap::Trap;
use crate::dbt::home::Home;
use crate::mem::Memory;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS2: u64 = 0x3200;
pub const PML4: u64 = 0x8000;

pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x18 | 3;
pub const DATA3: u16 = 0x20 | 3;
pub const TSS_SEL: u16 = 0x28;
/// A data segment that is not present.
pub const ABSENT: u16 = 0x38;
/// Conforming code of level 0.
pub const CONFORMING: u16 = 0x40;
/// Free for a test.
pub const SPARE: u16 = 0x48;
pub const CODE16: u16 = 0x60;
pub const TSS2_SEL: u16 = 0x68;
/// 64-bit code of level 0 and 3.
pub const LONG0: u16 = 0x78;
pub const LONG3: u16 = 0x80 | 3;
const GDT_LIMIT: u16 = 0x8F;

/// A descriptor: `access` is the byte with P, DPL, S and type; `flags` G, D/B, L, AVL.
pub fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
}

/// A gate of 32-bit form.
pub fn gate(selector: u16, offset: u64, access: u64) -> u64 {
    offset & 0xFFFF | u64::from(selector) << 16 | access << 40 | (offset >> 16 & 0xFFFF) << 48
}

pub fn set_descriptor(core: &Core, selector: u16, raw: u64) {
    core.mem.store(GDT + u64::from(selector & 0xFFF8), 8, raw);
}

/// Real-address mode with CS:IP = 0:1000, SS:SP = 0:7000 and the IVT at 0.
pub fn real() -> Home {
    let mem = Memory::new(4 << 20).unwrap();
    let mut core = Home::new(mem, Clock::Virtual, 0).unwrap();
    core.idtr = TableRegister { base: 0, limit: 0x3FF };
    core.seg[seg::CS].base = 0;
    core.seg[seg::CS].selector = 0;
    core.rip = 0x1000;
    core.gpr[4] = 0x7000;
    core.refresh();
    core
}

fn with_tables() -> Home {
    let mut core = real();
    for (selector, raw) in [
        (CODE0, descriptor(0, 0xF_FFFF, 0x9B, 0xC)),
        (DATA0, descriptor(0, 0xF_FFFF, 0x93, 0xC)),
        (CODE3, descriptor(0, 0xF_FFFF, 0xFB, 0xC)),
        (DATA3, descriptor(0, 0xF_FFFF, 0xF3, 0xC)),
        (TSS_SEL, descriptor(TSS, 0x67, 0x8B, 0)),
        (ABSENT, descriptor(0, 0xF_FFFF, 0x13, 0xC)),
        (CONFORMING, descriptor(0, 0xF_FFFF, 0x9F, 0xC)),
        (CODE16, descriptor(0, 0xFFFF, 0x9B, 0)),
        (TSS2_SEL, descriptor(TSS2, 0x67, 0x89, 0)),
        (LONG0, descriptor(0, 0, 0x9B, 2)),
        (LONG3, descriptor(0, 0, 0xFB, 2)),
    ] {
        set_descriptor(&core, selector, raw);
    }
    core.gdtr = TableRegister { base: GDT, limit: GDT_LIMIT };
    core.idtr = TableRegister { base: IDT, limit: 0x7FF };
    core.tr = Segment { base: TSS, limit: 0x67, attr: 0x8B, selector: TSS_SEL };
    core.ldtr.attr = 1 << 16;
    core.cr0 = cr0::PE | cr0::NE | cr0::ET;
    core.mem.store(TSS + 4, 4, 0x6000);
    core.mem.store(TSS + 8, 4, u64::from(DATA0));
    core
}

fn flat(selector: u16, attr: u32) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr, selector }
}

/// 32-bit protected mode without paging, flat segments, at level `cpl` (0 or 3);
/// EIP 1000, ESP 7000; ESP0 6000 in a 32-bit TSS.
pub fn protected(cpl: u8) -> Home {
    let mut core = with_tables();
    let (code, data, dpl) = if cpl == 0 { (CODE0, DATA0, 0) } else { (CODE3, DATA3, 0x60) };
    core.seg = [flat(data, 0xC093 | dpl); 6];
    core.seg[seg::CS] = flat(code, 0xC09B | dpl);
    core.cpl = cpl;
    core.refresh();
    core
}

/// 64-bit mode, the first 4 MBytes mapped to themselves for both levels.
pub fn long(cpl: u8) -> Home {
    let mut core = protected(cpl);
    core.mem.store(PML4, 8, (PML4 + 0x1000) | 7);
    core.mem.store(PML4 + 0x1000, 8, (PML4 + 0x2000) | 7);
    core.mem.store(PML4 + 0x2000, 8, 0x87);
    core.mem.store(PML4 + 0x2008, 8, 0x20_0087);
    core.cr3 = PML4;
    core.cr4 = cr4::PAE;
    core.efer = efer::LME | efer::LMA | efer::SCE;
    core.cr0 |= cr0::PG | cr0::WP;
    core.seg[seg::CS].attr = if cpl == 0 { 0xA09B } else { 0xA0FB };
    core.seg[seg::CS].selector = if cpl == 0 { LONG0 } else { LONG3 };
    core.mem.store(TSS + 4, 8, 0x6000);
    core.idtr.limit = 0xFFF;
    core.refresh();
    core
}

/// Set an IDT entry of the core's mode.
pub fn set_gate(core: &Core, v: u8, selector: u16, offset: u64, access: u64) {
    if core.is_long() {
        let place = IDT + 16 * u64::from(v);
        core.mem.store(place, 8, gate(selector, offset, access));
        core.mem.store(place + 8, 8, offset >> 32);
    } else {
        core.mem.store(IDT + 8 * u64::from(v), 8, gate(selector, offset, access));
    }
}

/// The words of a stack, from the top.
pub fn words(core: &Core, sp: u64, size: usize, n: u64) -> Vec<u64> {
    (0..n).map(|i| core.mem.load(sp + i * size as u64, size)).collect()
}

/// The vector and error code of an exception.
pub fn fault<T: std::fmt::Debug>(result: Result<T, Trap>) -> (u8, Option<u32>) {
    match result {
        Err(Trap::Exception(Exception { vector, error, .. })) => (vector, error),
        other => panic!("expected an exception, got {other:?}"),
    }
}
