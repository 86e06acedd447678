//! Programs in windows that try every address form at every edge reach nothing but their memory.
//!
//! What: random programs of every form of operand ([`address_forms`]) with bases at, across and beyond every
//! edge of arenas and guards, faults and all, under both engines; around the windows, and wherever else
//! an access might come out that is led astray, lie canaries.
//! Invariant: registers, memory, counts and faults are as under the reference engine, and the canaries
//! are as they were.  A read of a canary is seen in what a program makes of it.
//!
//! `make fuzz-windows` is the long form: `ACCESSES` says how many.

mod address_beds;
mod address_forms;
mod arena_bed;
mod canaries;
mod counters;
mod random;

use std::sync::PoisonError;

use address_beds::{bed, has_avx};
use address_forms::{Program, program, reached};
use arena_bed::{ALONE, LOW, PIE, edges, faults, memory_of, run, seen};
use canaries::Canaries;
use counters::counter;
use silicon::dbt::promotion::Windows;
use silicon::mmu::window::Current;
use silicon::processor::{EngineKind, Processor};

/// Accesses that programs try here, if nothing else is said.
const FEW: u64 = 100_000;
/// Instructions between two comparisons.
const TURN: u64 = 5_000;
/// Turns of one program.
const TURNS: u64 = 16;
const ROUNDS: usize = 8; // R8

/// Canaries around these windows, and where accesses would be that no window moves.
fn around(windows: &[Current]) -> Canaries {
    let wanted = reached(&edges());
    let distances = windows.iter().flat_map(|w| [Some(w.base), w.low]).flatten().chain([0]);
    Canaries::at(distances.flat_map(|d| wanted.iter().map(move |at| at.wrapping_add(d))))
}

#[derive(Default)]
struct Tried {
    accesses: u64,
    faults: [u64; 3],
    canaries: usize,
    /// Turns in which the canaries were around all windows, and all turns.
    guarded: [u64; 2],
    interpreted: u64,
    /// Programs with the lowest arena near, far, and without it.
    windows: [u64; 3],
}

/// Run a program everywhere, and compare.
fn try_program(at: u64, seed: u64, tried: &mut Tried) {
    let Program { code, accesses } = program(seed, has_avx());
    let kinds = [EngineKind::Reference, EngineKind::Dbt, EngineKind::Dbt];
    let windows = [Windows::Never, Windows::Always, Windows::Always];
    let mut all: Vec<_> =
        kinds.into_iter().zip(windows).map(|(kind, windows)| bed(kind, windows, at, seed, &code)).collect();
    let windows_of = |all: &[Processor]| -> Vec<Current> {
        all[1..].iter().map(|p| p.core.tlb.windows.current().expect("a window")).collect()
    };
    let (mut windows, mut canaries) = (Vec::new(), Canaries::at([]));
    for turn in 0..TURNS {
        for p in &mut all {
            run(p, TURN);
        }
        let [expected, first, second] = [0, 1, 2].map(|i| seen(&mut all[i]));
        for (i, got) in [first, second].into_iter().enumerate() {
            let [ours, theirs] =
                [&all[i + 1], &all[0]].map(|p| (p.core.rip, p.core.cr2, p.core.gpr, faults(p)));
            assert_eq!(theirs, ours, "seed {seed} at {at:#x}, turn {turn}, window {i}");
            assert_eq!(expected, got, "seed {seed} at {at:#x}, turn {turn}, window {i}");
        }
        assert_eq!(Vec::<u64>::new(), canaries.disturbed(), "seed {seed} at {at:#x}, turn {turn}");
        tried.guarded[1] += 1;
        let now = windows_of(&all);
        if windows == now {
            tried.guarded[0] += 1;
        } else {
            // (A program with so many accesses beside its window loses it, and gets another one.)
            drop(std::mem::replace(&mut canaries, Canaries::at([])));
            (canaries, windows) = (around(&now), now);
        }
    }
    let memory = [0, 1, 2].map(|i| memory_of(&all[i]));
    assert_eq!([memory[0]; 2], memory[1..], "seed {seed} at {at:#x}");
    for p in &all[1..] {
        tried.accesses += accesses * p.core.gpr[ROUNDS];
        let of_all = tried.faults.iter_mut().zip(faults(p));
        of_all.for_each(|(sum, more)| *sum += more);
        tried.interpreted += counter(p, "interpreted");
    }
    for w in windows {
        tried.windows[if w.low.is_none() { 2 } else { usize::from(w.is_far()) }] += 1;
    }
    tried.canaries = tried.canaries.max(canaries.len());
}

#[test]
fn no_address_form_reaches_what_is_not_the_guests() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = std::env::var("ACCESSES").map_or(FEW, |n| n.parse().expect("ACCESSES: a number"));
    let first = std::env::var("SEED").map_or(1, |n| n.parse().expect("SEED: a number"));
    let mut tried = Tried::default();
    let mut seed = first;
    while tried.accesses < wanted {
        for at in [LOW, PIE] {
            try_program(at, seed, &mut tried);
        }
        seed += 1;
    }
    let Tried { accesses, faults: [ss, gp, pf], canaries, guarded, interpreted, windows } = tried;
    println!(
        "{accesses} accesses of {} programs; faults: {ss} #SS, {gp} #GP, {pf} #PF; {interpreted} instructions \
         interpreted; windows near, far, without the lowest arena: {windows:?}; {canaries} canaries \
         at once, around the windows in {guarded:?} turns",
        2 * (seed - first),
    );
    assert!(ss > 0 && gp > 0 && pf > 0 && canaries > 1000);
    assert!(windows[0] > 0 && windows[1] > 0, "{windows:?}");
    assert!(guarded[0] * 2 > guarded[1], "{guarded:?}");
    // What is compared is not faults alone.
    assert!(ss + gp + pf < accesses * 9 / 10);
}

/// Canaries tell of a write.
#[test]
fn a_canary_that_was_written_to_is_found() {
    let at = 0x5A5A_0000_0000;
    let canaries = Canaries::at([at, at + 8, at + 4096, 1 << 47]);
    assert_eq!((2, vec![]), (canaries.len(), canaries.disturbed()));
    // SAFETY: the page is the canaries'.
    unsafe { std::ptr::write_volatile((at + 4096 + 17) as *mut u8, 0) };
    assert_eq!(vec![at + 4096 + 16], canaries.disturbed());
}
