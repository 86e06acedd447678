//! 32-bit code is translated under every kind of paging, and both engines run it alike: the same
//! program, its budget chopped in several ways.

mod counters;

use counters::counter;
use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

const CODE: u64 = 0x1_0000;
const ROUNDS: u64 = 20_000;

/// Calls a function 20,000 times that uses the stack, absolute addresses, FS with a base, LODS,
/// PUSHF and PUSH DS; then HLT.
const PROGRAM: [u8; 71] = [
    0xB9, 0x20, 0x4E, 0x00, 0x00, // mov ecx, 20000
    0xBE, 0x00, 0x00, 0x03, 0x00, // mov esi, 30000h
    0x51, // again: push ecx
    0x6A, 0xFB, // push -5
    0xE8, 0x08, 0x00, 0x00, 0x00, // call f
    0x83, 0xC4, 0x04, // add esp, 4
    0x59, // pop ecx
    0x49, // dec ecx
    0x75, 0xF1, // jnz again
    0xF4, // hlt
    0x55, // f: push ebp
    0x89, 0xE5, // mov ebp, esp
    0x8B, 0x45, 0x0C, // mov eax, [ebp + 12]
    0x11, 0x05, 0x00, 0x00, 0x03, 0x00, // adc [30000h], eax
    0x64, 0x8B, 0x14, 0x8D, 0x04, 0x00, 0x00, 0x00, // mov edx, [fs:ecx * 4 + 4]
    0x42, // inc edx
    0x64, 0x89, 0x15, 0xFC, 0xFF, 0xFF, 0xFF, // mov [fs:-4], edx
    0xAC, // lodsb
    0x2C, 0x30, // sub al, 30h
    0xF9, // stc
    0x9C, // pushf
    0x5B, // pop ebx
    0x4E, // dec esi
    0x1E, // push ds
    0x5F, // pop edi
    0x0F, 0xAF, 0x45, 0x08, // imul eax, [ebp + 8]
    0x01, 0xC3, // add ebx, eax
    0xC9, // leave
    0xC3, // ret
];
/// Instructions of one round.
const LENGTH: u64 = 7 + 19;

#[derive(Clone, Copy, Debug)]
enum Paging {
    None,
    Legacy,
    Pae,
    Compatibility,
}

/// A processor at the program's first instruction, 4 MBytes mapped where they are.
fn machine(engine: EngineKind, paging: Paging) -> Processor {
    let mem = Memory::new(8 << 20).unwrap();
    mem.write_bytes(CODE, &PROGRAM);
    let entry = |at: u64, size: usize, value: u64| mem.store(at, size, value);
    match paging {
        Paging::None => {}
        Paging::Legacy => entry(0x1000, 4, 0x83),
        Paging::Pae | Paging::Compatibility => {
            entry(0x1000, 8, 0x2003);
            let rights = if matches!(paging, Paging::Pae) { 1 } else { 3 };
            entry(0x2000, 8, 0x3000 | rights);
            (0..2).for_each(|i| entry(0x3000 + 8 * i, 8, i << 21 | 0x83));
        }
    }
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = match paging {
        Paging::None => (0x31, 0, 0x600, 0),
        Paging::Legacy => (0x8001_0031, 0x1000, 0x610, 0),
        Paging::Pae => (0x8001_0031, 0x2000, 0x620, 0),
        Paging::Compatibility => (0x8001_0031, 0x1000, 0x620, 0x500),
    };
    c.pdpte[0] = 0x3001;
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC093, selector: 0x10 }; 6];
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xC09B, selector: 8 };
    c.seg[seg::FS].base = 0x10_0000;
    c.seg[seg::GS] = Segment { attr: 1 << 16, ..Segment::default() };
    c.rip = CODE;
    c.gpr[4] = 0x2_0000;
    c.refresh();
    p
}

#[test]
fn both_engines_run_it_alike() {
    for paging in [Paging::None, Paging::Legacy, Paging::Pae, Paging::Compatibility] {
        for budget in [7, 1009, 1 << 40] {
            let mut both = [EngineKind::Reference, EngineKind::Dbt].map(|e| machine(e, paging));
            loop {
                let [reference, dbt] = both.each_mut().map(|p| p.run(budget, &mut || false));
                let at = format!("{paging:?}, budget {budget}, instruction {}", both[0].core.retired());
                assert_eq!(reference, dbt, "{at}");
                let hashes = both.each_mut().map(|p| state_hash(&mut p.core));
                assert_eq!(hashes[0], hashes[1], "{at}");
                if reference.reason != reason::BUDGET {
                    break;
                }
                if both[0].core.retired() > 20_000 && budget < 100 {
                    break;
                }
            }
            let sums = both.each_ref().map(|p| p.core.mem.load(0x3_0000, 4));
            assert_eq!(sums[0], sums[1], "{paging:?}, budget {budget}");
        }
    }
}

#[test]
fn next_to_nothing_of_it_is_interpreted() {
    for paging in [Paging::None, Paging::Legacy, Paging::Pae, Paging::Compatibility] {
        let mut p = machine(EngineKind::Dbt, paging);
        p.run(1 << 40, &mut || false);
        assert_eq!(3 + LENGTH * ROUNDS, p.core.retired(), "{paging:?}");
        let interpreted = counter(&p, "interpreted");
        assert!(interpreted < 200, "{paging:?}: {interpreted} instructions interpreted");
    }
}

#[test]
fn what_has_a_limit_is_interpreted() {
    let mut p = machine(EngineKind::Dbt, Paging::Legacy);
    p.core.seg[seg::DS].limit = 0xF_FFFF;
    p.run(1 << 40, &mut || false);
    assert_eq!((3 + LENGTH * ROUNDS, 0), (p.core.retired(), counter(&p, "translated_blocks")));
}
