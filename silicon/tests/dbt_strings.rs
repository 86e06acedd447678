//! Repeated string instructions and the transfers that count: both engines run them alike, at
//! whatever place in memory and however the budget is chopped, and what is common is not
//! interpreted.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

const CODE: u64 = 0x1_0000;
const TABLE: u64 = 0x4000;
/// Plain pages, of which two have the same frame; what follows them is not mapped.
const PAGES: u64 = 0x2_0000;
const TWIN: u64 = 0x2_3000;
const READ_ONLY: u64 = 0x3_0000;
const NOT_PRESENT: u64 = 0x3_1000;
const APIC: u64 = 0x3_2000;
/// The last 4 GBytes' page: its end is where short addresses wrap.
const HIGH: u64 = 0xFFFF_F000;

/// What is set before each round of the program.
#[derive(Clone, Copy, Debug)]
struct Start {
    rax: u64,
    rcx: u64,
    rsi: u64,
    rdi: u64,
    rflags: u64,
    dr7: u64,
    is_32: bool,
}

const START: Start = Start {
    rax: 0x1122_3344_5566_7788,
    rcx: 0,
    rsi: PAGES + 0x1000,
    rdi: PAGES,
    rflags: 0,
    dr7: 0,
    is_32: false,
};
const DF: u64 = 1 << 10;

/// A processor at the program's first instruction: 4-KByte pages, CPL 0, CR0.WP.
fn machine(engine: EngineKind, code: &[u8], s: Start) -> Processor {
    let mem = Memory::new(1 << 20).unwrap();
    mem.write_bytes(CODE, code);
    let bytes: Vec<u8> = (0..0x4000_u32).map(|i| ((i * 7) >> 3) as u8).collect();
    mem.write_bytes(PAGES, &bytes);
    let entry = |at: u64, value: u64| mem.store(at, 8, value);
    entry(0x1000, 0x2003); // level 4
    entry(0x2000, 0x3003); // level 3
    entry(0x2000 + 8 * 3, 0x5003);
    entry(0x3000, TABLE | 3);
    entry(0x5000 + 8 * 511, 0x6003);
    entry(0x6000 + 8 * 511, 0x2_5003); // HIGH
    (0..256).for_each(|i| entry(TABLE + 8 * i, i << 12 | 3));
    let page = |at: u64, value: u64| entry(TABLE + 8 * (at >> 12), value);
    page(TWIN, PAGES | 3);
    page(READ_ONLY, READ_ONLY | 1);
    page(NOT_PRESENT, 0);
    page(APIC, 0xFEE0_0003);
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = (0x8001_0031, 0x1000, 0x620, 0x500);
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC093, selector: 0x10 }; 6];
    let attr = if s.is_32 { 0xC09B } else { 0xA09B };
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr, selector: 8 };
    c.rip = CODE;
    c.gpr[0] = s.rax;
    c.gpr[4] = 0x8000;
    c.rflags = 2 | s.rflags;
    c.dr[7] |= s.dr7;
    c.refresh();
    p
}

fn memory(p: &Processor) -> Vec<u8> {
    let mut bytes = vec![0; 0x4_0000];
    p.core.mem.read_bytes(0, &mut bytes);
    bytes
}

/// Run a program on both engines, its budget chopped in several ways; they agree at every stop.
/// Returns the translator's machine of the last run, and its exit's reason.
fn agree(name: &str, code: &[u8], s: Start) -> (Processor, u64) {
    let mut last = None;
    for budget in [17, 1 << 40] {
        let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|e| machine(e, code, s));
        let end = loop {
            let [reference, dbt] = both.each_mut().map(|p| p.run(budget, &mut || false));
            let at = format!("{name}, {s:x?}, budget {budget}, instruction {}", both[0].core.retired());
            let gprs = both.each_ref().map(|p| (p.core.gpr, p.core.rip, p.core.rflags, p.core.retired()));
            assert_eq!(gprs[0], gprs[1], "{at}");
            assert_eq!(reference, dbt, "{at}");
            let hashes = both.each_mut().map(|p| state_hash(&mut p.core));
            assert_eq!(hashes[0], hashes[1], "{at}");
            if reference.reason != reason::BUDGET {
                break reference.reason;
            }
        };
        let [reference, dbt] = both.each_ref().map(memory);
        let differs = reference.iter().zip(&dbt).position(|(a, b)| a != b);
        assert_eq!(None, differs, "{name}, {s:x?}, budget {budget}: bytes in memory");
        let [_, dbt] = both;
        last = Some((dbt, end.into()));
    }
    last.unwrap()
}

/// A program of some rounds, then HLT: registers as in `s`, an addition whose flags live on, the
/// instruction, what looks at those flags, and a comparison whose recipe the instruction spoils.
fn rounds(rounds: u32, insn: &[u8], s: Start) -> Vec<u8> {
    let wide: &[u8] = if s.is_32 { &[] } else { &[0x48] };
    let mut body = Vec::new();
    for (opcode, v) in [(0xB9, s.rcx), (0xBE, s.rsi), (0xBF, s.rdi)] {
        let bytes = if s.is_32 { 4 } else { 8 };
        body.extend([wide, &[opcode], &v.to_le_bytes()[..bytes]].concat()); // mov reg, imm
    }
    body.extend([0x81, 0xC3, 0xFF, 0xFF, 0xFF, 0x7F]); // add ebx, 7FFFFFFFh
    body.extend(insn);
    body.extend([0x0F, 0x90, 0xC2, 0x83, 0xD2, 3]); // seto dl; adc edx, 3
    body.extend([wide, &[0x83, 0xF9, 7]].concat()); // cmp rcx, 7
    body.extend(insn);
    body.extend([0x77, 3, 0x83, 0xD2, 1]); // ja over: adc edx, 1
    let mut code = [&[0xBD][..], &rounds.to_le_bytes()].concat(); // mov ebp, rounds
    let back = -(body.len() as i32) - 8;
    code.extend(body);
    code.extend([0xFF, 0xCD, 0x0F, 0x85]); // dec ebp; jnz
    code.extend(back.to_le_bytes());
    code.push(0xF4);
    code
}

/// Both engines run some rounds of an instruction alike; the reason of the exit at the end.
fn check(insn: &[u8], s: Start) -> u64 {
    agree(&format!("{insn:02x?}"), &rounds(3, insn, s), s).1
}

/// How often the translator interprets in 1000 rounds.
fn interpreted(insn: &[u8], s: Start) -> u64 {
    let mut p = machine(EngineKind::Dbt, &rounds(1000, insn, s), s);
    p.run(1 << 40, &mut || false);
    counter(&p, "interpreted")
}

/// REP STOS and REP MOVS of all sizes; with the number of bytes of an element.
const STORES: [(&[u8], u64); 4] =
    [(&[0xF3, 0xAA], 1), (&[0xF3, 0x66, 0xAB], 2), (&[0xF3, 0xAB], 4), (&[0xF3, 0x48, 0xAB], 8)];
const MOVES: [(&[u8], u64); 4] =
    [(&[0xF3, 0xA4], 1), (&[0xF3, 0x66, 0xA5], 2), (&[0xF3, 0xA5], 4), (&[0xF3, 0x48, 0xA5], 8)];

fn all() -> impl Iterator<Item = (&'static [u8], u64, Start)> {
    let wide = STORES.into_iter().chain(MOVES).map(|(insn, size)| (insn, size, START));
    let narrow = STORES.into_iter().chain(MOVES).filter(|i| i.1 < 8);
    wide.chain(narrow.map(|(insn, size)| (insn, size, Start { is_32: true, ..START })))
}

#[test]
fn ranges_end_inside_at_and_behind_a_page() {
    for (insn, size, s) in all() {
        for bytes in [0, 24, 0x1000, 0x1008, 0x2800] {
            for from in [0, 0x7FA, 0xFFF] {
                // The instruction runs twice: from its own end too.
                check(insn, Start { rcx: bytes / size, rdi: PAGES + from, ..s });
                check(insn, Start { rcx: bytes / size, rdi: PAGES + 0x40, rsi: PAGES + 0x1000 + from, ..s });
            }
        }
    }
}

#[test]
fn moves_that_overlap_go_one_element_after_the_other() {
    for (insn, size) in MOVES {
        for by in [-9, -8, -1, 0, 1, 2, 3, 7, 8, 9, 64] {
            let to = PAGES.wrapping_add_signed(0x400 + by);
            for rdi in [to, to + TWIN - PAGES] {
                check(insn, Start { rcx: 0x200 / size, rsi: PAGES + 0x400, rdi, ..START });
            }
        }
    }
}

#[test]
fn downwards_with_other_addresses_and_prefixes() {
    for (insn, _, s) in all() {
        let s = Start { rcx: 9, rsi: PAGES + 0x1800, rdi: PAGES + 0x800, ..s };
        check(insn, Start { rflags: DF, ..s });
        check(insn, Start { rcx: 0, rflags: DF, ..s });
        check(insn, Start { dr7: 1, ..s });
        for prefix in [0x67, 0x64, 0x2E] {
            check(&[&[prefix], insn].concat(), s);
            // Upper halves, which short addresses are without.
            let high = if s.is_32 { 0 } else { 5 << 32 };
            check(&[&[prefix], insn].concat(), Start { rcx: high | 9, rdi: high | s.rdi, ..s });
        }
    }
    // REPNE is as good as REP.
    check(&[0xF2, 0xAA], Start { rcx: 9, ..START });
    check(&[0xF2, 0x48, 0xA5], Start { rcx: 9, ..START });
}

#[test]
fn addresses_wrap() {
    for (insn, size, s) in all() {
        for rcx in [0x10 / size, 0x10 / size + 1] {
            check(insn, Start { rcx, rdi: HIGH + 0xFF0, ..s });
            check(insn, Start { rcx, rsi: HIGH + 0xFF0, ..s });
        }
        if !s.is_32 {
            for rcx in [1 << 63, 1 << 61, 1 << 32, u64::MAX] {
                check(insn, Start { rcx, ..s });
            }
        }
    }
}

#[test]
fn faults_keep_the_progress() {
    for (insn, _, s) in all() {
        for page in [READ_ONLY, NOT_PRESENT] {
            for before in [0, 5, 16] {
                let s = Start { rcx: 40, rdi: page - before, ..s };
                assert_eq!(u64::from(reason::SHUTDOWN), check(insn, s));
            }
        }
        check(insn, Start { rcx: 40, rsi: READ_ONLY - 16, ..s });
        check(insn, Start { rcx: 40, rsi: NOT_PRESENT - 16, ..s });
        if !s.is_32 {
            check(insn, Start { rcx: 4, rdi: 1 << 47, ..s });
            check(insn, Start { rcx: 40, rdi: (1 << 47) - 16, ..s });
        }
    }
}

#[test]
fn devices_and_code_are_written() {
    for (insn, size, s) in all() {
        check(insn, Start { rcx: 2, rdi: APIC + 0x80, ..s });
        check(insn, Start { rcx: 2, rsi: APIC + 0x20, ..s });
        // The page of the program, and the program itself: it becomes NOPs up to the one here.
        check(insn, Start { rcx: 0x100 / size, rdi: CODE + 0x800, ..s });
        check(insn, Start { rcx: 0x100 / size, rsi: CODE, ..s });
        let nops = Start { rax: 0x9090_9090_9090_9090, ..s };
        let code = [insn, &[0x83, 0xC2, 1, 0x83, 0xC2, 2, 0x83, 0xC2, 4][..]].concat();
        let len = rounds(3, &code, nops).len() as u64;
        for (rcx, by) in [(1, 40), (1, 50), (2, 50), (16, 30)] {
            let s = Start { rcx, rdi: CODE + (by).min(len - 24), rsi: CODE + 0x900, ..nops };
            let program = rounds(3, &code, s);
            for budget in [19, 1 << 40] {
                let both = [EngineKind::Reference, EngineKind::Dbt].map(|e| {
                    let mut p = machine(e, &program, s);
                    p.core.mem.write_bytes(CODE + 0x900, &[0x90; 0x200]);
                    let stops = (0..30).map(|_| p.run(budget, &mut || false));
                    let last = stops.last();
                    (last, p.core.gpr, p.core.rip, p.core.retired(), state_hash(&mut p.core), memory(&p))
                });
                assert!(both[0] == both[1], "{insn:02x?} {s:x?}");
            }
        }
    }
}

#[test]
fn what_lies_in_one_page_is_not_interpreted() {
    for (insn, size, s) in all() {
        for bytes in [0, size, 40, 0x800] {
            let s = Start { rcx: bytes / size, rdi: PAGES + 0x7FF, ..s };
            let n = interpreted(insn, s);
            assert!(n < 30, "{insn:02x?} {s:x?}: {n} interpreted");
        }
        // Each of two crosses.
        let s = Start { rcx: 0x800 / size, rdi: PAGES + 0xFF8, ..s };
        assert!(interpreted(insn, s) >= 1000);
    }
}

/// Instructions that count, in some code each; what RCX is before.
const COUNTING: [(&str, &[u8], u64); 17] = [
    ("adc eax, ebx; loop", &[0xB9, 4, 0, 0, 0, 0x11, 0xD8, 0xE2, 0xFC], 0),
    ("loop around nothing", &[0xB9, 4, 0, 0, 0, 0xE2, 0xFE], 0),
    ("loop once", &[0xB9, 1, 0, 0, 0, 0x11, 0xD8, 0xE2, 0xFC], 0),
    ("loop forward over lea, from 0", &[0xE2, 3, 0x8D, 0x40, 1], 0),
    ("loop forward over lea, not taken", &[0xB9, 1, 0, 0, 0, 0xE2, 3, 0x8D, 0x40, 1], 0),
    ("add eax, 1; loopne", &[0xB9, 7, 0, 0, 0, 0x83, 0xC0, 1, 0xE0, 0xFB], 0),
    ("add eax, 1; loope", &[0xB9, 7, 0, 0, 0, 0x83, 0xC0, 1, 0xE1, 0xFB], 0),
    ("loope behind a comparison with ecx", &[0xB9, 7, 0, 0, 0, 0x83, 0xF9, 7, 0xE1, 0xFB], 0),
    ("loopne forward", &[0xE0, 3, 0x8D, 0x40, 1], 5),
    ("67 loop", &[0xB9, 2, 0, 0, 0, 0x11, 0xD8, 0x67, 0xE2, 0xFB], 0),
    ("67 loop forward", &[0x67, 0xE2, 3, 0x8D, 0x40, 1], 5 << 32 | 5),
    ("jrcxz forward, taken", &[0xE3, 3, 0x8D, 0x40, 1], 0),
    ("jrcxz forward, not taken", &[0xE3, 3, 0x8D, 0x40, 1], 5 << 32),
    ("67 jrcxz forward", &[0x67, 0xE3, 3, 0x8D, 0x40, 1], 5 << 32),
    ("jrcxz backward, taken", &[0xEB, 2, 0xEB, 2, 0xE3, 0xFC], 0),
    ("jrcxz backward, not taken", &[0xEB, 2, 0xEB, 2, 0xE3, 0xFC], 1),
    ("jrcxz; adc eax, ebx; lea; jmp", &[0xE3, 7, 0x11, 0xD8, 0x8D, 0x49, 0xFF, 0xEB, 0xF7], 6),
];

#[test]
fn transfers_count_and_leave_the_flags() {
    for (name, code, rcx) in COUNTING {
        for is_32 in [false, true] {
            let s = Start { rcx, rax: 0xFFFF_FFFD, is_32, ..START };
            agree(name, &rounds(3, code, s), s);
            let n = interpreted(code, s);
            let is_16 = is_32 && code.contains(&0x67);
            assert!(is_16 || n < 30, "{name}, {s:x?}: {n} interpreted");
        }
    }
}
