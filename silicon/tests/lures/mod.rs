//! Programs that would be led out of their windows, one for each thing of which generated code makes sure.
//!
//! Each runs with registers for which its accesses lead into an arena, several times: it is translated
//! for these.  Then it runs with others, for which the same code, if it did not look, would access what is
//! beside the windows.

use silicon::mmu::window::{ARENA_SHIFT, HIGH};

use crate::arena_bed::{LIBRARY, LOW, OTHER, PIE, STACK, TABLE};

/// Numbers of registers: those of programs, and the base of FS.
pub const RCX: usize = 1;
/// See [`RCX`].
pub const RBX: usize = 3;
/// See [`RCX`].
pub const RSP: usize = 4;
/// See [`RCX`].
pub const RSI: usize = 6;
/// See [`RCX`].
pub const FS: usize = 16;

/// Registers and what they are; the others are always the same.
pub type Registers = Vec<(usize, u64)>;

/// One such program.
pub struct Lure {
    /// What generated code makes sure of.
    pub of: &'static str,
    /// Where it is.
    pub at: u64,
    /// Its code.
    pub code: Vec<u8>,
    /// What it is translated for.
    pub good: Registers,
    /// What it is to be led astray with.
    pub bad: Registers,
    /// The linear addresses, counted on from an arena, that it would access then.
    pub astray: Vec<u64>,
    /// There is a guard, and nobody's memory can be.
    pub is_guarded: bool,
    /// Somebody else has the lowest arena near.
    pub has_neighbour: bool,
}

/// Offset of data from a program's place.
const DATA: u64 = 0x10_0000;
/// Beside all arenas; there are data.
const BESIDE: u64 = OTHER + DATA;
/// More than the guard behind an arena.
const BEHIND: u64 = 96 << 30;
/// The last bytes of the lower one of the high arenas.
const LAST: u64 = ((HIGH[0] + 1) << ARENA_SHIFT) - 16;
/// Behind the lowest arena and its guard.
const OVER: u64 = (1 << ARENA_SHIFT) + BEHIND;
/// A bit less than 2 GBytes.
const STEP: u64 = 0x7FFF_F000;
/// A step down that a displacement of the lowest arena may have.
const STEP_DOWN: u64 = 0x100_0000;
/// Steps that lead over a guard.
const STEPS: u64 = 40;

/// Addresses at so many steps from one.
fn steps(from: u64, by: u64) -> Vec<u64> {
    (0..=STEPS + 8).map(|n| from.wrapping_add(n.wrapping_mul(by))).collect()
}

/// Code, several times, between other code.
fn repeated(before: &[u8], some: &[u8], times: usize, after: &[u8]) -> Vec<u8> {
    [before, &some.repeat(times), after].concat()
}

const LOAD_STORE: &[u8] = &[
    0x48, 0x8B, 0x03, // mov rax, [rbx]
    0x48, 0x89, 0x43, 0x08, // mov [rbx + 8], rax
];
const INDEXED: &[u8] = &[
    0x48, 0x8B, 0x13, // mov rdx, [rbx]
    0x48, 0x8B, 0x04, 0xCB, // mov rax, [rbx + rcx * 8]
];
const SWAPPED: &[u8] = &[
    0x48, 0x8B, 0x13, // mov rdx, [rbx]
    0x48, 0x8B, 0x04, 0x19, // mov rax, [rcx + rbx]
];
const SIGNED: &[u8] = &[
    0x48, 0x8B, 0x13, // mov rdx, [rbx]
    0x48, 0x63, 0xC9, // movsxd rcx, ecx
    0x48, 0x8B, 0x04, 0x0B, // mov rax, [rbx + rcx]
];
const INDEX_ALONE: &[u8] = &[0x48, 0x8B, 0x04, 0xCD, 0, 0, 0x40, 0]; // mov rax, [rcx * 8 + 400000h]
const DOWN: &[u8] = &[0x48, 0x8B, 0x83, 0, 0, 0, 0xE0]; // mov rax, [rbx - 20000000h]
const INDEX_DOWN: &[u8] = &[
    0x81, 0xE1, 0xFF, 0xFF, 0xFF, 0x0F, // and ecx, 0FFFFFFFh
    0x48, 0x8B, 0x04, 0xCD, 0, 0, 0, 0xE0, // mov rax, [rcx * 8 - 20000000h]
];
const FURTHEST: &[u8] = &[
    0x89, 0xC9, // mov ecx, ecx
    0x48, 0x8B, 0x84, 0xCB, 0, 0, 0, 0x30, // mov rax, [rbx + rcx * 8 + 30000000h]
];
const A_BIT_DOWN: &[u8] = &[0x48, 0x8B, 0x83, 0, 0, 0, 0xFE]; // mov rax, [rbx - 2000000h]
const FAR_DOWN: &[u8] = &[0x48, 0x8B, 0x83, 0, 0, 0, 0x80]; // mov rax, [rbx - 80000000h]
const UP: &[u8] = &[0x48, 0x8B, 0x83, 0xF0, 0xFF, 0xFF, 0x7F]; // mov rax, [rbx + 7FFFFFF0h]
const STRIDES: &[u8] = &[
    0xB9, 40, 0, 0, 0, // mov ecx, 40
    0x48, 0x8B, 0x03, // again: mov rax, [rbx]
    0x48, 0x81, 0xC3, 0, 0xF0, 0xFF, 0x7F, // add rbx, 7FFFF000h
    0xFF, 0xC9, // dec ecx
    0x75, 0xF2, // jnz again
];
const LOAD: &[u8] = &[0x48, 0x8B, 0x03]; // mov rax, [rbx]
const ADD: &[u8] = &[0x48, 0x81, 0xC3, 0, 0xF0, 0xFF, 0x7F]; // add rbx, 7FFFF000h
const SUB: &[u8] = &[0x48, 0x81, 0xEB, 0, 0, 0, 1]; // sub rbx, 1000000h
const LEA_UP: &[u8] = &[
    0x48, 0x8D, 0x93, 0, 0xF0, 0xFF, 0x7F, // lea rdx, [rbx + 7FFFF000h]
    0x48, 0x8D, 0x9A, 0, 0xF0, 0xFF, 0x7F, // lea rbx, [rdx + 7FFFF000h]
];
const LEA_DOWN: &[u8] = &[
    0x48, 0x8D, 0x93, 0, 0, 0, 0xFF, // lea rdx, [rbx - 1000000h]
    0x48, 0x8D, 0x9A, 0, 0, 0, 0xFF, // lea rbx, [rdx - 1000000h]
];
const STACK_STRIDES: &[u8] = &[
    0xB9, 48, 0, 0, 0, // mov ecx, 48
    0x48, 0x81, 0xEC, 0, 0xF0, 0xFF, 0x7F, // again: sub rsp, 7FFFF000h
    0xFF, 0xC9, // dec ecx
    0x75, 0xF5, // jnz again
    0x58, // pop rax
];
const STACK_COPIES: &[u8] = &[
    0xB9, 48, 0, 0, 0, // mov ecx, 48
    0x48, 0x8D, 0xAC, 0x24, 0, 0x10, 0, 0x80, // again: lea rbp, [rsp - 7FFFF000h]
    0x48, 0x89, 0xEC, // mov rsp, rbp
    0xFF, 0xC9, // dec ecx
    0x75, 0xF1, // jnz again
    0x58, // pop rax
];
const STACK_ELSEWHERE: &[u8] = &[
    0x48, 0x29, 0xCC, // sub rsp, rcx
    0x50, // push rax
    0x5A, // pop rdx
];
const LEAVE: &[u8] = &[
    0x48, 0x89, 0xDD, // mov rbp, rbx
    0xC9, // leave
];
const PUSH_POP: &[u8] = &[
    0x50, // push rax
    0x5A, // pop rdx
];
const FROM_KERNEL: &[u8] = &[
    0x48, 0x89, 0xDD, // mov rbp, rbx
    0x0F, 0x05, // syscall: RSP = RBP
    0x50, // push rax
    0x5A, // pop rdx
];
const LOADED: &[u8] = &[
    0x48, 0x8B, 0x13, // mov rdx, [rbx]
    0x48, 0x8B, 0x5B, 0x08, // mov rbx, [rbx + 8]
    0x48, 0x8B, 0x03, // mov rax, [rbx]
];
const THREAD: &[u8] = &[0x64, 0x48, 0x8B, 0x04, 0x25, 0x10, 0, 0, 0]; // mov rax, [fs:10h]
const ANYWHERE: &[u8] = &[
    0x48, 0x8B, 0x16, // mov rdx, [rsi]
    0x48, 0x6B, 0xDA, 0x01, // imul rbx, rdx, 1: nothing is guessed of that
    0x48, 0x8B, 0x03, // mov rax, [rbx]
    0x48, 0x89, 0x43, 0x08, // mov [rbx + 8], rax
];
const SHORT: &[u8] = &[
    0x48, 0x8B, 0x13, // mov rdx, [rbx]
    0x67, 0x48, 0x8B, 0x03, // mov rax, [ebx]
];
const SET_BY_SYSTEM: &[u8] = &[
    0xF3, 0x48, 0x0F, 0xAE, 0xC4, // rdfsbase rsp: interpreted
    0x50, // push rax
    0x5A, // pop rdx
];
const CONSTANT: &[u8] = &[0x48, 0x8B, 0x04, 0x25, 0, 0, 0x50, 0]; // mov rax, [500000h]

/// What is at [`TABLE`]: in the second word of each pair where an access is to lead.
pub const WORDS: [u64; 6] = [1, PIE + DATA, 2, BESIDE, 3, LOW + DATA];

fn lure(of: &'static str, at: u64, code: &[u8], good: Registers, bad: Registers) -> Lure {
    Lure {
        of,
        at,
        code: code.to_vec(),
        good,
        bad,
        astray: Vec::new(),
        is_guarded: false,
        has_neighbour: false,
    }
}

impl Lure {
    fn to(self, astray: impl Into<Vec<u64>>) -> Self {
        Self { astray: astray.into(), ..self }
    }

    fn guarded(self) -> Self {
        Self { is_guarded: true, ..self }
    }

    fn beside_another(self) -> Self {
        Self { has_neighbour: true, ..self }
    }
}

/// Of bases.
fn bases() -> Vec<Lure> {
    let mut all = Vec::new();
    let nowhere = (2 << 46) + BEHIND; // not canonical
    for at in [LOW, PIE] {
        for bad in [BESIDE, LAST + BEHIND, nowhere] {
            let good = vec![(RBX, LIBRARY + DATA)];
            all.push(lure("a base in a high arena", at, LOAD_STORE, good, vec![(RBX, bad)]).to([bad]));
        }
    }
    for bad in [OVER, BESIDE] {
        let good = vec![(RBX, LOW + DATA)];
        all.push(lure("a base in the lowest arena", LOW, LOAD_STORE, good, vec![(RBX, bad)]).to([bad]));
    }
    let (good, bad) = (vec![(RBX, TABLE)], vec![(RBX, TABLE + 16)]);
    all.push(lure("a base that is loaded", PIE, LOADED, good, bad).to([BESIDE]));
    let (good, bad) = (vec![(RSI, TABLE + 8)], vec![(RSI, TABLE + 24)]);
    all.push(lure("an arena that is looked up", PIE, ANYWHERE, good, bad).to([BESIDE]));
    let (good, bad) = (vec![(RSI, TABLE + 8)], vec![(RSI, TABLE + 40)]);
    let low = LOW + DATA;
    all.push(lure("an arena that there is not", PIE, ANYWHERE, good, bad).to([low]));
    let (good, bad) = (vec![(FS, LIBRARY + DATA)], vec![(FS, BESIDE)]);
    all.push(lure("the base of FS", PIE, THREAD, good, bad).to([BESIDE]));
    let same = || vec![(RBX, LIBRARY + DATA)];
    all.push(lure("an address of 32 bits", PIE, SHORT, same(), same()));
    let low = || vec![(RBX, LOW + DATA)];
    let index = || vec![(RCX, DATA / 8)];
    let small = [&[0x89, 0xC9], INDEX_ALONE].concat(); // mov ecx, ecx; …
    all.extend([
        lure("a constant without the lowest arena", PIE, CONSTANT, vec![], vec![]).beside_another(),
        lure("a base without the lowest arena", PIE, LOAD_STORE, low(), low()).beside_another(),
        lure("an index without the lowest arena", PIE, &small, index(), index()).beside_another(),
    ]);
    all
}

/// Of indices and displacements.
fn operands() -> Vec<Lure> {
    let with = |base: u64, index: i64| vec![(RBX, base), (RCX, index.cast_unsigned())];
    let high = |of, code, index: i64, astray: u64| {
        lure(of, PIE, code, with(PIE + DATA, 8), with(PIE + DATA, index)).to([PIE + DATA + astray])
    };
    let low = LOW + DATA;
    let far = (OVER - low) / 8;
    let down = -0x1800_0000;
    let alone = (OVER - LOW) / 8;
    let furthest = |base: u64| base + 8 * 0xFFFF_FFFF + 0x3000_0000;
    let first = HIGH[0] << ARENA_SHIFT;
    let end = (1 << ARENA_SHIFT) - 16;
    vec![
        high("an index in a high arena", INDEXED, 1 << 40, 1 << 43),
        high("a base and an index, either of which may be the base", SWAPPED, 1 << 43, 1 << 43),
        lure("an index in the lowest arena", LOW, INDEXED, with(low, 8), with(low, far as i64)).to([OVER]),
        lure("an index below the lowest arena", LOW, SIGNED, with(low, 8), with(low, down))
            .to([low.wrapping_add_signed(down)]),
        lure("an index alone", LOW, INDEX_ALONE, with(0, DATA as i64 / 8), with(0, alone as i64)).to([OVER]),
        lure("a displacement below the lowest arena", LOW, DOWN, with(low + 0x2000_0000, 0), with(low, 0))
            .to([low.wrapping_sub(0x2000_0000)]),
        lure(
            "a displacement from an index, below the lowest arena",
            LOW,
            INDEX_DOWN,
            with(0, (low + 0x2000_0000) as i64 / 8),
            with(0, low as i64 / 8),
        )
        .to([low.wrapping_sub(0x2000_0000)]),
        lure("a displacement that the lowest arena's distance makes too large", LOW, UP, with(0x1000, 0), {
            with(0x7000_0000, 0)
        })
        .to([0x7000_0000 + 0x7FFF_FFF0_u64.wrapping_sub(1 << 32)]),
        lure("the guard below the lowest arena", LOW, A_BIT_DOWN, with(low + 0x200_0000, 0), with(0x1000, 0))
            .to([0x1000_u64.wrapping_sub(0x200_0000)])
            .guarded(),
        lure("the guard below a high arena", PIE, FAR_DOWN, with(first + (1 << 31), 0), with(first, 0))
            .to([first - (1 << 31)])
            .guarded(),
        lure("the guard of a high arena", PIE, FURTHEST, with(PIE, 0), with(LAST, 0xFFFF_FFFF))
            .to([furthest(LAST)])
            .guarded(),
        lure("the guard of the lowest arena", LOW, FURTHEST, with(LOW, 0), with(end, 0xFFFF_FFFF))
            .to([furthest(end)])
            .guarded(),
    ]
}

/// Of registers that move.
fn moves() -> Vec<Lure> {
    let base = |base: u64| vec![(RBX, base)];
    let high = |of, code: Vec<u8>| {
        lure(of, PIE, &code, base((HIGH[0] << ARENA_SHIFT) + BEHIND), base(LAST)).to(steps(LAST, STEP))
    };
    let low = |of, code: Vec<u8>| {
        lure(of, LOW, &code, base(LOW + DATA + 20 * STEP_DOWN), base(0x1000))
            .to(steps(0x1000, STEP_DOWN.wrapping_neg()))
    };
    vec![
        lure("an access behind an arena", PIE, STRIDES, base(LAST - (STEPS - 1) * STEP), base(LAST - STEP))
            .to(steps(LAST, STEP)),
        high("a base that moves up", repeated(LOAD, ADD, STEPS as usize, LOAD)),
        high("an address that moves up", repeated(LOAD, LEA_UP, STEPS as usize / 2, LOAD)),
        low("a base that moves down", repeated(LOAD, SUB, 12, LOAD)),
        low("an address that moves down", repeated(LOAD, LEA_DOWN, 6, LOAD)),
    ]
}

/// Of the stack pointer.
fn stacks() -> Vec<Lure> {
    let beside = BESIDE + 0x8000;
    let first = HIGH[1] << ARENA_SHIFT;
    let begin = first + 2 * BEHIND;
    let stack = |at: u64| vec![(RSP, at)];
    let frame = |at: u64| vec![(RBX, at)];
    let distance = |to: u64| vec![(RCX, (STACK + 0x8000).wrapping_sub(to))];
    let below = || steps(first, STEP.wrapping_neg());
    let one = [beside - 8, beside];
    vec![
        lure(
            "a stack pointer that moves from block to block",
            PIE,
            STACK_STRIDES,
            stack(begin),
            stack(first),
        )
        .to(below()),
        lure("a copy of a stack pointer", PIE, STACK_COPIES, stack(begin), stack(first)).to(below()),
        lure("a stack pointer that is computed", PIE, STACK_ELSEWHERE, distance(STACK), distance(beside))
            .to(one),
        lure("a frame pointer", PIE, LEAVE, frame(STACK), frame(beside)).to(one),
        lure("a stack pointer with which a program begins", PIE, PUSH_POP, stack(STACK + 64), stack(beside))
            .to(one),
        lure(
            "a stack pointer that is interpreted",
            PIE,
            SET_BY_SYSTEM,
            vec![(FS, STACK + 64)],
            vec![(FS, beside)],
        )
        .to(one),
        lure("a stack pointer that the kernel sets", PIE, FROM_KERNEL, frame(STACK + 64), frame(beside))
            .to(one),
    ]
}

/// All of them.
pub fn lures() -> Vec<Lure> {
    [bases(), operands(), moves(), stacks()].into_iter().flatten().collect()
}
