//! The last x87 instruction's pointers, at every stop and under both engines.  (What images show of
//! them is compared with this computer's own processor by `differential.rs`.)

use silicon::arch::segment::{Segment, seg};
use silicon::cpu::pointers::Pointers;
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
        assert_eq!((CODE + 2, 8), (p.core.pointers.fip, p.core.pointers.fcs));
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
