//! The last x87 instruction's pointers, at every stop and under both engines.  (What images show of
//! them is compared with this computer's own processor by `differential.rs`.)

mod counters;

use counters::counter;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::pointers::{Pointers, habits};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::{self, state_hash};

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const IMAGE: u64 = 0x2_1000;

/// At CPL 0 in 64-bit code, or flat 32-bit code, DS with its own selector; RBX names a page that is not mapped.
fn machine(engine: EngineKind, code: &[u8], is_32: bool) -> Processor {
    let mem = Memory::new(1 << 20).unwrap();
    mem.write_bytes(CODE, code);
    let entry = |at: u64, value: u64| mem.store(at, 8, value);
    for (at, value) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003)] {
        entry(at, value);
    }
    (0..255).for_each(|i| entry(0x4000 + 8 * i, i << 12 | 3));
    mem.store(DATA, 8, 1.5_f64.to_bits());
    mem.store(DATA + 16, 4, 0x37B); // #Z is not masked
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = (0x8001_0031, 0x1000, 0x620, 0x500);
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC093, selector: 0x10 }; 6];
    c.seg[seg::DS].selector = 0x18;
    let attr = if is_32 { 0xC09B } else { 0xA09B };
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    c.idtr.limit = 0;
    c.rip = CODE;
    (c.gpr[3], c.gpr[4], c.gpr[6], c.gpr[7]) = (0xF_F000, 0x8000, DATA, IMAGE);
    c.refresh();
    p
}

/// fninit; fldcw [rsi+16]; 20 times: fld1; fld qword [rsi]; fxch; add eax,1; fstp qword [rsi+8]; fst st1;
/// fninit or fnop; jmp
fn program(last: &[u8]) -> Vec<u8> {
    let mut code = vec![0xDB, 0xE3, 0xD9, 0x6E, 16];
    for _ in 0..20 {
        code.extend([0xD9, 0xE8, 0xDD, 0x06, 0xD9, 0xC9, 0x83, 0xC0, 1, 0xDD, 0x5E, 8, 0xDD, 0xD9]);
    }
    code.extend(last);
    let back = -(code.len() as i32) - 5;
    code.push(0xE9);
    code.extend(back.to_le_bytes());
    code
}

#[test]
fn both_engines_know_them_at_every_stop() {
    for is_32 in [false, true] {
        for last in [[0xDB, 0xE3], [0xD9, 0xD0]] {
            let code = program(&last);
            let mut known = 0;
            for stop in 1..140 {
                let mut ends = [EngineKind::Reference, EngineKind::Dbt].map(|kind| {
                    let mut p = machine(kind, &code, is_32);
                    p.run(2000 + stop, &mut || false);
                    (p.core.pointers, state_hash(&mut p.core))
                });
                assert_eq!(ends[0], ends[1], "32-bit code: {is_32}, stop {stop}");
                ends[0].1 = 0;
                known += u32::from(ends[0].0.fip >= CODE);
            }
            assert!(known > 100, "{known}");
        }
    }
}

#[test]
fn a_page_fault_leaves_those_of_the_instruction_before() {
    // fld qword [rsi]; fld1; fld qword [rbx]
    let code = [0xDD, 0x06, 0xD9, 0xE8, 0xDD, 0x03];
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        let mut p = machine(kind, &code, false);
        p.run(100, &mut || false);
        assert_eq!(0xF_F000, p.core.cr2, "{kind:?}");
        let selector = if habits().has_selectors { 8 } else { 0 };
        assert_eq!((CODE + 2, selector), (p.core.pointers.fip, p.core.pointers.fcs));
    }
}

/// Every processor saves them then: fldcw [rsi+16]; fldz; fld1; fdiv st1; fxsave64 [rdi]; fnstenv [rdi+512]
#[test]
fn a_pending_exception_is_saved_with_its_instruction() {
    let code = [
        0xD9, 0x6E, 16, 0xD9, 0xEE, 0xD9, 0xE8, 0xD8, 0xF1, 0x48, 0x0F, 0xAE, 0x07, 0xD9, 0xB7, 0, 2, 0, 0,
        0xF4,
    ];
    for kind in [EngineKind::Reference, EngineKind::Dbt] {
        let mut p = machine(kind, &code, false);
        p.run(6, &mut || false);
        let load = |at| p.core.mem.load(IMAGE + at, 8);
        assert_eq!((0xF1, CODE + 7), (load(0) >> 48, load(8)), "{kind:?}");
        assert_eq!((CODE + 7, 0xF1), (load(512 + 12) & 0xFFFF_FFFF, load(512 + 12) >> 48));
    }
}

#[test]
fn they_are_part_of_the_saved_processor() {
    let all = Pointers { fip: CODE, fdp: DATA, fop: 0x123, fcs: 8, fds: 0x18 };
    let mut p = machine(EngineKind::Reference, &[], false);
    p.core.pointers = all;
    let bytes = snapshot::save(&mut p.core);
    let mut other = machine(EngineKind::Dbt, &[], false);
    snapshot::load(&mut other.core, &bytes).unwrap();
    assert_eq!(all, other.core.pointers);
}

/// Pieces of code for both modes.
const PIECES: [&[u8]; 31] = [
    &[0xD9, 0xE8],                                // fld1
    &[0xD9, 0xC9],                                // fxch
    &[0xD9, 0xD0],                                // fnop
    &[0xD8, 0xF1],                                // fdiv st1
    &[0xDD, 0xD8],                                // fstp st0
    &[0xDB, 0xE3],                                // fninit
    &[0xDB, 0xE2],                                // fnclex
    &[0xDF, 0xE0],                                // fnstsw ax
    &[0xDD, 0x06],                                // fld qword [rsi]
    &[0xDD, 0x06],                                // fld qword [rsi]
    &[0xDD, 0x5E, 8],                             // fstp qword [rsi+8]
    &[0xD9, 0x04, 0x8E],                          // fld dword [rsi+rcx*4]
    &[0x64, 0xDD, 0x06],                          // fld qword [fs:rsi]
    &[0xD9, 0x44, 0x24, 0xF8],                    // fld dword [rsp-8]
    &[0xDD, 0x05, 0x10, 0, 2, 0],                 // fld qword [rip+20010h], [20010h]
    &[0xD9, 0xEE, 0xD9, 0x6E, 16, 0xD8, 0xF1],    // fldz; fldcw [rsi+16]; fdiv st1
    &[0xD9, 0x37, 0x80, 0x47, 12, 1, 0xD9, 0x27], // fnstenv [rdi]; add byte [rdi+12], 1; fldenv [rdi]
    &[0x0F, 0xAE, 0x07],                          // fxsave [rdi]
    &[0x83, 0xC6, 4],                             // add esi, 4
    &[0x83, 0xEE, 4],                             // sub esi, 4
    &[0x83, 0xF1, 1],                             // xor ecx, 1
    &[0x89, 0x0E],                                // mov [rsi], ecx
    &[0x50, 0x5A],                                // push rax; pop rdx
    &[0xE8, 0, 0, 0, 0, 0x5A],                    // call; pop rdx
    &[0x85, 0xC9, 0x74, 2, 0xD9, 0xE8],           // test ecx, ecx; je; fld1
    &[0x85, 0xC9, 0x75, 3, 0xD9, 0x46, 4],        // test ecx, ecx; jne; fld dword [rsi+4]
    &[0xE3, 2, 0xDD, 0x06],                       // jrcxz; fld qword [rsi]
    &[0x84, 0xC0, 0x78, 2, 0xDD, 0x06],           // test al, al; js; fld qword [rsi]
    &[0xE8, 0, 0, 0, 0, 0x5A, 0xC6, 0x02, 0x5A],  // call; pop rdx; mov byte [rdx], 5Ah: what is there
    &[0xE8, 0, 0, 0, 0, 0x5A, 0xDD, 0x5A, 0x40],  // call; pop rdx; fstp qword [rdx+40h]
    &[0x9C, 0x5A, 0x90],                          // pushf; pop rdx; nop
];

/// Pieces for 64-bit code alone.
const WIDE: [&[u8]; 8] = [
    &[0x43, 0xDD, 0x44, 0xF5, 0],  // fld qword [r13+r14*8]
    &[0x42, 0xD9, 0x44, 0xF6, 16], // fld dword [rsi+r14*8+16]
    &[0x41, 0xDD, 0x5C, 0xCD, 8],  // fstp qword [r13+rcx*8+8]
    &[0x67, 0xDD, 0x06],           // fld qword [esi]
    &[0x49, 0x83, 0xC5, 8],        // add r13, 8
    &[0x49, 0x83, 0xF6, 3],        // xor r14, 3
    &[0x49, 0x83, 0xED, 8],        // sub r13, 8
    &[0x49, 0x89, 0xCE],           // mov r14, rcx
];

/// How a program may end: a page fault of the x87 and of another instruction, a single step, a jump to no
/// address; otherwise it begins anew.
const ENDS: [&[u8]; 4] = [
    &[0xDD, 0x03],                                           // fld qword [rbx]
    &[0x8B, 0x03],                                           // mov eax, [rbx]
    &[0x9C, 0x81, 0x0C, 0x24, 0, 1, 0, 0, 0x9D, 0xD9, 0xE8], // pushf; or dword [rsp], 100h; popf; fld1
    &[0x89, 0xD8, 0x0F, 0xC8, 0x48, 0x0F, 0xC8, 0xFF, 0xE0], // mov eax, ebx; bswap eax; bswap rax; jmp rax
];

/// Wherever code is left: at the end of a budget, at a fault of the x87 (#MF) or another (#PF, #DB, #GP), where it
/// is overwritten, where an access leaves its page, at transfers.
#[test]
fn both_engines_know_them_wherever_code_is_left() {
    let mut seed = 1_u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut faults, mut pending, mut known) = (0, 0, 0);
    for case in 0..1500 {
        let is_32 = random(2) == 0;
        let mut code = Vec::new();
        for _ in 0..2 + random(24) {
            let pieces = if is_32 || random(4) != 0 { &PIECES[..] } else { &WIDE[..] };
            code.extend(pieces[random(pieces.len())]);
        }
        code.extend(*ENDS.get(random(2 * ENDS.len())).unwrap_or(&&[][..]));
        let back = -(code.len() as i32) - 5;
        code.push(0xE9);
        code.extend(back.to_le_bytes());
        let budget = 100 + random(400) as u64;
        let ends = [EngineKind::Reference, EngineKind::Dbt].map(|kind| {
            let mut p = machine(kind, &code, is_32);
            p.core.seg[seg::FS].base = 0x100;
            (p.core.gpr[1], p.core.gpr[6], p.core.gpr[13], p.core.gpr[14]) =
                (1, DATA + 0xF80, DATA + 0x80, 1);
            p.core.mem.store(DATA + 0xF90, 4, 0x37B);
            p.run(budget, &mut || false);
            let c = &mut *p.core;
            (c.pointers, c.rip, c.cr2, c.fx.pending(), state_hash(c))
        });
        assert_eq!(ends[0], ends[1], "case {case}, 32-bit code: {is_32}, {code:02x?}");
        known += u32::from(ends[0].0.fip >= CODE && (ends[0].0.fdp >= DATA || !habits().has_data));
        faults += u32::from(ends[0].2 != 0);
        pending += u32::from(ends[0].3 != 0);
    }
    assert!(known > 300 && faults > 300 && pending > 100, "{known} {faults} {pending}");
}

/// An x87 instruction without a memory operand is translated to itself, and nothing else.
#[test]
fn to_know_them_takes_no_code_inside_a_block() {
    let bytes = |exchanges: usize| {
        let mut code = vec![0xD9, 0xE8, 0xD9, 0xE8]; // fld1; fld1; fxch ...; jmp
        code.extend([0xD9, 0xC9].repeat(exchanges));
        code.extend([0xEB, (-(code.len() as i8) + 2) as u8]);
        let mut p = machine(EngineKind::Dbt, &code, false);
        p.run(1000, &mut || false);
        counter(&p, "code_bytes")
    };
    // (There are two blocks of them: from the start, and from where the jump leads; they begin at multiples of 16.)
    assert_eq!(2 * 2 * 32, bytes(40) - bytes(8));
}
