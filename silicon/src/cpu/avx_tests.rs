//! Rows of AVX code against known results, the conditions under which there is none, and what masked moves
//! and gathers leave when they fault.  (Arithmetic is the computer's, and compared with it by the fuzz.)

use crate::arch::bits::{cr0, cr4, rflags};
use crate::arch::exception::{Exception, vector};
use crate::cpu::state::{Core, Mode};
use crate::cpu::step::step;
use crate::cpu::testbed::{fault, long, protected, real};
use crate::cpu::trap::{Exec, Trap};
use crate::dbt::home::Home;

const DATA: u64 = 0x2_0000;
/// Where the mapped pages end.
const END: u64 = 4 << 20;
const UD: (u8, Option<u32>) = (vector::UD, None);

const VPXOR: &[u8] = &[0xC5, 0xF5, 0xEF, 0xC9]; // vpxor ymm1, ymm1, ymm1
const LOAD: &[u8] = &[0xC4, 0xE2, 0x6D, 0x2C, 0x0E]; // vmaskmovps ymm1, ymm2, [rsi]
const STORE: &[u8] = &[0xC4, 0xE2, 0x6D, 0x2E, 0x0E]; // vmaskmovps [rsi], ymm2, ymm1
const GATHER: &[u8] = &[0xC4, 0xE2, 0x6D, 0x90, 0x0C, 0x9E]; // vpgatherdd ymm1, [rsi + ymm3 * 4], ymm2

fn is_here() -> bool {
    is_x86_feature_detected!("avx2")
}

fn ready(mut core: Home) -> Home {
    core.cr4 |= cr4::OSFXSR | cr4::OSXSAVE | cr4::OSXMMEXCPT;
    core.xcr0 = 7;
    core.gpr[6] = DATA;
    core
}

fn machine() -> Home {
    ready(long(3))
}

fn run(core: &mut Core, code: &[u8]) -> Exec<()> {
    core.rip = 0x1000;
    assert!(core.mem.write_bytes(0x1000, code));
    step(core)
}

fn words(of: [u32; 8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.as_chunks_mut::<4>().0.iter_mut().zip(of).for_each(|(b, w)| *b = w.to_le_bytes());
    bytes
}

fn memory(core: &Core, at: u64, of: [u32; 8]) {
    for (i, word) in (0..).zip(of) {
        core.mem.store(at + 4 * i, 4, word.into());
    }
}

/// A page fault's address.
fn page_fault(result: Exec<()>) -> u64 {
    match result {
        Err(Trap::Exception(Exception { vector: vector::PF, payload, .. })) => payload,
        other => panic!("expected a page fault, got {other:?}"),
    }
}

#[test]
fn there_is_none_before_the_system_says_so() {
    if !is_here() {
        return;
    }
    type Change = fn(&mut Core);
    let rows: [(Change, Option<u8>); 7] = [
        (|_| {}, None),
        (|c| c.cr4 &= !cr4::OSXSAVE, Some(vector::UD)),
        (|c| c.xcr0 = 3, Some(vector::UD)),
        (|c| c.cr0 |= cr0::TS, Some(vector::NM)),
        (|c| (c.cr0, c.xcr0) = (c.cr0 | cr0::TS, 3), Some(vector::UD)),
        (|c| c.cr0 |= cr0::EM, None),
        (|c| c.cr4 &= !cr4::OSFXSR, None),
    ];
    for code in [VPXOR, &[0xC5, 0xF8, 0x77], &[0xC5, 0xF8, 0xAE, 0x1E], LOAD, GATHER] {
        for (i, (change, expected)) in rows.iter().enumerate() {
            let mut core = machine();
            change(&mut core);
            let end = run(&mut core, code);
            match expected {
                Some(v) => assert_eq!((*v, None), fault(end), "{code:x?}, row {i}"),
                None => assert_eq!(Ok(()), end, "{code:x?}, row {i}"),
            }
        }
        let mut core = ready(protected(3));
        assert_eq!(Ok(()), run(&mut core, code));
        (core.rflags, core.mode) = (core.rflags | rflags::VM, Mode::V86);
        assert_eq!(UD, fault(run(&mut core, code)));
        assert_eq!(UD, fault(run(&mut ready(real()), code)));
    }
}

#[test]
fn prefixes_before_vex_are_refused_and_so_is_evex() {
    for prefix in [0xF0, 0x66, 0xF2, 0xF3, 0x48] {
        assert_eq!(UD, fault(run(&mut machine(), &[&[prefix], VPXOR].concat())), "{prefix:x}");
    }
    assert_eq!(UD, fault(run(&mut machine(), &[0x62, 0xF1, 0x7C, 0x48, 0x58, 0xC1]))); // vaddps zmm0, …
    // vzeroupper with a second source that it has not: vvvv
    assert_eq!(UD, fault(run(&mut machine(), &[0xC5, 0xF0, 0x77])));
}

#[test]
fn short_forms_clear_the_upper_half_and_sse_keeps_it() {
    if !is_here() {
        return;
    }
    let mut core = machine();
    for i in 0..16 {
        core.set_ymm(i, &[i as u8 + 1; 32]);
    }
    run(&mut core, &[0x66, 0x0F, 0xFC, 0xD3]).unwrap(); // paddb xmm2, xmm3
    assert_eq!(([7; 16], [3; 16]), (core.fx.xmm(2), core.upper.all()[2]));
    run(&mut core, &[0xC5, 0xE1, 0xFC, 0xD4]).unwrap(); // vpaddb xmm2, xmm3, xmm4
    assert_eq!(([9; 16], [0; 16]), (core.fx.xmm(2), core.upper.all()[2]));
    memory(&core, DATA, [0x0101_0101; 8]);
    run(&mut core, &[0xC5, 0xE5, 0xFC, 0x16]).unwrap(); // vpaddb ymm2, ymm3, [rsi]
    assert_eq!([5; 32], core.ymm(2));
    assert_eq!([16; 32], core.ymm(15));
}

#[test]
fn code_of_32_bits_has_eight_registers_to_clear() {
    for is_all in [false, true] {
        for is_64 in [false, true] {
            let mut core = if is_64 { machine() } else { ready(protected(3)) };
            (0..16).for_each(|i| core.set_ymm(i, &[0x55; 32]));
            if run(&mut core, &[0xC5, if is_all { 0xFC } else { 0xF8 }, 0x77]).is_err() {
                assert!(!is_here());
                return;
            }
            for i in 0..16 {
                let is_reached = is_64 || i < 8;
                let half = |is_clear: bool| if is_clear { [0; 16] } else { [0x55; 16] };
                let expected = (half(is_reached && is_all), half(is_reached));
                assert_eq!(expected, (core.fx.xmm(i), core.upper.all()[i]), "{is_all} {is_64} {i}");
            }
        }
    }
}

#[test]
fn only_aligned_moves_ask_for_alignment() {
    if !is_here() {
        return;
    }
    let mut core = machine();
    core.gpr[6] = 0x4000_0010;
    assert_eq!((vector::GP, Some(0)), fault(run(&mut core, &[0xC5, 0xFC, 0x28, 0x0E]))); // vmovaps
    assert_eq!((vector::PF, Some(4)), fault(run(&mut core, &[0xC5, 0xFC, 0x10, 0x0E]))); // vmovups
    core.gpr[6] = DATA + 1;
    assert_eq!(Ok(()), run(&mut core, &[0xC5, 0xFC, 0x10, 0x0E]));
}

#[test]
fn an_unmasked_exception_is_xm_and_keeps_the_registers() {
    if !is_here() {
        return;
    }
    let mut core = machine();
    core.set_ymm(1, &words([0, 0, 0, 0, 0, 0, 0, 0x3F80_0000]));
    core.fx.set_mxcsr(0x1F80 & !(1 << 7));
    let divide = [0xC5, 0xFC, 0x5E, 0xC1]; // vdivps ymm0, ymm0, ymm1: 0/0 but for the last
    assert_eq!((vector::XM, None), fault(run(&mut core, &divide)));
    assert_eq!((1, [0; 32]), (core.fx.mxcsr() & 0x3F, core.ymm(0)));
    core.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(UD, fault(run(&mut core, &divide)));
}

#[test]
fn what_a_mask_leaves_out_is_not_accessed() {
    if !is_here() {
        return;
    }
    // Four elements before the end of the mapped pages, four behind it.
    let mut core = machine();
    core.gpr[6] = END - 16;
    memory(&core, END - 32, [1, 2, 3, 4, 5, 6, 7, 8]);
    core.set_ymm(2, &words([1 << 31, 0, 1 << 31, u32::MAX, 0, 0x7FFF_FFFF, 0, 0]));
    core.set_ymm(1, &[9; 32]);
    run(&mut core, LOAD).unwrap();
    assert_eq!(words([5, 0, 7, 8, 0, 0, 0, 0]), core.ymm(1));
    core.set_ymm(1, &words([50, 60, 70, 80, 0, 0, 0, 0]));
    run(&mut core, STORE).unwrap();
    assert_eq!([50, 6, 70, 80], [0, 4, 8, 12].map(|at| core.mem.load(END - 16 + at, 4)));
    // One of those behind: neither a register nor memory changes.
    core.set_ymm(2, &words([1 << 31, 0, 0, 0, 0, 0, 1 << 31, 0]));
    core.set_ymm(1, &words([500; 8]));
    assert_eq!(END + 8, page_fault(run(&mut core, STORE)));
    assert_eq!(50, core.mem.load(END - 16, 4));
    assert_eq!(END + 8, page_fault(run(&mut core, LOAD)));
    assert_eq!(words([500; 8]), core.ymm(1));
    // Of nothing at all: not even an address that is none.
    core.set_ymm(2, &[0x7F; 32]);
    core.gpr[6] = 1 << 63;
    assert_eq!((Ok(()), Ok(())), (run(&mut core, STORE), run(&mut core, LOAD)));
    assert_eq!([0; 32], core.ymm(1));
}

#[test]
fn masked_moves_and_gathers_need_no_alignment() {
    if !is_here() {
        return;
    }
    for code in [LOAD, STORE, GATHER] {
        let mut core = machine();
        core.gpr[6] = DATA + 1;
        (core.cr0, core.rflags) = (core.cr0 | cr0::AM, core.rflags | rflags::AC);
        core.set_ymm(2, &[0xFF; 32]);
        assert_eq!(Ok(()), run(&mut core, code));
    }
}

#[test]
fn a_gather_keeps_what_it_has_done() {
    if !is_here() {
        return;
    }
    let mut core = machine();
    core.gpr[6] = END - 32;
    memory(&core, END - 32, [10, 11, 12, 13, 14, 15, 16, 17]);
    let mask = [1 << 31, 0, 1 << 31, 1 << 31, 1 << 31, 0, 0, 1 << 31];
    core.set_ymm(2, &words(mask));
    core.set_ymm(3, &words([7, 0, 5, 8, 0, 0, 0, u32::MAX])); // the fourth is beyond the end
    core.set_ymm(1, &words([1; 8]));
    assert_eq!(END, page_fault(run(&mut core, GATHER)));
    assert_eq!(words([17, 1, 15, 1, 1, 1, 1, 1]), core.ymm(1));
    assert_eq!(words([0, 0, 0, 1 << 31, 1 << 31, 0, 0, 1 << 31]), core.ymm(2));
    // Again, when the handler has seen to it.
    core.set_ymm(3, &words([7, 0, 5, 2, 0, 0, 0, u32::MAX]));
    core.mem.store(END - 36, 4, 9);
    run(&mut core, GATHER).unwrap();
    assert_eq!((words([17, 1, 15, 12, 10, 1, 1, 9]), [0; 32]), (core.ymm(1), core.ymm(2)));
    // A short one: what is beyond its elements is zero.
    core.set_ymm(2, &[0xFF; 32]);
    core.set_ymm(3, &[0; 32]);
    run(&mut core, &[0xC4, 0xE2, 0x69, 0x91, 0x0C, 0x1E]).unwrap(); // vpgatherqd xmm1, [rsi + xmm3], xmm2
    assert_eq!((words([10, 10, 0, 0, 0, 0, 0, 0]), [0; 32]), (core.ymm(1), core.ymm(2)));
}

#[test]
fn mxcsr_and_bytes_by_a_mask_have_vex_forms() {
    if !is_here() {
        return;
    }
    let mut core = machine();
    core.mem.store(DATA, 4, 0x1FA0);
    run(&mut core, &[0xC5, 0xF8, 0xAE, 0x16]).unwrap(); // vldmxcsr [rsi]
    assert_eq!(0x1FA0, core.fx.mxcsr());
    run(&mut core, &[0xC5, 0xF8, 0xAE, 0x5E, 4]).unwrap(); // vstmxcsr [rsi + 4]
    assert_eq!(0x1FA0, core.mem.load(DATA + 4, 4));
    core.mem.store(DATA, 4, 1 << 16);
    assert_eq!((vector::GP, Some(0)), fault(run(&mut core, &[0xC5, 0xF8, 0xAE, 0x16])));
    core.gpr[7] = DATA + 8;
    core.set_ymm(0, &[7; 32]);
    core.set_ymm(1, &words([0x8000, 0, 0, 0, 0, 0, 0, 0]));
    run(&mut core, &[0xC5, 0xF9, 0xF7, 0xC1]).unwrap(); // vmaskmovdqu xmm0, xmm1
    assert_eq!(0x0700, core.mem.load(DATA + 8, 8));
}
