//! Code that one processor writes while another executes it.
//!
//! Source: SDM 3A, "Handling Self- and Cross-Modifying Code": the one that executes waits for the
//! other's word, and executes a serializing instruction before the new code.

mod parallel_bed;

use std::sync::Arc;

use parallel_bed::*;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};

const WRITER: u64 = 0x1_0000;
const READER: u64 = 0x2_0000;
const FUNCTIONS: u64 = 0x40_0000;
const FLAG: u64 = 0x60_0000;
const ACK: u64 = 0x60_1000;

/// RBX counts to R15; RSI is the place to write, RDI the flag, R8 the answer.
const WRITE: &[u8] = &[
    0x48, 0xFF, 0xC3, // inc rbx
    0x69, 0xC3, 1, 0, 1, 0, // imul eax, ebx, 10001h
    0x89, 0x06, 0x48, 0x89, 0x1F, // mov [rsi], eax; mov [rdi], rbx
    0x49, 0x39, 0x18, 0x7C, 0xFB, // cmp [r8], rbx; jl
    0x4C, 0x39, 0xFB, 0x7C, 0xE8, 0xF4, // cmp rbx, r15; jl; hlt
];

/// The same from the other side; R14 counts what was wrong.
const READ: &[u8] = &[
    0x48, 0xFF, 0xC3, // inc rbx
    0x48, 0x39, 0x1F, 0x7C, 0xFB, // cmp [rdi], rbx; jl
    0x49, 0x89, 0xDD, 0x31, 0xC0, 0x0F, 0xA2, 0x4C, 0x89, 0xEB, // mov r13, rbx; cpuid; mov rbx, r13
    0x41, 0xFF, 0xD1, // call r9
    0x69, 0xCB, 1, 0, 1, 0, 0x39, 0xC8, // imul ecx, ebx, 10001h; cmp eax, ecx
    0x74, 0x03, 0x49, 0xFF, 0xC6, // je; inc r14
    0x49, 0x89, 0x18, // mov [r8], rbx
    0x4C, 0x39, 0xFB, 0x7C, 0xD6, 0xF4, // cmp rbx, r15; jl; hlt
];

fn pair(mem: &Arc<Memory>, engines: [EngineKind; 2], programs: [&[u8]; 2], function: u64) -> [Processor; 2] {
    let mut id = 0;
    [WRITER, READER].map(|at| {
        mem.write_bytes(at, programs[id]);
        let mut p = processor(mem, engines[id], id as u32, at);
        id += 1;
        (p.core.gpr[6], p.core.gpr[7], p.core.gpr[8], p.core.gpr[9]) = (function + 1, FLAG, ACK, function);
        p
    })
}

#[test]
fn after_a_serializing_instruction_new_code_runs() {
    let orders = [[Dbt, Dbt], [Reference, Dbt], [Dbt, Reference]];
    for engines in orders {
        // In one word; in two words; in two lines; in two pages; beside the flag.
        for (place, flag) in
            [(0x100, FLAG), (0x105, FLAG), (0x13D, FLAG), (0xFFD, FLAG), (0x100, FUNCTIONS + 0x800)]
        {
            let mem = memory();
            let function = FUNCTIONS + place;
            mem.write_bytes(function, &[0xB8, 0, 0, 0, 0, 0xC3]); // mov eax, n; ret
            let mut all = pair(&mem, engines, [WRITE, READ], function);
            for p in &mut all {
                (p.core.gpr[7], p.core.gpr[15]) = (flag, times(600, 100_000));
            }
            run_all(&mut all);
            assert_eq!(0, all[1].core.gpr[14], "{engines:?} {place:#x}");
        }
    }
}

/// RBX counts to R15; RSI is an aligned word, R11 all of the function but its number.
const WRITE_FREELY: &[u8] = &[
    0x48, 0xFF, 0xC3, // inc rbx
    0x69, 0xC3, 1, 0, 1, 0, // imul eax, ebx, 10001h
    0x48, 0xC1, 0xE0, 8, 0x4C, 0x09, 0xD8, // shl rax, 8; or rax, r11
    0x48, 0x89, 0x06, // mov [rsi], rax
    0x4C, 0x39, 0xFB, 0x7C, 0xE8, // cmp rbx, r15; jl
    0x48, 0x89, 0x1F, 0xF4, // mov [rdi], rbx; hlt
];

/// R14 counts numbers that were torn or came before; R12 is the last one.
const READ_FREELY: &[u8] = &[
    0x41, 0xFF, 0xD1, // call r9
    0x89, 0xC1, 0xC1, 0xE9, 0x10, 0x66, 0x39, 0xC1, // mov ecx, eax; shr ecx, 16; cmp cx, ax
    0x75, 0x05, 0x44, 0x39, 0xE0, // jne; cmp eax, r12d
    0x73, 0x03, 0x49, 0xFF, 0xC6, // jae; inc r14
    0x41, 0x89, 0xC4, // mov r12d, eax
    0x4C, 0x39, 0x3F, 0x7C, 0xE3, 0xF4, // cmp [rdi], r15; jl; hlt
];

/// What computers do beyond the manual: an aligned word of code changes at once, and for good.
#[test]
fn an_aligned_word_of_code_is_never_torn_nor_comes_back() {
    for engines in [[Dbt, Dbt], [Reference, Dbt]] {
        let mem = memory();
        mem.write_bytes(FUNCTIONS, &[0xB8, 0, 0, 0, 0, 0xC3, 0x90, 0x90]);
        let mut all = pair(&mem, engines, [WRITE_FREELY, READ_FREELY], FUNCTIONS);
        for p in &mut all {
            (p.core.gpr[6], p.core.gpr[11]) = (FUNCTIONS, 0x9090_C300_0000_00B8);
            p.core.gpr[15] = times(5_000, 60_000);
        }
        run_all(&mut all);
        assert_eq!(0, all[1].core.gpr[14], "{engines:?}");
    }
}
