//! Code that one processor of a memory has translated and another, or the host, writes over.

use std::sync::Arc;

use crate::arch::exit::reason;
use crate::arch::segment::seg;
use crate::cpu::state::Clock;
use crate::mem::Memory;
use crate::processor::{EngineKind, Processor};

const CALLER: u64 = 0x1000;
const FUNCTION: u64 = 0x2000;
const STORE: u64 = 0x3000;
const ENGINES: [EngineKind; 2] = [EngineKind::Reference, EngineKind::Dbt];

/// 64-bit code over an identity-mapped 2-MByte page.
fn memory() -> Arc<Memory> {
    let mem = Memory::new(1 << 21).unwrap();
    for (at, entry) in [(0x8000, 0x9003), (0x9000, 0xA003), (0xA000, 0x83)] {
        mem.store(at, 8, entry);
    }
    mem.write_bytes(CALLER, &[0xE8, 0xFB, 0x0F, 0, 0, 0xEB, 0xF9]); // call FUNCTION; jmp CALLER
    mem.write_bytes(FUNCTION, &[0xB8, 1, 0, 0, 0, 0xC3]); // mov eax, 1; ret
    mem.write_bytes(STORE, &[0x88, 0x0F, 0xEB, 0xFC]); // mov [rdi], cl; jmp STORE
    mem
}

fn processor(mem: &Arc<Memory>, kind: EngineKind) -> Processor {
    let mut p = Processor::new(mem.clone(), kind, Clock::Virtual, 0).unwrap();
    let core = &mut *p.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer, core.gpr[4]) = (0x8001_0033, 0x8000, 0x20, 0x500, 0x7000);
    core.refresh();
    p
}

fn go(p: &mut Processor, from: u64) {
    p.core.rip = from;
    assert_eq!(reason::BUDGET, p.run(5000, &mut || false).reason);
}

/// What the function returns when this processor runs it.
fn result(p: &mut Processor) -> u64 {
    go(p, CALLER);
    p.core.gpr[0]
}

/// Let this processor write a byte, thousands of times.
fn write(p: &mut Processor, at: u64, value: u8) {
    (p.core.gpr[7], p.core.gpr[1]) = (at, value.into());
    go(p, STORE);
}

#[test]
fn nobody_runs_stale_code_whoever_wrote_over_it() {
    for (first, second) in ENGINES.into_iter().flat_map(|a| ENGINES.map(|b| (a, b))) {
        let mem = memory();
        let (mut a, mut b) = (processor(&mem, first), processor(&mem, second));
        assert_eq!((1, 1), (result(&mut a), result(&mut b)));
        for (n, value) in (2..40).enumerate() {
            match n % 4 {
                0 => assert!(mem.write_bytes(FUNCTION + 1, &[value])),
                1 => write(&mut a, FUNCTION + 1, value),
                2 => write(&mut b, FUNCTION + 1, value),
                _ => {
                    // The other one hears of it first, and drops what it has.
                    assert!(mem.write_bytes(FUNCTION + 1, &[value]));
                    write(&mut a, 0x5000, 0);
                }
            }
            let expected = u64::from(value);
            if n % 3 == 0 {
                assert_eq!(expected, result(&mut b), "{first:?} {second:?} {n}");
            }
            assert_eq!(expected, result(&mut a), "{first:?} {second:?} {n}");
            assert_eq!(expected, result(&mut b), "{first:?} {second:?} {n}");
        }
    }
}

#[test]
fn a_right_to_write_from_before_the_frame_held_code_is_given_up() {
    for (first, second) in ENGINES.into_iter().flat_map(|a| ENGINES.map(|b| (a, b))) {
        let mem = memory();
        let (mut a, mut b) = (processor(&mem, first), processor(&mem, second));
        write(&mut a, FUNCTION + 0x800, 7);
        assert_eq!(1, result(&mut b));
        write(&mut a, FUNCTION + 1, 2);
        assert_eq!(2, result(&mut b), "{first:?} {second:?}");
    }
}

#[test]
fn who_comes_and_goes_changes_nothing_for_the_others() {
    for other in ENGINES {
        let mem = memory();
        let mut a = processor(&mem, EngineKind::Dbt);
        assert_eq!(1, result(&mut a));
        assert!(mem.write_bytes(FUNCTION + 1, &[2]));
        for value in 3..10 {
            let mut b = processor(&mem, other);
            assert_eq!(u64::from(value) - 1, result(&mut b));
            b.flush();
            write(&mut b, FUNCTION + 1, value);
            drop(b);
            assert_eq!(u64::from(value), result(&mut a), "{other:?}");
            assert!(mem.is_code(FUNCTION >> 12));
        }
        drop(a);
        assert!((0..mem.size() >> 12).all(|pfn| !mem.is_code(pfn)));
    }
}

#[test]
fn a_new_processor_replays_nothing() {
    let mem = memory();
    let mut a = processor(&mem, EngineKind::Dbt);
    assert_eq!(1, result(&mut a));
    for value in 0..100 {
        assert!(mem.write_bytes(FUNCTION + 0x800, &[value]));
    }
    let dropped = |p: &Processor| p.statistics().iter().find(|s| s.0 == "invalidated_blocks").unwrap().1;
    let mut b = processor(&mem, EngineKind::Dbt);
    assert_eq!((1, 1), (result(&mut b), result(&mut b)));
    assert_eq!(0, dropped(&b));
    assert_eq!(1, result(&mut a));
    assert!(dropped(&a) > 0);
}

#[test]
fn a_write_before_an_exit_is_told_before_anybody_else_runs() {
    let mem = memory();
    let (mut a, mut b) = (processor(&mem, EngineKind::Dbt), processor(&mem, EngineKind::Dbt));
    assert_eq!((1, 1), (result(&mut a), result(&mut b)));
    // mov [rdi], cl; out 0F4h, al: the processor stops with the write just behind it.
    mem.write_bytes(0x4000, &[0x88, 0x0F, 0xE6, 0xF4]);
    (b.core.gpr[7], b.core.gpr[1], b.core.rip) = (FUNCTION + 1, 5, 0x4000);
    assert_eq!(reason::PIO, b.run(0, &mut || false).reason);
    assert_eq!(5, result(&mut a));
}

#[test]
fn each_processor_marks_a_page_dirty_again_after_the_mark_was_taken() {
    for (first, second) in ENGINES.into_iter().flat_map(|a| ENGINES.map(|b| (a, b))) {
        let mem = memory();
        let mut both = [processor(&mem, first), processor(&mem, second)];
        for p in &mut both {
            write(p, 0x5000, 1);
        }
        for turn in 0..4 {
            assert!(mem.take_dirty(5, true) && !mem.take_dirty(5, false));
            write(&mut both[turn % 2], 0x5000, 1);
        }
        assert!(mem.take_dirty(5, true));
    }
}
