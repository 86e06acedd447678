//! Translated code that comes to a page for the first time: who walks, and that nothing but the
//! engine's own counters tells the difference.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::seg;
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

const PML4: u64 = 0x8000;
const CODE: u64 = 0x20_0000;
const DATA: u64 = 0x40_0000;
/// So far away, memory is mapped once more, and four times in all; pages so far apart are in one set of the TLB.
const AGAIN: u64 = 0x400_0000;
const BUDGETS: [u64; 6] = [1, 2, 3, 7, 23, 5000];

/// 64-bit code at level 0; 32 MBytes are mapped where they are, and behind at multiples of [`AGAIN`].
fn machine(kind: EngineKind, code: &[u8]) -> Processor {
    machine_on(Clock::Virtual, kind, code)
}

fn machine_on(clock: Clock, kind: EngineKind, code: &[u8]) -> Processor {
    let mem = Memory::new(1 << 25).unwrap();
    for (table, entry) in [(PML4, 0x9003), (0x9000, 0xA003)] {
        mem.store(table, 8, entry);
    }
    for i in 0..16 {
        mem.store(0xA000 + 8 * i, 8, i << 21 | 0x83);
        for again in 1..=4 {
            mem.store(0xA000 + 8 * (i + 32 * again), 8, i << 21 | 0x83);
        }
    }
    (0..0x2000).for_each(|i| mem.store(DATA + 8 * i, 8, i * 0x1_0001));
    mem.write_bytes(CODE, code);
    let mut processor = Processor::new(mem, kind, clock, 0).unwrap();
    let core = &mut *processor.core;
    core.seg[seg::CS].attr = 0xA09B;
    (core.cr0, core.cr3, core.cr4, core.efer) = (0x8001_0033, PML4, 0x44_0220, 0x500);
    (core.rip, core.gpr[4]) = (CODE, 0x10_0000);
    (core.gpr[6], core.gpr[7]) = (DATA + 0x100, DATA + 0x1000);
    (core.gpr[8], core.gpr[9], core.gpr[10]) = (DATA + 0x2000, 1, DATA + 0x3000);
    core.gpr[11] = DATA + 0x100 + AGAIN;
    (core.xcr0, core.pkru) = (0x203, 0x5555_5550);
    core.refresh();
    processor
}

/// The code, for ever, with every translation dropped before: mov rax, cr3; mov cr3, rax.
fn round(code: &[u8]) -> Vec<u8> {
    let mut all = [&[0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8], code, &[0xE9]].concat();
    all.extend((-(all.len() as i32) - 4).to_le_bytes());
    all
}

fn agree(name: &str, code: &[u8]) {
    for budget in BUDGETS {
        let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|kind| machine(kind, &round(code)));
        for stop in 0..60 {
            for p in &mut both {
                assert_eq!(reason::BUDGET, p.run(budget, &mut || false).reason, "{name}");
            }
            let [reference, dbt] = both.each_mut().map(|p| (p.core.gpr, p.core.rip, p.core.counts.clone()));
            assert_eq!(reference, dbt, "{name}, budget {budget}, stop {stop}");
            let [reference, dbt] = both.each_mut().map(|p| state_hash(&mut p.core));
            assert_eq!(reference, dbt, "{name}, budget {budget}, stop {stop}");
        }
    }
}

/// Instructions that read a page first of all, and what of a round is interpreted beside MOV with CR3.
const READERS: &[(&str, &[u8], u64)] = &[
    ("single", &[0x48, 0x8B, 0x06], 0),                        // mov rax, [rsi]
    ("index", &[0x4B, 0x03, 0x14, 0xC8], 0),                   // add rdx, [r8+r9*8]
    ("group", &[0x48, 0x8B, 0x06, 0x48, 0x3B, 0x5E, 0x08], 0), // mov rax, [rsi]; cmp rbx, [rsi+8]
    ("later first", &[0x48, 0x8B, 0x56, 0x40, 0x48, 0x03, 0x16], 0), // mov rdx, [rsi+40h]; add rdx, [rsi]
    // mov rax, [rdi]; mov [rdi+10h], rax; add rbx, [rdi]: the page is dirty since the first round
    ("group that writes", &[0x48, 0x8B, 0x07, 0x48, 0x89, 0x47, 0x10, 0x48, 0x03, 0x1F], 0),
    ("pop", &[0x58, 0x48, 0x83, 0xEC, 0x08], 0), // pop rax; sub rsp, 8
    ("push", &[0x41, 0xFF, 0x32, 0x58], 1),      // push [r10]; pop rax: the stack is written second
    ("push register", &[0x53, 0x58], 0),         // push rbx; pop rax
    ("call", &[0xE8, 0, 0, 0, 0, 0x58], 0),      // call $+5; pop rax
    ("write", &[0x48, 0x89, 0x0E], 0),           // mov [rsi], rcx
    ("write later", &[0x48, 0x89, 0x4E, 0x08, 0x48, 0x89, 0x0E], 0), // mov [rsi+8], rcx; mov [rsi], rcx
    ("update", &[0x48, 0xFF, 0x06], 0),          // inc qword [rsi]
    ("read, then write", &[0x48, 0x8B, 0x1E, 0x48, 0x89, 0x4E, 0x08], 0), // mov rbx, [rsi]; mov [rsi+8], rcx
    ("locked", &[0xF0, 0x48, 0x0F, 0xC1, 0x1E], 0), // lock xadd [rsi], rbx
    // mov rax, [rsi]; 4 times mov rbx, [r11+…]; mov rcx, [rsi+8]; add rcx, [rsi]: r11's pages displace rsi's
    (
        "displaced",
        &[
            0x48, 0x8B, 0x06, 0x49, 0x8B, 0x1B, 0x49, 0x8B, 0x9B, 0, 0, 0, 4, 0x49, 0x8B, 0x9B, 0, 0, 0, 8,
            0x49, 0x8B, 0x9B, 0, 0, 0, 12, 0x48, 0x8B, 0x4E, 0x08, 0x48, 0x03, 0x0E,
        ],
        10,
    ),
    ("bit", &[0x48, 0x0F, 0xA3, 0x0E], 0), // bt [rsi], rcx
    ("vector", &[0x0F, 0x10, 0x06], 1),    // movups xmm0, [rsi]
    ("string", &[0x48, 0x8D, 0x37, 0x48, 0xAD, 0x48, 0x8D, 0x37], 1), // lea rsi, [rdi]; lodsq; lea rsi, [rdi]
];

#[test]
fn walks_for_reads_are_counted_as_the_interpreter_counts_them() {
    for (name, code, _) in READERS {
        agree(name, code);
    }
}

#[test]
fn reads_of_new_pages_are_not_interpreted() {
    const ROUNDS: u64 = 1000;
    for &(name, code, beside) in READERS {
        let mut p = machine(EngineKind::Dbt, &round(code));
        let some_rounds = |p: &mut Processor| {
            let before = (counter(p, "interpreted"), p.core.counts.tlb_misses);
            p.run(ROUNDS * 20, &mut || false);
            (counter(p, "interpreted") - before.0, p.core.counts.tlb_misses - before.1)
        };
        some_rounds(&mut p);
        let (interpreted, misses) = some_rounds(&mut p);
        let rounds = ROUNDS * 20 / instructions(code);
        assert!(misses + 1 >= rounds, "{name}: {misses} misses in {rounds} rounds");
        let most = (2 + beside) * rounds + rounds / 20 + 20;
        assert!(interpreted <= most, "{name}: {interpreted} interpreted in {rounds} rounds");
    }
}

/// In a round.
fn instructions(code: &[u8]) -> u64 {
    let all = round(code);
    iced_x86::Decoder::new(64, &all, 0).into_iter().count() as u64
}

/// The computer's clock is read without leaving generated code, and nothing is lost meanwhile.
#[test]
fn the_time_of_the_computer_is_read_where_it_is_asked_for() {
    // movq xmm3, rbx; movq xmm12, rbp; l: stc; rdtsc; setc r9b; shl rdx, 32; or rax, rdx; mov r12, rax;
    // rdtscp; shl rdx, 32; or rax, rdx; sub rax, r12; jc bad; add r14, 1; movq r13, xmm3; movq r15, xmm12;
    // jmp l; bad: jmp bad
    let code = [
        0x66, 0x48, 0x0F, 0x6E, 0xDB, 0x66, 0x4C, 0x0F, 0x6E, 0xE5, 0xF9, 0x0F, 0x31, 0x41, 0x0F, 0x92, 0xC1,
        0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0, 0x49, 0x89, 0xC4, 0x0F, 0x01, 0xF9, 0x48, 0xC1, 0xE2, 0x20,
        0x48, 0x09, 0xD0, 0x4C, 0x29, 0xE0, 0x72, 0x10, 0x49, 0x83, 0xC6, 0x01, 0x66, 0x49, 0x0F, 0x7E, 0xDD,
        0x66, 0x4D, 0x0F, 0x7E, 0xE7, 0xEB, 0xD0, 0xEB, 0xFE,
    ];
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        let mut p = machine_on(Clock::Wall, kind, &code);
        for r in 0..16 {
            p.core.gpr[r] = 0x1111_1111_1111_1111 * r as u64;
        }
        p.core.gpr[14] = 0;
        p.core.msr.tsc_aux = 77;
        p.run(15_000, &mut || false);
        let interpreted = |p: &Processor| p.statistics().into_iter().find(|s| s.0 == "interpreted");
        let before = (interpreted(&p), silicon::cpu::state::monotonic_ns());
        p.run(15_000, &mut || false);
        let now = silicon::cpu::state::monotonic_ns();
        let gpr = p.core.gpr;
        for r in [3, 5, 6, 7, 8, 10, 11] {
            assert_eq!(0x1111_1111_1111_1111 * r as u64, gpr[r], "{kind:?}, register {r}");
        }
        assert!((before.1..now).contains(&gpr[12]), "{kind:?}: {} to {now}: {}", before.1, gpr[12]);
        assert_eq!((77, 1), (gpr[1], gpr[9] & 0xFF), "{kind:?}");
        assert_eq!((gpr[3], gpr[5]), (gpr[13], gpr[15]), "{kind:?}");
        assert!(gpr[14] > 1800, "{kind:?}: {}", gpr[14]);
        let beside = interpreted(&p).map_or(0, |now| now.1 - before.0.unwrap().1);
        assert!(beside < 100, "{beside}");
    }
}

/// XSAVE64, XSAVEOPT64 and XSAVEC64 to an area in one page, and to one in two, leave the same bytes;
/// XRSTOR64 of either the same state.  (Legacy region and header in one page are handled at once.)
#[test]
fn states_are_saved_and_restored_alike_wherever_they_lie() {
    const SAVES: [[u8; 4]; 3] =
        [[0x48, 0x0F, 0xAE, 0x27], [0x48, 0x0F, 0xAE, 0x37], [0x48, 0x0F, 0xC7, 0x27]];
    const INSIDE: u64 = DATA + 0x4000;
    for save in SAVES {
        // movq xmm3, rbx; fld1; mov eax, [r10] (the mask); xor edx, edx; save; the same to R13's area
        // (xchg rdi, r13); fninit; xorps xmm3, xmm3; xrstor64 [rdi]
        let code = [
            &[0x66, 0x48, 0x0F, 0x6E, 0xDB, 0xD9, 0xE8, 0x41, 0x8B, 0x02, 0x31, 0xD2][..],
            &save,
            &[0x49, 0x87, 0xFD],
            &save,
            &[0xDB, 0xE3, 0x0F, 0x57, 0xDB, 0x48, 0x0F, 0xAE, 0x2F, 0xF3, 0x90],
        ]
        .concat();
        for outside in [0x5000, 0x5D40, 0x5DC0, 0x5E00, 0x5FC0] {
            for mask in [0, 1, 2, 3, 0x200, 0x203] {
                let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|kind| {
                    let mut p = machine(kind, &code);
                    (p.core.gpr[7], p.core.gpr[13]) = (INSIDE, DATA + outside);
                    p.core.gpr[3] = 0x1234_5678_9ABC_DEF0;
                    p.core.mem.store(p.core.gpr[10], 8, mask);
                    for area in [INSIDE, DATA + outside] {
                        p.core.mem.write_bytes(area, &[0; 2696]);
                    }
                    p
                });
                for p in &mut both {
                    p.run(10, &mut || false);
                }
                let at = format!("{save:X?}, {outside:X}, mask {mask:X}");
                let [reference, dbt] = both.each_mut().map(|p| state_hash(&mut p.core));
                assert_eq!(reference, dbt, "{at}");
                let (mut one, mut other) = ([0; 2696], [0; 2696]);
                assert!(both[1].core.mem.read_bytes(INSIDE, &mut one));
                assert!(both[1].core.mem.read_bytes(DATA + outside, &mut other));
                assert_eq!(one, other, "{at}");
                assert_eq!(mask == 0, one[..512] == [0; 512] && one[576..] == [0; 2120], "{at}");
                let xmm3 = &both[1].core.fx.xmm(3)[..8];
                let is_back = xmm3 == 0x1234_5678_9ABC_DEF0_u64.to_le_bytes();
                assert_eq!(mask & 2 != 0, is_back, "{at}");
                assert_eq!(CODE + code.len() as u64 - 2, both[1].core.rip, "{at}");
            }
        }
    }
}
