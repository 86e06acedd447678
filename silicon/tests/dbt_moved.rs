//! Translations that are moved to another linear address: what they do, and what is counted, is what it
//! is where they are made; and what cannot be moved is translated.

mod arena_bed;
mod counters;

use std::sync::PoisonError;

use arena_bed::{ALONE, LIBRARY, LOW, PIE, give_code, machine, run, seen, system_calls};
use counters::counter;
use silicon::dbt::promotion::Windows;
use silicon::mmu::window::{ARENA_SHIFT, HIGH};
use silicon::processor::{EngineKind, Processor};

/// Everything that depends on where code is: for ever.  Its data are 1 MByte behind its first byte.
const NEAR: &[u8] = &[
    0x48, 0x8D, 0x05, 0xF9, 0xFF, 0x0F, 0, // again: lea rax, [data]
    0x48, 0x8B, 0x1D, 0xFA, 0xFF, 0x0F, 0, // mov rbx, [data + 8]
    0x48, 0x01, 0xC3, // add rbx, rax
    0x48, 0x01, 0x1D, 0xF8, 0xFF, 0x0F, 0, // add [data + 16], rbx
    0xFF, 0x05, 0xFA, 0xFF, 0x0F, 0, // inc [data + 24]
    0x80, 0x3D, 0xF3, 0xFF, 0x0F, 0, 0x03, // cmp [data + 24], 0x3
    0x75, 0x10, // jnz over
    0xF3, 0x0F, 0x7E, 0x05, 0xE1, 0xFF, 0x0F, 0, // movq xmm0, [data + 16]
    0x66, 0x0F, 0xD6, 0x05, 0xE9, 0xFF, 0x0F, 0, // movq [data + 32], xmm0
    0xB9, 0x05, 0, 0, 0, // over: mov ecx, 0x5
    0x48, 0x03, 0x35, 0xCD, 0xFF, 0x0F, 0, // round: add rsi, [data + 16]
    0xFF, 0xC9, // dec ecx
    0x75, 0xF5, // jnz round
    0xE8, 0x39, 0, 0, 0, // call f
    0x48, 0x8D, 0x15, 0x45, 0, 0, 0, // lea rdx, [g]
    0xFF, 0xD2, // call rdx
    0x48, 0x8D, 0x15, 0x03, 0, 0, 0,    // lea rdx, [h]
    0x52, // push rdx
    0xC3, // ret
    0x90, 0x0F, 0xA2, // h: cpuid
    0x48, 0x0F, 0xC1, 0x35, 0xBF, 0xFF, 0x0F, 0, // xadd [data + 40], rsi
    0xFF, 0x35, 0xA1, 0xFF, 0x0F, 0, // push [data + 16]
    0x8F, 0x05, 0xBB, 0xFF, 0x0F, 0, // pop [data + 48]
    0x31, 0xD2, // xor edx, edx
    0x89, 0xF0, // mov eax, esi
    0x48, 0xF7, 0x35, 0xB8, 0xFF, 0x0F, 0, // div [data + 56]
    0xE9, 0x7B, 0x10, 0, 0, // jmp far_away
    0x48, 0x89, 0x25, 0xB4, 0xFF, 0x0F, 0, // f: mov [data + 64], rsp
    0x48, 0x8B, 0x3C, 0x24, // mov rdi, [rsp]
    0x48, 0x31, 0x3D, 0xB1, 0xFF, 0x0F, 0,    // xor [data + 72], rdi
    0xC3, // ret
    0x48, 0x8B, 0x3C, 0x24, // g: mov rdi, [rsp]
    0x48, 0xC1, 0xCF, 0x07, // ror rdi, 0x7
    0x48, 0x01, 0x3D, 0xA9, 0xFF, 0x0F, 0, // add [data + 80], rdi
    0x0F, 0x05, // syscall
    0xC3, // ret
];
/// Behind [`NEAR`], in the next page.
const FAR: &[u8] = &[
    0x4C, 0x8D, 0x05, 0xF9, 0xEE, 0xFF, 0xFF, // lea r8, [again]
    0x4C, 0x01, 0x05, 0x4A, 0xEF, 0x0F, 0, // add [data + 88], r8
    0xE9, 0xED, 0xEE, 0xFF, 0xFF, // jmp again
];
/// Where that is, from the first byte on.
const FAR_AT: usize = 0x1100;
/// Where the program's data are in memory.
const DATA_HPA: u64 = 0x11_0000;
const DIVISOR: u64 = DATA_HPA + 56;
/// Where the program is, one after the other.
const PLACES: [u64; 5] =
    [PIE, LIBRARY, PIE + 0x12_3456_7000, LIBRARY - 0x7_6543_2000, HIGH[1] << ARENA_SHIFT];

fn program() -> Vec<u8> {
    let mut code = NEAR.to_vec();
    code.resize(FAR_AT, 0x90);
    code.extend(FAR);
    code
}

/// The reference engine, and the translator with and without windows, with the program at some places.
fn all(places: &[u64]) -> [Processor; 3] {
    let kinds = [
        (EngineKind::Reference, Windows::Never),
        (EngineKind::Dbt, Windows::Never),
        (EngineKind::Dbt, Windows::Always),
    ];
    kinds.map(|(kind, windows)| {
        let mut p = machine(kind, windows, places[0], &program());
        give_code(&mut p, places);
        let handler = system_calls(&mut p);
        p.core.mem.write_bytes(handler, &[0x48, 0x0F, 0x07]); // sysretq
        p.core.mem.store(DIVISOR, 8, 0x1234_5677);
        p
    })
}

/// Let each go on at `at`, and compare.
fn go(all: &mut [Processor; 3], at: u64, budget: u64) {
    for p in all.iter_mut() {
        p.core.rip = at;
        run(p, budget);
    }
    let [reference, others @ ..] = all;
    let expected = seen(reference);
    for p in others {
        assert_eq!(expected, seen(p), "at {at:#x}, budget {budget}");
    }
}

fn counts(p: &Processor) -> [u64; 2] {
    ["translated_blocks", "moved_blocks"].map(|name| counter(p, name))
}

/// How often the dispatcher enters generated code in one more run.
fn entries_of_a_run(all: &mut [Processor; 3], at: u64, budget: u64) -> [u64; 2] {
    let now = |all: &[Processor; 3]| [1, 2].map(|i| counter(&all[i], "entries"));
    let before = now(all);
    go(all, at, budget);
    let [a, b] = now(all);
    [a - before[0], b - before[1]]
}

#[test]
fn a_program_at_another_address_is_moved() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for budget in [2003, 211] {
        let mut all = all(&PLACES);
        (0..4).for_each(|_| go(&mut all, PIE, budget));
        assert_eq!([0, 0], [1, 2].map(|i| counts(&all[i])[1]));
        let entries = entries_of_a_run(&mut all, PIE, budget);
        for at in PLACES.into_iter().skip(1) {
            let before = [1, 2].map(|i| counts(&all[i]));
            (0..4).for_each(|_| go(&mut all, at, budget));
            for (p, before) in all[1..].iter().zip(before) {
                let [translated, moved] = counts(p);
                // (Where a run was broken off there may be blocks that the first place had not.)
                assert!(translated - before[0] <= 4, "{at:#x}: {translated}, before {before:?}");
                assert!(moved - before[1] >= 8, "{at:#x}: {moved}, before {before:?}");
            }
            // Links are made there as well.  (A run may end in the midst of a block.)
            let there = entries_of_a_run(&mut all, at, budget);
            assert!((0..2).all(|i| there[i] <= entries[i] + 2), "{there:?}, at first {entries:?}");
        }
    }
}

#[test]
fn an_instruction_that_faults_is_found_where_it_was_moved_to() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all = all(&PLACES);
    for at in PLACES {
        go(&mut all, at, 2003);
        for p in &mut all {
            p.core.mem.store(DIVISOR, 8, 0); // and so #DE, which has no gate
            p.core.rip = at;
            p.run(2003, &mut || false);
        }
        let [reference, others @ ..] = &mut all;
        assert!(reference.core.retired() % 2003 != 0, "no fault");
        let (expected, rip) = (seen(reference), reference.core.rip);
        for p in others {
            assert_eq!((&expected, rip), (&seen(p), p.core.rip), "at {at:#x}");
        }
        all = self::all(&PLACES);
        go(&mut all, PIE, 2003);
    }
}

#[test]
fn code_that_was_overwritten_is_not_moved() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // inc dword [data]; jmp again; it becomes DEC
    let code = [0xFF, 0x05, 0xFA, 0xFF, 0x0F, 0, 0xC6, 0x05, 0xF4, 0xFF, 0xFF, 0xFF, 0x0D, 0xEB, 0xF1];
    let mut all = all(&PLACES);
    for p in &mut all {
        p.core.mem.write_bytes(arena_bed::CODE_HPA, &code);
    }
    for at in PLACES {
        go(&mut all, at, 97);
    }
}

#[test]
fn a_place_with_shorter_addresses_has_translations_of_its_own() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let places = [LOW, PIE, LIBRARY];
    let mut all = all(&places);
    let moved = places.map(|at| {
        go(&mut all, at, 2003);
        counts(&all[1])[1]
    });
    assert!(moved[0] == 0 && moved[1] == 0 && moved[2] > 0, "{moved:?}");
}

/// The operand is in the arena at one place, and before it at the other one.
#[test]
fn an_operand_that_leaves_the_arena_is_translated() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let edge = HIGH[1] << ARENA_SHIFT;
    let places = [LIBRARY, edge];
    let mut all = all(&places);
    for p in &mut all {
        arena_bed::give_data(p, &places.map(|at| at - 0x2000));
        // inc qword [start - 2000h]; jmp start
        p.core.mem.write_bytes(arena_bed::CODE_HPA, &[0x48, 0xFF, 0x05, 0xF9, 0xDF, 0xFF, 0xFF, 0xEB, 0xF7]);
    }
    for at in [LIBRARY, edge, LIBRARY] {
        go(&mut all, at, 97);
    }
    assert_eq!(0, counts(&all[2])[1]);
}
