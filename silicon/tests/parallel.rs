//! Processors that run in parallel: locked instructions, accessed and dirty flags, the bell.
//!
//! Source: SDM 3A, "Locked Atomic Operations", "Software Consequences of LOCK Semantics",
//! "Accessed and Dirty Flags".

mod counters;
mod parallel_bed;

use std::sync::atomic::{AtomicBool, Ordering};

use counters::counter;
use parallel_bed::*;
use silicon::arch::exit::reason;
use silicon::bus::news;
use silicon::mem::Memory;
use silicon::processor::Processor;

const WORDS: u64 = 0x40_0000;

/// Linear addresses of eight bytes: aligned, in one line, in two, in two pages whose frames are
/// neighbours, and in two whose are not.
const PLACES: [u64; 5] = [WORDS, WORDS + 3, WORDS + 60, WINDOW + 0xFFC, WINDOW + 0x1FFC];

/// Repeat a piece RCX times, then halt.
fn repeat(piece: &[u8]) -> Vec<u8> {
    let back = -(piece.len() as i8 + 5);
    [piece, &[0x48, 0xFF, 0xC9, 0x75, back as u8, 0xF4]].concat() // dec rcx; jnz; hlt
}

/// What is at a linear address of [`PLACES`], once all stand still.
fn read(mem: &Memory, gva: u64) -> u64 {
    let byte = |at: u64| {
        let window = at.checked_sub(WINDOW);
        mem.load(window.map_or(at, |w| FRAMES[(w >> 12) as usize] | w & 0xFFF), 1)
    };
    (0..8).map(|i| byte(gva + i) << (8 * i)).sum()
}

#[test]
fn locked_instructions_are_atomic_wherever_their_operand_is() {
    let add: &[u8] = &[0xF0, 0x48, 0x01, 0x06]; // lock add [rsi], rax
    let exchange_add: &[u8] = &[0x48, 0x89, 0xC2, 0xF0, 0x48, 0x0F, 0xC1, 0x16]; // mov rdx, rax; lock xadd [rsi], rdx
    let increment_half: &[u8] = &[0xF0, 0xFF, 0x46, 0x04]; // lock inc dword [rsi + 4]
    let n = times(1_000, 200_000);
    for engines in PAIRS {
        for place in PLACES {
            for (first, second) in [(add, add), (add, exchange_add), (add, increment_half)] {
                let mem = memory();
                let mut all: Vec<Processor> = Vec::new();
                for (i, piece) in [first, second].into_iter().enumerate() {
                    let at = 0x1_0000 + 0x1000 * i as u64;
                    mem.write_bytes(at, &repeat(piece));
                    let mut p = processor(&mem, engines[i], i as u32, at);
                    (p.core.gpr[0], p.core.gpr[1], p.core.gpr[6]) = (1 << 32 | 1, n, place);
                    all.push(p);
                }
                run_all(&mut all);
                let low = if second == increment_half { n } else { 2 * n };
                assert_eq!((2 * n) << 32 | low, read(&mem, place), "{engines:?} {place:#x} {second:x?}");
            }
        }
    }
}

#[test]
fn a_lock_is_taken_by_one_at_a_time() {
    // mov eax, 1; xchg [rsi], eax; test eax, eax; jnz back; inc qword [rdi]; mov [rsi], edx
    let piece: &[u8] = &[0xB8, 1, 0, 0, 0, 0x87, 0x06, 0x85, 0xC0, 0x75, 0xF5, 0x48, 0xFF, 0x07, 0x89, 0x16];
    let n = times(1_000, 200_000);
    for engines in PAIRS {
        for place in PLACES {
            let mem = memory();
            let mut all: Vec<Processor> = Vec::new();
            for (i, kind) in engines.into_iter().enumerate() {
                let at = 0x1_0000 + 0x1000 * i as u64;
                mem.write_bytes(at, &repeat(piece));
                let mut p = processor(&mem, kind, i as u32, at);
                (p.core.gpr[1], p.core.gpr[6], p.core.gpr[7]) = (n, place + 2, 0x48_0000);
                all.push(p);
            }
            run_all(&mut all);
            assert_eq!(2 * n, mem.load(0x48_0000, 8), "{engines:?} {place:#x}");
        }
    }
}

#[test]
fn wide_compare_and_exchange_is_atomic() {
    // mov rax, [rsi]; mov rdx, [rsi + 8]; L: mov rbx, rax; mov r9, rcx; mov rcx, rdx; add rbx, 1;
    // adc rcx, 2; lock cmpxchg16b [rsi]; mov rcx, r9; jnz L
    let wide: &[u8] = &[
        0x48, 0x8B, 0x06, 0x48, 0x8B, 0x56, 0x08, 0x48, 0x89, 0xC3, 0x49, 0x89, 0xC9, 0x48, 0x89, 0xD1, 0x48,
        0x83, 0xC3, 1, 0x48, 0x83, 0xD1, 2, 0xF0, 0x48, 0x0F, 0xC7, 0x0E, 0x4C, 0x89, 0xC9, 0x75, 0xE5,
    ];
    let half: &[u8] = &[
        0x8B, 0x06, 0x8B, 0x56, 0x04, 0x89, 0xC3, 0x49, 0x89, 0xC9, 0x89, 0xD1, 0x83, 0xC3, 1, 0x83, 0xD1, 2,
        0xF0, 0x0F, 0xC7, 0x0E, 0x4C, 0x89, 0xC9, 0x75, 0xEA,
    ];
    let n = times(1_000, 200_000);
    for engines in PAIRS {
        for (piece, size, places) in [(wide, 8, &PLACES[..1]), (half, 4, &PLACES[..])] {
            for &place in places {
                let mem = memory();
                let mut all: Vec<Processor> = Vec::new();
                for (i, kind) in engines.into_iter().enumerate() {
                    let at = 0x1_0000 + 0x1000 * i as u64;
                    mem.write_bytes(at, &repeat(piece));
                    let mut p = processor(&mem, kind, i as u32, at);
                    (p.core.gpr[1], p.core.gpr[6]) = (n, place);
                    all.push(p);
                }
                run_all(&mut all);
                let found = if size == 8 {
                    [mem.load(place, 8), mem.load(place + 8, 8)]
                } else {
                    let v = read(&mem, place);
                    [v & 0xFFFF_FFFF, v >> 32]
                };
                assert_eq!([2 * n, 4 * n], found, "{engines:?} {place:#x} {size}");
            }
        }
    }
}

/// A page's entry is exchanged while a processor writes through it.  Where the entry that is taken
/// away has no dirty flag, nobody ever writes to its frame through it.
#[test]
fn a_dirty_flag_is_set_in_the_entry_that_is_used() {
    const STOP: u64 = 0x48_0000;
    const ROUNDS: u64 = 0x48_1000;
    const FRAMES: usize = 64;
    let entry = WINDOW_TABLE + 24;
    let frame = |i: usize| 0x60_0000 + 0x1000 * (i % FRAMES) as u64;
    for kind in [Dbt, Reference] {
        let mem = memory();
        mem.store(entry, 8, frame(0) | 7);
        // invlpg [rsi]; inc qword [rsi]; inc qword [rdx]; cmp byte [rdi], 0; je back; hlt
        let code = [0x0F, 0x01, 0x3E, 0x48, 0xFF, 0x06, 0x48, 0xFF, 0x02, 0x80, 0x3F, 0, 0x74, 0xF2, 0xF4];
        mem.write_bytes(0x1_0000, &code);
        let mut p = processor(&mem, kind, 0, 0x1_0000);
        (p.core.gpr[2], p.core.gpr[6], p.core.gpr[7]) = (ROUNDS, WINDOW + 0x3000, STOP);
        let (mut clean, mut before) = (0, [None; FRAMES]);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(reason::HALT, p.run(0, &mut || false).reason));
            for i in 0..times(10_000, 1_000_000) as usize {
                if let Some(value) = before[(i + 1) % FRAMES].take() {
                    assert_eq!(value, mem.load(frame(i + 1), 8), "{kind:?}, exchange {i}");
                }
                let was = mem.update(entry, 8, |_| frame(i + 1) | 7);
                assert_eq!(frame(i) | 7, was & !0x60);
                if was & 0x40 == 0 {
                    before[i % FRAMES] = Some(mem.load(frame(i), 8));
                    clean += 1;
                }
                if i % 8 == 0 {
                    // No frame comes back before every translation of it is gone.
                    let rounds = mem.load(ROUNDS, 8);
                    while mem.load(ROUNDS, 8) < rounds + 2 {
                        std::thread::yield_now();
                    }
                }
            }
            mem.store(STOP, 1, 1);
        });
        assert!(clean > 0, "no entry was taken before it was used");
    }
}

/// Take a dirty mark while a processor writes: what is written after that is marked again.
#[test]
fn no_write_is_missed_by_the_dirty_marks() {
    const STOP: u64 = 0x48_0000;
    for kind in [Dbt, Reference] {
        let mem = memory();
        mem.write_bytes(0x1_0000, &[0x48, 0xFF, 0x06, 0x80, 0x3F, 0, 0x74, 0xF8, 0xF4]); // inc qword [rsi]; …
        let mut p = processor(&mem, kind, 0, 0x1_0000);
        (p.core.gpr[6], p.core.gpr[7]) = (WORDS, STOP);
        let mut other = processor(&mem, kind, 1, 0x1_1000);
        mem.write_bytes(0x1_1000, &[0xEB, 0xFE]);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(reason::HALT, p.run(0, &mut || false).reason));
            let bell = other.core.agent.clone();
            scope.spawn(move || assert_eq!(reason::KICK, other.run(0, &mut || false).reason));
            let mut copy = 0;
            for i in 0..times(1_000, 100_000) {
                let now = mem.load(WORDS, 8);
                let is_dirty = mem.take_dirty(WORDS >> 12, true);
                mem.bus().publish(mem.bus().changes());
                assert!(is_dirty || copy == now, "{kind:?}, look {i}: {copy} became {now}");
                copy = mem.load(WORDS, 8);
            }
            mem.store(STOP, 1, 1);
            bell.ring(news::KICK);
        });
    }
}

/// A chain of blocks, linked to each other, that would go on for ever ends when the bell is rung: long
/// before the dispatcher's own next look.
#[test]
fn a_kick_ends_a_chain_of_blocks() {
    for kind in [Dbt, Reference] {
        let mem = memory();
        // inc qword [rsi]; jmp to the next page, and back: blocks with links alone
        mem.write_bytes(0x1_0000, &[0x48, 0xFF, 0x06, 0xE9, 0xF8, 0x0F, 0, 0]);
        mem.write_bytes(0x1_1000, &[0xE9, 0xFB, 0xEF, 0xFF, 0xFF]);
        let mut p = processor(&mem, kind, 0, 0x1_0000);
        p.core.gpr[6] = WORDS;
        mem.write_bytes(0x1_2000, &[0xEB, 0xFE]);
        let mut other = processor(&mem, kind, 1, 0x1_2000);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let bells = [p.core.agent.clone(), other.core.agent.clone()];
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    assert_eq!(reason::KICK, other.run(0, &mut || false).reason);
                }
            });
            for _ in 0..times(20, 2_000) {
                let rung = std::thread::scope(|scope| {
                    scope.spawn(|| assert_eq!(reason::KICK, p.run(0, &mut || false).reason));
                    let before = mem.load(WORDS, 8);
                    while mem.load(WORDS, 8) < before + 50_000 {
                        std::hint::spin_loop();
                    }
                    bells[0].ring(news::KICK);
                    mem.load(WORDS, 8)
                });
                let late = mem.load(WORDS, 8) - rung;
                assert!(late < 10_000, "{kind:?}: went on for {late} rounds");
            }
            is_over.store(true, Ordering::Relaxed);
            bells[1].ring(news::KICK);
        });
    }
}

/// Blocks do not look at the bell: nothing is translated again when others run at the same time.
#[test]
fn who_runs_beside_others_has_the_code_of_one_alone() {
    let mem = memory();
    mem.write_bytes(0x1_0000, &[0x48, 0xFF, 0xC0, 0x48, 0xFF, 0xC9, 0x75, 0xF8, 0xF4]); // inc rax; dec rcx; jnz; hlt
    let run = |p: &mut Processor, budget| {
        (p.core.rip, p.core.gpr[1]) = (0x1_0000, 1 << 30);
        assert_eq!(reason::BUDGET, p.run(budget, &mut || false).reason);
        let bytes = counter(p, "code_bytes");
        let translated = counter(p, "translated_instructions");
        (bytes, translated)
    };
    let [mut a, mut b] = [0, 1].map(|id| processor(&mem, Dbt, id, 0x1_0000));
    let alone = run(&mut a, 9_999);
    assert_eq!((alone, alone), (run(&mut b, 9_999), run(&mut a, 9_999)));
    let presence = b.core.agent.clone().arrive();
    let together = std::thread::scope(|scope| {
        let runs = scope.spawn(|| run(&mut a, 9_999));
        while !runs.is_finished() {
            b.core.catch_up(); // as if it ran
            std::thread::yield_now();
        }
        runs.join().unwrap()
    });
    drop(presence);
    assert_eq!(alone, together);
}
