//! Each thing of which generated code makes sure in windows has a program that would leave them without.
//!
//! What: the programs of [`lures`], translated for operands in an arena, then run with others; where
//! they would be led lie canaries.  Source: the checks of `dbt/arena.rs`, `dbt/facts.rs`, `dbt/mode.rs`,
//! `dbt/levels.rs`, `dbt/callback.rs`, and the guards of `mmu/window.rs`; without one of them, at least one of
//! the programs ends otherwise.  Invariant: as under the reference engine, and the canaries are as they
//! were.  `confinement.rs` is the same with random programs.

mod arena_bed;
mod canaries;
mod lures;

use std::sync::PoisonError;

use arena_bed::{ALONE, LIBRARY, LOW, STACK, give_edges, give_table, machine, memory_of, system_calls};
use canaries::Canaries;
use lures::{FS, Lure, Registers, WORDS, lures};
use silicon::arch::segment::seg;
use silicon::cpu::state::Activity;
use silicon::dbt::promotion::Windows;
use silicon::mmu::window::Current;
use silicon::processor::{EngineKind, Processor};

/// For ever: pause.
const END: [u8; 4] = [0xF3, 0x90, 0xEB, 0xFC];
/// The kernel: mov rsp, rbp; sysretq.
const KERNEL: [u8; 6] = [0x48, 0x89, 0xEC, 0x48, 0x0F, 0x07];
/// More than a program has.
const INSTRUCTIONS: u64 = 400;
/// How often it runs before it is led astray.
const TIMES: usize = 6;

fn bed(engine: EngineKind, windows: Windows, lure: &Lure) -> Processor {
    let mut p = machine(engine, windows, lure.at, &[&lure.code[..], &END].concat());
    give_table(&mut p, &WORDS);
    give_edges(&mut p);
    let handler = system_calls(&mut p);
    p.core.mem.write_bytes(handler, &KERNEL);
    p.core.msr.fmask = 1 << 18; // AC
    p.core.cr4 |= 1 << 16; // FSGSBASE
    p
}

/// What it leaves when it begins with these registers.
fn run(p: &mut Processor, at: u64, registers: &Registers) -> (u64, u64, [u64; 16], u8) {
    let c = &mut *p.core;
    (c.cpl, c.rip, c.rflags, c.activity) = (3, at, 2, Activity::Active);
    c.gpr = [0; 16];
    c.gpr[4] = STACK + 0x8000;
    c.seg[seg::FS].base = LIBRARY + 0x10_3000;
    for &(register, value) in registers {
        if register == FS {
            c.seg[seg::FS].base = value;
        } else {
            c.gpr[register] = value;
        }
    }
    c.seg[seg::SS].attr = 0xC0F3;
    c.seg[seg::CS].attr = 0xA0FB;
    c.refresh();
    p.run(INSTRUCTIONS, &mut || false);
    (p.core.rip, p.core.cr2, p.core.gpr, p.core.cpl)
}

/// Somebody else with the lowest arena near, whose data are others.
fn neighbour() -> Processor {
    let mut p = machine(EngineKind::Dbt, Windows::Always, LOW, &[&[0x48, 0x8B, 0x03], &END[..]].concat());
    p.core.mem.write_bytes(0x11_0000, &[0x99; 4096]);
    for _ in 0..3 {
        run(&mut p, LOW, &vec![(3, LOW + 0x10_0000)]);
    }
    p
}

fn window(p: &Processor) -> Current {
    p.core.tlb.windows.current().expect("a window")
}

/// The processors of a program, compared all the way; those with windows at last.
fn lead(lure: &Lure) -> usize {
    let _neighbour = lure.has_neighbour.then(neighbour);
    let always = || bed(EngineKind::Dbt, Windows::Always, lure);
    let mut reference = bed(EngineKind::Reference, Windows::Never, lure);
    // The first one that has the lowest arena has it near, the other one far.
    let mut both = [always(), always()];
    for turn in 0..TIMES {
        let expected = run(&mut reference, lure.at, &lure.good);
        for (i, p) in both.iter_mut().enumerate() {
            assert_eq!(expected, run(p, lure.at, &lure.good), "{}, turn {turn}, window {i}", lure.of);
        }
    }
    let windows = both.each_ref().map(window);
    assert_eq!([false, lure.at == LOW], windows.map(|w| w.is_far()), "{}", lure.of);
    let distances = windows.iter().flat_map(|w| [Some(w.base), w.low]).flatten().chain([0]);
    let places = distances.flat_map(|d| lure.astray.iter().map(move |at| at.wrapping_add(d)));
    let canaries = Canaries::at(places);
    let expected = run(&mut reference, lure.at, &lure.bad);
    for (i, p) in both.iter_mut().enumerate() {
        assert_eq!(expected, run(p, lure.at, &lure.bad), "{}, window {i}", lure.of);
    }
    assert_eq!(Vec::<u64>::new(), canaries.disturbed(), "{}", lure.of);
    assert_eq!(windows, both.each_ref().map(window), "{}", lure.of);
    let memory = both.each_ref().map(memory_of);
    assert_eq!([memory_of(&reference); 2], memory, "{}", lure.of);
    canaries.len()
}

#[test]
fn nobody_is_led_astray() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for lure in lures() {
        let canaries = lead(&lure);
        assert!(canaries > 0 || lure.astray.is_empty() || lure.is_guarded, "{}", lure.of);
    }
}

/// What was translated for the lowest arena near is nothing for it far: there is somebody else's.
#[test]
fn what_is_near_for_another_is_not_for_this() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let all = lures();
    let lure = all.iter().find(|l| l.of == "a base in the lowest arena").unwrap();
    let mut reference = bed(EngineKind::Reference, Windows::Never, lure);
    let mut p = bed(EngineKind::Dbt, Windows::Always, lure);
    assert_eq!(run(&mut reference, LOW, &lure.good), run(&mut p, LOW, &lure.good));
    assert!(!window(&p).is_far());
    p.use_windows(Windows::Always); // the present one is closed
    let other = neighbour();
    for turn in 0..TIMES {
        assert_eq!(run(&mut reference, LOW, &lure.good), run(&mut p, LOW, &lure.good), "turn {turn}");
    }
    assert!(window(&p).is_far());
    assert_eq!(memory_of(&reference), memory_of(&p));
    assert!(!window(&other).is_far());
}
