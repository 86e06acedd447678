//! Descriptor tables, gates and task states full of anything: whatever they hold, an instruction
//! that faults has changed no register, and one that succeeds leaves a consistent processor.

use proptest::prelude::*;

use crate::arch::bits::rflags;
use crate::arch::segment::seg;
use crate::cpu::event::{Event, Kind, deliver, deliver_or_raise};
use crate::cpu::state::{Core, Mode};
use crate::cpu::step::step;
use crate::cpu::testbed::*;
use crate::cpu::trap::Trap;

const ENTRIES: u64 = 18;

fn access() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => prop::sample::select(vec![
            0x9B_u64, 0x93, 0xFB, 0xF3, 0x9F, 0xFF, 0x97, 0x9A, 0x89, 0x8B, 0x81, 0x82, 0x8C, 0xEC,
            0x84, 0xE4, 0x85, 0xE5, 0xBB, 0xB3, 0x1B, 0x13,
        ]),
        1 => 0..=255u64,
    ]
}

/// A descriptor that is a segment or a gate, mostly a plausible one.
fn entry() -> impl Strategy<Value = u64> {
    let limit = prop_oneof![Just(0xF_FFFF_u64), Just(0x67), Just(0x2B), 0..0x1_0000u64];
    let base = prop_oneof![Just(0_u64), Just(TSS), Just(TSS2), 0..0x40_0000u64];
    let segment = (base, limit, access(), 0..16u64).prop_map(|(b, l, a, f)| descriptor(b, l, a, f));
    let gated = (selector(), 0..0x8000u64, access(), 0..4u64)
        .prop_map(|(s, offset, a, count)| gate(s, offset, a) | count << 32);
    prop_oneof![segment, gated]
}

fn selector() -> impl Strategy<Value = u16> {
    prop_oneof![9 => (0..ENTRIES as u16, 0..4u16).prop_map(|(i, rpl)| i << 3 | rpl), 1 => any::<u16>()]
}

fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let far = (prop::sample::select(vec![0x9A_u8, 0xEA]), selector()).prop_map(|(op, s)| {
        let [low, high] = s.to_le_bytes();
        vec![op, 0, 0x20, 0, 0, low, high]
    });
    // JMP and CALL through [4000], LSS and LFS from there.
    let indirect = prop::sample::select(vec![
        vec![0xFF, 0x2C, 0x25, 0, 0x40, 0, 0],
        vec![0xFF, 0x1C, 0x25, 0, 0x40, 0, 0],
        vec![0x0F, 0xB2, 0x04, 0x25, 0, 0x40, 0, 0],
        vec![0x0F, 0xB4, 0x04, 0x25, 0, 0x40, 0, 0],
    ]);
    let fixed = prop::sample::select(vec![
        vec![0xCF],
        vec![0x48, 0xCF],
        vec![0xCB],
        vec![0x48, 0xCB],
        vec![0xCA, 8, 0],
        vec![0xCD, 0x20],
        vec![0xCC],
        vec![0x8E, 0xD8],
        vec![0x8E, 0xD0],
        vec![0x8E, 0xE0],
        vec![0x0F, 0xA1],
        vec![0x0F, 0x00, 0xD0],
        vec![0x0F, 0x00, 0xD8],
        vec![0x0F, 0x02, 0xC8],
        vec![0x0F, 0x03, 0xC8],
        vec![0x0F, 0x00, 0xE0],
        vec![0x0F, 0x34],
        vec![0x0F, 0x35],
        vec![0x48, 0x0F, 0x07],
    ]);
    prop_oneof![far, indirect, fixed]
}

fn is_consistent(core: &Core) -> bool {
    let ss = core.seg[seg::SS];
    let level = core.mode == Mode::Real || ss.dpl() == core.cpl;
    let code = core.seg[seg::CS].rpl() == core.cpl || matches!(core.mode, Mode::Real | Mode::V86);
    level && code && core.rflags & rflags::FIXED1 != 0 && core.vectoring.is_none()
}

type Registers = ([u64; 16], u64, u64, [crate::arch::segment::Segment; 6], u8, u16);

fn registers(core: &Core) -> Registers {
    (core.gpr, core.rip, core.rflags, core.seg, core.cpl, core.tr.selector)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6000))]
    #[test]
    fn a_fault_changes_nothing_and_success_is_consistent(
        which in 0..4u8,
        table in prop::collection::vec((1..ENTRIES, entry()), 0..6),
        gates in prop::collection::vec(entry(), 4),
        tss in prop::collection::vec((0..26u64, selector()), 0..6),
        stack in prop::collection::vec(prop_oneof![
            2 => selector().prop_map(u64::from), 1 => 0..0x8000u64, 1 => any::<u64>()], 10),
        code in instruction(),
        rax in selector(),
        nt in any::<bool>(),
    ) {
        let mut core = match which {
            0 => protected(0),
            1 => protected(3),
            2 => long(0),
            _ => long(3),
        };
        let word = if core.is_long() { 8 } else { 4 };
        for (index, raw) in table {
            core.mem.store(GDT + 8 * index, 8, raw);
        }
        for (i, raw) in (0..).zip(gates) {
            let vector = [0x20, 3, 13, 0x40][i];
            core.mem.store(IDT + vector * if core.is_long() { 16 } else { 8 }, 8, raw);
        }
        for (field, value) in tss {
            core.mem.store(TSS + 4 * field, 4, u64::from(value));
            core.mem.store(TSS2 + 4 * field, 4, u64::from(value));
        }
        for (i, value) in stack.into_iter().enumerate() {
            core.mem.store(0x7000 + (i * word) as u64, word, value);
        }
        core.mem.store(0x4000, 4, 0x2000);
        core.mem.store(0x4004, 2, u64::from(rax));
        core.mem.write_bytes(0x1000, &code);
        core.gpr[0] = u64::from(rax);
        core.msr.sysenter_cs = u64::from(rax);
        if nt {
            core.rflags |= rflags::NT;
        }
        let before = registers(&core);
        match step(&mut core) {
            Ok(()) => prop_assert!(is_consistent(&core), "{:x?}", registers(&core)),
            Err(Trap::Exception(e)) if e.is_trap => {}
            Err(Trap::Exception(_)) => prop_assert_eq!(before, registers(&core)),
            Err(Trap::Stop(_)) => {}
            Err(t) => prop_assert!(false, "{t:?}"),
        }
        core.vectoring = None;
        let event = Event { vector: 0x40, kind: Kind::External, error: None, length: 0 };
        let before = registers(&core);
        match deliver(&mut core, event) {
            Ok(()) => prop_assert!(is_consistent(&core)),
            // A task switch that was committed has changed everything.
            Err(Trap::Exception(_)) if core.tr.selector == before.5 => {
                prop_assert_eq!(before, registers(&core));
            }
            Err(_) => {}
        }
        core.vectoring = None;
        let _ = deliver_or_raise(&mut core, event);
        prop_assert_eq!(None, core.vectoring);
    }
}
