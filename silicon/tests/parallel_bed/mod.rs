//! Processors of one memory, each in a thread of its own.
#![allow(dead_code)] // each test file uses some of it

use std::sync::Arc;

use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

pub use EngineKind::{Dbt, Reference};

/// Pairs of engines.
pub const PAIRS: [[EngineKind; 2]; 3] = [[Dbt, Dbt], [Reference, Dbt], [Reference, Reference]];

/// Where the linear pages from here on are mapped one by one: see [`memory`].
pub const WINDOW: u64 = 0x4000_0000;
/// The frames of the window's pages: the second lies behind the first, the third before it.
pub const FRAMES: [u64; 4] = [0x30_1000, 0x30_2000, 0x30_0000, 0x30_5000];
/// The first of the tables' frames.
const TABLES: u64 = 0x10_0000;
/// The window's page table.
pub const WINDOW_TABLE: u64 = TABLES + 0x4000;

/// 32 MBytes, mapped where they are, writable and executable by everybody, and a window of four
/// pages.
pub fn memory() -> Arc<Memory> {
    let mem = Memory::new(32 << 20).unwrap();
    mem.store(TABLES, 8, TABLES + 0x1007);
    mem.store(TABLES + 0x1000, 8, TABLES + 0x2007);
    mem.store(TABLES + 0x1008, 8, TABLES + 0x3007);
    for i in 0..16 {
        mem.store(TABLES + 0x2000 + 8 * i, 8, i << 21 | 0x87);
    }
    mem.store(TABLES + 0x3000, 8, WINDOW_TABLE | 7);
    for (i, frame) in FRAMES.iter().enumerate() {
        mem.store(WINDOW_TABLE + 8 * i as u64, 8, frame | 7);
    }
    mem
}

/// A processor in 64-bit mode, about to execute at `rip`.
pub fn processor(mem: &Arc<Memory>, kind: EngineKind, id: u32, rip: u64) -> Processor {
    let mut p = Processor::new(mem.clone(), kind, Clock::Virtual, id).unwrap();
    let core = &mut *p.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer, core.rip) = (0x8001_0033, TABLES, 0x20, 0x500, rip);
    core.gpr[4] = 0x20_0000 + 0x1000 * (u64::from(id) + 1);
    core.refresh();
    p
}

/// Run all of them at once, until each halts.
pub fn run_all(processors: &mut [Processor]) {
    std::thread::scope(|scope| {
        for p in processors {
            scope.spawn(|| assert_eq!(reason::HALT, p.run(0, &mut || false).reason));
        }
    });
}

/// How often a test repeats: the short form unless SILICON_LONG is set.
pub fn times(short: u64, long: u64) -> u64 {
    if std::env::var_os("SILICON_LONG").is_some() { long } else { short }
}
