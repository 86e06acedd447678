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

use address_beds::{bed, code32 as beds32, has_avx};
use address_forms::{Program, code32, program, reached};
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

/// What a kind of programs is: a processor for one, its rounds and faults so far, what it may reach.
struct Kind {
    make: fn(EngineKind, Windows, u64, u64, &[u8]) -> Processor,
    rounds: fn(&Processor) -> u64,
    faults: fn(&Processor) -> [u64; 3],
    reached: fn() -> Vec<u64>,
}

const BITS_64: Kind =
    Kind { make: bed, rounds: |p| p.core.gpr[ROUNDS], faults, reached: || reached(&edges()) };
const BITS_32: Kind = Kind {
    make: |engine, windows, _, seed, code| beds32::bed(engine, windows, seed, code, has_avx()),
    rounds: beds32::rounds,
    faults: beds32::faults,
    reached: || code32::reached(&beds32::edges()),
};

/// Canaries around these windows, and where accesses would be that no window moves.
fn around(kind: &Kind, windows: &[Current]) -> Canaries {
    let wanted = (kind.reached)();
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
fn try_program(kind: &Kind, program: &Program, at: u64, seed: u64, tried: &mut Tried) {
    let Program { code, accesses } = program;
    let kinds = [EngineKind::Reference, EngineKind::Dbt, EngineKind::Dbt];
    let windows = [Windows::Never, Windows::Always, Windows::Always];
    let mut all: Vec<_> = kinds
        .into_iter()
        .zip(windows)
        .map(|(engine, windows)| (kind.make)(engine, windows, at, seed, code))
        .collect();
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
                [&all[i + 1], &all[0]].map(|p| (p.core.rip, p.core.cr2, p.core.gpr, (kind.faults)(p)));
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
            (canaries, windows) = (around(kind, &now), now);
        }
    }
    let memory = [0, 1, 2].map(|i| memory_of(&all[i]));
    assert_eq!([memory[0]; 2], memory[1..], "seed {seed} at {at:#x}");
    for p in &all[1..] {
        tried.accesses += accesses * (kind.rounds)(p);
        let of_all = tried.faults.iter_mut().zip((kind.faults)(p));
        of_all.for_each(|(sum, more)| *sum += more);
        tried.interpreted += counter(p, "interpreted");
    }
    for w in windows {
        tried.windows[if w.low.is_none() { 2 } else { usize::from(w.is_far()) }] += 1;
    }
    tried.canaries = tried.canaries.max(canaries.len());
}

/// How many accesses are wanted, and the first seed.
fn wanted() -> (u64, u64) {
    let number = |name: &str, otherwise| {
        std::env::var(name).map_or(otherwise, |n| n.parse().unwrap_or_else(|_| panic!("{name}: a number")))
    };
    (number("ACCESSES", FEW), number("SEED", 1))
}

impl Tried {
    /// Tell of it; what is compared was not faults alone, and the canaries were there.
    fn tell(&self, programs: u64) {
        let Self { accesses, faults: [ss, gp, pf], canaries, guarded, interpreted, windows } = self;
        println!(
            "{accesses} accesses of {programs} programs; faults: {ss} #SS, {gp} #GP, {pf} #PF; {interpreted} \
             instructions interpreted; windows near, far, without the lowest arena: {windows:?}; {canaries} \
             canaries at once, around the windows in {guarded:?} turns",
        );
        assert!(*ss > 0 && *gp > 0 && *pf > 0);
        assert!(guarded[0] * 2 > guarded[1], "{guarded:?}");
        assert!(ss + gp + pf < accesses * 9 / 10);
    }
}

/// Programs of one seed after the other, each at these places, until so many accesses were tried.
fn campaign(kind: &Kind, program: fn(u64, bool) -> Program, places: &[u64]) -> Tried {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (wanted, first) = wanted();
    let mut tried = Tried::default();
    let mut seed = first;
    while tried.accesses < wanted {
        for &at in places {
            try_program(kind, &program(seed, has_avx()), at, seed, &mut tried);
        }
        seed += 1;
    }
    tried.tell(places.len() as u64 * (seed - first));
    tried
}

#[test]
fn no_address_form_reaches_what_is_not_the_guests() {
    let tried = campaign(&BITS_64, program, &[LOW, PIE]);
    assert!(tried.canaries > 1000);
    assert!(tried.windows[0] > 0 && tried.windows[1] > 0, "{:?}", tried.windows);
}

/// Addresses go round 4 GBytes, and segments have bases.
#[test]
fn no_address_form_of_32_bits_does() {
    let tried = campaign(&BITS_32, code32::program, &[code32::CODE.into()]);
    assert!(tried.canaries > 100);
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
