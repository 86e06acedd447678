//! Protection keys in code that runs hot: what PKRU, IA32_PKRS and XRSTOR change counts for the very next
//! instruction, under both engines, at every stop.

use silicon::arch::exit::reason;
use silicon::arch::segment::{Segment, seg};
use silicon::cpu::state::Clock;
use silicon::mem::Memory;
use silicon::processor::{EngineKind, Processor};
use silicon::snapshot::state_hash;

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const AREA: u64 = 0x3_0000;
const LOOPS: u64 = 300;

/// 64-bit code at a level; the page of DATA has key 1, and is the user's or, with `keyed_by_msr`, the supervisor's.
fn machine(engine: EngineKind, code: &[u8], cpl: u8, keyed_by_msr: bool) -> Processor {
    let mem = Memory::new(1 << 20).unwrap();
    mem.write_bytes(CODE, code);
    for (at, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
        mem.store(at, 8, value);
    }
    (0..255).for_each(|i| mem.store(0x4000 + 8 * i, 8, i << 12 | 7));
    mem.store(0x4000 + 8 * (DATA >> 12), 8, DATA | if keyed_by_msr { 3 } else { 7 } | 1 << 59);
    // An area for XRSTOR: PKRU with writes refused to key 1.
    mem.store(AREA + 512, 8, 1 << 9);
    mem.store(AREA + 520, 8, 1 << 63 | 1 << 9);
    mem.store(AREA + 576, 8, 8);
    let mut p = Processor::new(mem, engine, Clock::Virtual, 0).unwrap();
    let c = &mut *p.core;
    (c.cr0, c.cr3, c.cr4, c.efer) = (0x8001_0031, 0x1000, 0x144_0620, 0x500);
    (c.xcr0, c.cpl) = (0x203, cpl);
    let dpl = u32::from(cpl) << 5;
    c.seg = [Segment { base: 0, limit: u32::MAX, attr: 0xC093 | dpl, selector: 0x10 | u16::from(cpl) }; 6];
    c.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xA09B | dpl, selector: 8 | u16::from(cpl) };
    c.idtr.limit = 0;
    (c.rip, c.gpr[3], c.gpr[6], c.gpr[8]) = (CODE, DATA, AREA, LOOPS);
    c.refresh();
    p
}

/// Refuse writes, read, allow all, write back one more; so many times.  Then refuse and write.
fn program(refuse: &[u8], allow: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend(refuse);
    code.extend([0x4C, 0x8B, 0x0B]); // mov r9,[rbx]
    code.extend(allow);
    code.extend([0x49, 0xFF, 0xC1]); // inc r9
    code.extend([0x4C, 0x89, 0x0B]); // mov [rbx],r9
    code.extend([0x49, 0xFF, 0xC8]); // dec r8
    let back = -(code.len() as i32) - 6;
    code.extend([0x0F, 0x85]); // jnz
    code.extend(back.to_le_bytes());
    code.extend(refuse);
    code.extend([0x4C, 0x89, 0x13]); // mov [rbx],r10: refused
    code
}

#[test]
fn what_is_refused_from_now_on_is_refused_now() {
    // mov eax,8 or 0; xor ecx,ecx; xor edx,edx; wrpkru
    let pkru = |v: u8| vec![0xB8, v, 0, 0, 0, 0x31, 0xC9, 0x31, 0xD2, 0x0F, 0x01, 0xEF];
    // mov eax,200h; xor edx,edx; xrstor [rsi]
    let area = vec![0xB8, 0, 2, 0, 0, 0x31, 0xD2, 0x0F, 0xAE, 0x2E];
    // mov eax,8 or 0; mov ecx,6E1h; xor edx,edx; wrmsr
    let pkrs = |v: u8| vec![0xB8, v, 0, 0, 0, 0xB9, 0xE1, 6, 0, 0, 0x31, 0xD2, 0x0F, 0x30];
    let rows = [
        (program(&pkru(8), &pkru(0)), 3, false),
        (program(&pkru(8), &pkru(0)), 0, false),
        (program(&area, &pkru(0)), 3, false),
        (program(&pkrs(8), &pkrs(0)), 0, true),
    ];
    for (n, (code, cpl, by_msr)) in rows.iter().enumerate() {
        for pieces in [1, 7, 100, 100_000] {
            let ends = [EngineKind::Reference, EngineKind::Dbt].map(|kind| {
                let mut p = machine(kind, code, *cpl, *by_msr);
                let exit = loop {
                    let exit = p.run(pieces, &mut || false);
                    if exit.reason != reason::BUDGET {
                        break exit;
                    }
                };
                assert_eq!(reason::SHUTDOWN, exit.reason, "row {n}");
                assert_eq!(LOOPS, p.core.mem.load(DATA, 8), "row {n}, {kind:?}");
                assert_eq!(CODE + code.len() as u64 - 3, p.core.rip);
                state_hash(&mut p.core)
            });
            assert_eq!(ends[0], ends[1], "row {n}, by {pieces}");
        }
    }
}
