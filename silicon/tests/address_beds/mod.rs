//! Processors for the programs of [`crate::address_forms`].

pub mod code32;

use silicon::arch::segment::seg;
use silicon::dbt::promotion::Windows;
use silicon::mmu::window::ARENA_SHIFT;
use silicon::processor::{EngineKind, Processor};

use crate::address_forms::{BASES, INDICES, PLACE};
use crate::arena_bed::{
    LIBRARY, LOW, OTHER, PIE, STACK, TABLE, edges, enable_avx, give_table, machine, skip_faults,
};
use crate::random::Rng;

/// For each arena the edges that are in it, and places in its data; then all other edges, and all data.
/// (The engine guesses where an operand leads: bases of one place keep to the guess.)
fn bases(rng: &mut Rng) -> Vec<u64> {
    let places = [vec![LOW], vec![PIE], vec![LIBRARY, STACK], vec![LOW, PIE, LIBRARY, OTHER, STACK]];
    let arena = |at: &u64| [LOW, PIE, STACK].iter().position(|p| p >> ARENA_SHIFT == at >> ARENA_SHIFT);
    let mut all = Vec::new();
    for (i, data) in (0..).zip(places) {
        let mut some = edges();
        some.retain(|at| arena(at).unwrap_or(3) == i);
        while some.len() as u64 > PLACE * 7 / 8 {
            some.swap_remove(rng.below(some.len() as u64) as usize);
        }
        while (some.len() as u64) < PLACE {
            let base = data[rng.below(data.len() as u64) as usize];
            some.push(base + if base == STACK { 0 } else { 0x10_0000 } + rng.below(0x1_0000));
        }
        all.extend(some);
    }
    all
}

fn table(rng: &mut Rng) -> Vec<u64> {
    let signed = [-1, -8, -(1 << 31), -(1 << 33)].map(i64::cast_unsigned);
    let small = [0, 1, 8, 0xFF8, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32];
    let words = [bases(rng), small.to_vec(), signed.to_vec(), vec![1 << 40, 1 << 42, 0x15 << 42, 1 << 62]];
    let words = words.concat();
    assert_eq!(BASES + INDICES, words.len() as u64);
    words
}

/// Whether programs have YMM registers and gathers.
pub fn has_avx() -> bool {
    is_x86_feature_detected!("avx2")
}

/// A processor about to run the program of a seed at `at`.
pub fn bed(engine: EngineKind, windows: Windows, at: u64, seed: u64, code: &[u8]) -> Processor {
    let mut p = machine(engine, windows, at, code);
    give_table(&mut p, &table(&mut Rng(seed ^ 0x7AB1E)));
    skip_faults(&mut p);
    if has_avx() {
        enable_avx(&mut p);
    }
    p.core.seg[seg::GS].base = (0x16 << 42) - 0x1000;
    (p.core.gpr[12], p.core.gpr[13]) = (TABLE, seed);
    p
}
