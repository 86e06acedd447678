//! Loops that are one block: what they do in whatever round they are left, and what a round costs.

mod arena_bed;
mod counters;

use std::sync::PoisonError;

use arena_bed::{ALONE, LIBRARY, LOW, PIE, machine, run, seen};
use counters::counter;
use silicon::dbt::promotion::Windows;
use silicon::processor::{EngineKind, Processor};

/// Before a loop: ECX counts its rounds, RDI, RSI and R13 are where R12 is, and behind; EDX is 0.
const BEFORE: &[u8] = &[
    0xB9, 0x28, 0, 0, 0, 0x4C, 0x89, 0xE7, 0x49, 0x8D, 0xB4, 0x24, 0, 8, 0, 0, 0x4D, 0x89, 0xE5, 0x4D, 0x8D,
    0xBC, 0x24, 0x40, 1, 0, 0, 0x31, 0xD2,
];
/// Behind it, its flags go into RBX: pushfq; pop rax; xor rbx, rax.
const BEHIND: &[u8] = &[0x9C, 0x58, 0x48, 0x31, 0xC3];
const LOOPS: &[(&str, &[u8])] = &[
    // mov %rbx, (%rdi,%rcx,8); add $3, %rbx; sub $1, %ecx; jnz 1b
    ("flags that nobody reads", &[0x48, 0x89, 0x1C, 0xCF, 0x48, 0x83, 0xC3, 3, 0x83, 0xE9, 1, 0x75, 0xF3]),
    // mov %rcx, (%rdi,%rcx,8); add %rcx, %rbx; dec %ecx; jnz 1b
    ("a flag that stays", &[0x48, 0x89, 0x0C, 0xCF, 0x48, 1, 0xCB, 0xFF, 0xC9, 0x75, 0xF5]),
    // mov (%rdi,%rcx,8), %rax; adc %rax, (%rsi,%rcx,8); lea -1(%rcx), %rcx; inc %edx; cmp $40, %edx; jne 1b
    (
        "a carry",
        &[
            0x48, 0x8B, 4, 0xCF, 0x48, 0x11, 4, 0xCE, 0x48, 0x8D, 0x49, 0xFF, 0xFF, 0xC2, 0x83, 0xFA, 0x28,
            0x75, 0xED,
        ],
    ),
    // mov (%rdi), %rax; adc %rax, (%rsi); lea 8(%rdi), %rdi; lea 8(%rsi), %rsi; dec %rcx; jnz 1b
    (
        "a carry from round to round",
        &[
            0x48, 0x8B, 7, 0x48, 0x11, 6, 0x48, 0x8D, 0x7F, 8, 0x48, 0x8D, 0x76, 8, 0x48, 0xFF, 0xC9, 0x75,
            0xED,
        ],
    ),
    // setc %al; movzbl %al, %eax; add %rax, %rbx; add %ecx, %edx; sub $1, %ecx; jnz 1b
    (
        "flags of the round before",
        &[0x0F, 0x92, 0xC0, 0x0F, 0xB6, 0xC0, 0x48, 1, 0xC3, 1, 0xCA, 0x83, 0xE9, 1, 0x75, 0xF0],
    ),
    // movzbl (%rdi), %eax; add %rax, %rbx; add $0x38, %rdi; cmp %rsi, %rdi; jb 1b
    ("a pointer", &[0x0F, 0xB6, 7, 0x48, 1, 0xC3, 0x48, 0x83, 0xC7, 0x38, 0x48, 0x39, 0xF7, 0x72, 0xF1]),
    // mov 8(%rdi), %rax; add %rbx, -16(%rsi); lea 8(%rdi), %rdi; add %rax, %rbx; cmp %rsi, %rdi; jb 1b
    (
        "a pointer with a displacement",
        &[
            0x48, 0x8B, 0x47, 8, 0x48, 1, 0x5E, 0xF0, 0x48, 0x8D, 0x7F, 8, 0x48, 1, 0xC3, 0x48, 0x39, 0xF7,
            0x72, 0xEC,
        ],
    ),
    // add %rbx, 0x1000(%rdi); add $0x600, %rdi; test %rdi, %rdi; jnz 1b
    (
        "a pointer that runs off",
        &[0x48, 1, 0x9F, 0, 0x10, 0, 0, 0x48, 0x81, 0xC7, 0, 6, 0, 0, 0x48, 0x85, 0xFF, 0x75, 0xED],
    ),
    // mov (%rsi), %rax; lea 0x7FFFFFF(%rdi), %rdi; sub $1, %ecx; jnz 1b; mov -0x1000(%rdi), %rax
    (
        "a pointer that nobody uses meanwhile",
        &[
            0x48, 0x8B, 6, 0x48, 0x8D, 0xBF, 0xFF, 0xFF, 0xFF, 7, 0x83, 0xE9, 1, 0x75, 0xF1, 0x48, 0x8B,
            0x87, 0, 0xF0, 0xFF, 0xFF,
        ],
    ),
    // mov (%rdi), %rax; lea 0x7FFFFFF(%rdi), %rdi; sub $1, %ecx; jnz 1b
    (
        "a pointer of great strides",
        &[0x48, 0x8B, 7, 0x48, 0x8D, 0xBF, 0xFF, 0xFF, 0xFF, 7, 0x83, 0xE9, 1, 0x75, 0xF1],
    ),
    // addl $1, 3f-4(%rip); mov $5, %eax; 3: add %rax, %rbx; sub $1, %ecx; jnz 1b
    ("its own code", &[0x83, 5, 1, 0, 0, 0, 1, 0xB8, 5, 0, 0, 0, 0x48, 1, 0xC3, 0x83, 0xE9, 1, 0x75, 0xEC]),
    // push %rbx; pop %rax; add %rax, %rdx; sub $1, %ecx; jnz 1b
    ("the stack", &[0x53, 0x58, 0x48, 1, 0xC2, 0x83, 0xE9, 1, 0x75, 0xF6]),
    // push %rcx; add %rbx, %rdx; sub $1, %ecx; jnz 1b; mov %rdx, %rbx; lea 0x140(%rsp), %rsp
    (
        "a stack that moves",
        &[
            0x51, 0x48, 1, 0xDA, 0x83, 0xE9, 1, 0x75, 0xF7, 0x48, 0x89, 0xD3, 0x48, 0x8D, 0xA4, 0x24, 0x40,
            1, 0, 0,
        ],
    ),
    // add %rcx, (%rdi); lea 8(%rdi), %rdi; shr $1, %ecx; jnz 1b
    ("a shift", &[0x48, 1, 0x0F, 0x48, 0x8D, 0x7F, 8, 0xD1, 0xE9, 0x75, 0xF5]),
    // add $8, %edx; cmp %rbx, -8(%rdi,%rdx); jb 1b
    ("a comparison with memory", &[0x83, 0xC2, 8, 0x48, 0x39, 0x5C, 0x17, 0xF8, 0x72, 0xF6]),
    // mov (%r13), %r14; add %r14, %rbx; add $8, %r13; cmp %r15, %r13; jne 1b
    (
        "registers without a place",
        &[0x4D, 0x8B, 0x75, 0, 0x4C, 1, 0xF3, 0x49, 0x83, 0xC5, 8, 0x4D, 0x39, 0xFD, 0x75, 0xF0],
    ),
    // movups (%rdi), %xmm0; paddd %xmm0, %xmm1; movups %xmm1, (%rdi); add $16, %rdi; sub $1, %ecx; jnz 1b
    (
        "vectors",
        &[
            0x0F, 0x10, 7, 0x66, 0x0F, 0xFE, 0xC8, 0x0F, 0x11, 0x0F, 0x48, 0x83, 0xC7, 0x10, 0x83, 0xE9, 1,
            0x75, 0xED,
        ],
    ),
    // add $1, %rbx; test $0x3F, %bl; jz 4f; add %rbx, (%rdi,%rcx,8); sub $1, %ecx; jnz 1b; 4: adc $0, %rbx
    (
        "a way out",
        &[
            0x48, 0x83, 0xC3, 1, 0xF6, 0xC3, 0x3F, 0x74, 9, 0x48, 1, 0x1C, 0xCF, 0x83, 0xE9, 1, 0x75, 0xEE,
            0x48, 0x83, 0xD3, 0,
        ],
    ),
];

/// For ever.
fn program(body: &[u8]) -> Vec<u8> {
    let mut all = [BEFORE, body, BEHIND, &[0xE9]].concat();
    all.extend((-(all.len() as i32) - 4).to_le_bytes());
    all
}

fn pointed(mut p: Processor, at: u64) -> Processor {
    p.core.gpr[12] = at + 0x10_3000;
    p
}

#[test]
fn every_round_leaves_what_the_interpreter_leaves() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kinds = [EngineKind::Reference, EngineKind::Dbt, EngineKind::Dbt, EngineKind::Dbt];
    let windows = [Windows::Never, Windows::Never, Windows::Always, Windows::Always];
    for &(name, body) in LOOPS {
        for budget in [1, 2, 3, 7, 23, 1009] {
            let pair = kinds.into_iter().zip(windows);
            let make = |(k, w)| pointed(machine(k, w, LOW, &program(body)), LIBRARY);
            let mut all: Vec<_> = pair.map(make).collect();
            for stop in 0..80 {
                let reasons: Vec<_> = all.iter_mut().map(|p| p.run(budget, &mut || false).reason).collect();
                assert_eq!(vec![reasons[0]; 4], reasons, "{name}, budget {budget}, stop {stop}");
                let [expected, others @ ..] = &mut all[..] else { unreachable!() };
                let expected = seen(expected);
                for p in others {
                    assert_eq!(expected, seen(p), "{name}, budget {budget}, stop {stop}");
                }
                // Of the last two, one's windows come and go; and the data's place changes.
                all[3].use_windows([Windows::Always, Windows::Never, Windows::Auto][stop % 3]);
                if stop % 11 == 0 {
                    let place = [PIE, LOW, LIBRARY][stop % 3];
                    for p in &mut all {
                        p.core.gpr[12] = place + 0x10_3000;
                    }
                }
            }
        }
    }
}

/// What the later rounds of four instructions take, ways out and all.
#[test]
fn later_rounds_are_short() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = |body: &[u8]| {
        let mut p = pointed(machine(EngineKind::Dbt, Windows::Always, LOW, &program(body)), LIBRARY);
        run(&mut p, 100_000);
        counter(&p, "emitted_bytes")
    };
    let (_, body) = LOOPS[0];
    let once = [&body[..body.len() - 2], &[0x75, 0]].concat(); // a jump to what follows
    let (with, without) = (bytes(body), bytes(&once));
    assert!(without < with && with <= without + 320, "{with} {without}");
}
