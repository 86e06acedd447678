//! Whatever bytes a guest executes, the machine neither panics nor hangs.

use proptest::prelude::*;

use crate::arch::bits::rflags;
use crate::arch::exit::reason;
use crate::cpu::event;
use crate::cpu::state::Mode;
use crate::cpu::step::step;
use crate::cpu::testbed::{CODE0, long, protected, real, set_gate};
use crate::cpu::trap::Trap;
use crate::dbt::home::Home;

/// Registers that tend to be near something interesting.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        0x1F00..0x2100u64,
        0xFFF0..0x1_0010u64,
        0x3F_FFF0..0x40_0010u64,
        0xFFFF_FFF0..0x1_0000_0010u64,
        0x7FFF_FFFF_FFF0..0x8000_0000_0010u64,
        any::<u64>(),
    ]
}

fn machine(which: u8) -> Home {
    match which {
        0 => real(),
        1 => protected(0),
        2 => protected(3),
        3 => long(0),
        4 => long(3),
        5 => {
            let mut core = protected(0);
            core.seg[1].attr &= !(1 << 14);
            core.seg[2].attr &= !(1 << 14);
            core
        }
        _ => {
            let mut core = protected(3);
            core.rflags |= rflags::VM;
            for s in &mut core.seg {
                *s = crate::cpu::segment::v86_segment(s.selector >> 8);
            }
            core
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn random_instructions_end_in_an_exception_or_go_on(
        which in 0u8..7,
        prefix in prop::collection::vec(prop::sample::select(
            vec![0x66u8, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x48, 0x0F]), 0..4),
        code in prop::collection::vec(any::<u8>(), 1..24),
        regs in prop::array::uniform16(value()),
        flags in any::<u64>(),
        dr7 in prop_oneof![3 => Just(0x400u64), 1 => any::<u32>().prop_map(u64::from)],
        at in prop_oneof![Just(0x1800u64), Just(0x1FFB)],
    ) {
        let mut core = machine(which);
        for v in 0..32 {
            if core.mode == Mode::Real {
                core.mem.store(4 * u64::from(v), 4, 0x0000_1800);
            } else {
                set_gate(&core, v, CODE0, 0x1800, 0x8E00);
            }
        }
        core.gpr = regs;
        core.rip = at;
        core.rflags |= flags & (rflags::ARITH | rflags::DF | rflags::TF | rflags::AC | rflags::NT);
        core.dr[7] = dr7;
        core.dr[0] = at;
        core.dr[1] = regs[3];
        let bytes: Vec<u8> = prefix.iter().chain(&code).copied().collect();
        let base = if core.is_64() { 0 } else { core.seg[1].base };
        core.mem.write_bytes(base + at, &bytes);
        core.set_countdown(1_000_000);
        for _ in 0..64 {
            let before = core.countdown.get();
            let stop = match step(&mut core) {
                Ok(()) => { prop_assert_eq!(before - 1, core.countdown.get()); None }
                Err(Trap::Again) => { prop_assert_eq!(before, core.countdown.get()); None }
                Err(Trap::Exception(e)) => {
                    // A single-step trap comes after every element of a repeated instruction too.
                    let retired = before - core.countdown.get();
                    prop_assert!(retired == 0 || retired == 1 && e.is_trap);
                    event::raise(&mut core, e).err()
                }
                Err(t) => Some(t),
            };
            prop_assert!(core.rflags & rflags::FIXED1 != 0);
            match stop {
                None => {}
                Some(Trap::Stop(e)) => {
                    prop_assert!(e.reason >= reason::BUDGET);
                    return Ok(());
                }
                Some(t) => prop_assert!(false, "{t:?}"),
            }
        }
    }
}
