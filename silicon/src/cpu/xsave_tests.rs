//! The XSAVE feature set by the rules of its headers, its faults and its registers.  (What areas hold is compared
//! with the computer by `tests/xsave_native.rs`.)

use crate::arch::bits::{cr0, cr4};
use crate::arch::exception::vector;
use crate::cpu::state::{Core, Fx};
use crate::cpu::step::step;
use crate::cpu::testbed::{PML4, fault, long, protected};
use crate::cpu::trap::{Exec, Trap};
use crate::dbt::home::Home;

const AREA: u64 = 0x4_0000;
const GP0: (u8, Option<u32>) = (vector::GP, Some(0));
const UD: (u8, Option<u32>) = (vector::UD, None);
const COMPACTED: u64 = 1 << 63;

// All with [rdi].
const XSAVE: &[u8] = &[0x0F, 0xAE, 0x27];
const XRSTOR: &[u8] = &[0x0F, 0xAE, 0x2F];
const XSAVEOPT: &[u8] = &[0x0F, 0xAE, 0x37];
const XSAVEC: &[u8] = &[0x0F, 0xC7, 0x27];
const XSAVES: &[u8] = &[0x0F, 0xC7, 0x2F];
const XRSTORS: &[u8] = &[0x0F, 0xC7, 0x1F];
const XGETBV: &[u8] = &[0x0F, 0x01, 0xD0];
const XSETBV: &[u8] = &[0x0F, 0x01, 0xD1];

fn has_avx() -> bool {
    is_x86_feature_detected!("avx")
}

fn machine(cpl: u8) -> Home {
    let mut core = long(cpl);
    core.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    core.xcr0 = 0x203;
    core.gpr[7] = AREA;
    core
}

/// Run an instruction with EDX:EAX.
fn run(core: &mut Core, code: &[u8], components: u64) -> Exec<()> {
    core.rip = 0x1000;
    core.mem.write_bytes(0x1000, code);
    (core.gpr[0], core.gpr[2]) = (components & 0xFFFF_FFFF, components >> 32);
    step(core)
}

/// XSTATE_BV and XCOMP_BV.
fn header(core: &Core) -> [u64; 2] {
    [0x200, 0x208].map(|at| core.mem.load(AREA + at, 8))
}

fn set_header(core: &Core, words: [u64; 3]) {
    for (at, word) in (0x200..).step_by(8).zip(words) {
        core.mem.store(AREA + at, 8, word);
    }
}

#[test]
fn nothing_exists_before_the_system_says_so() {
    for code in [XSAVE, XRSTOR, XSAVEOPT, XSAVEC, XSAVES, XRSTORS, XGETBV, XSETBV] {
        let mut core = machine(0);
        core.cr4 &= !cr4::OSXSAVE;
        core.gpr[1] = 0;
        assert_eq!(UD, fault(run(&mut core, code, 1)), "{code:x?}");
    }
}

#[test]
fn xcr0_takes_components_that_there_are_and_always_x87() {
    for (value, is_fine) in [
        (1, true),
        (3, true),
        (0x203, true),
        (0x201, true),
        (2, false),
        (0, false),
        (7, has_avx()),
        (5, false),
        (1 << 32 | 1, false),
    ] {
        let mut core = machine(0);
        core.gpr[1] = 0xFFFF_FFFF_0000_0000;
        let result = run(&mut core, XSETBV, value);
        assert_eq!(if is_fine { value } else { 0x203 }, core.xcr0);
        assert_eq!(is_fine, result.is_ok(), "{value:x}");
    }
    let mut core = machine(0);
    core.gpr[1] = 1;
    assert_eq!(GP0, fault(run(&mut core, XSETBV, 1)));
    let mut core = machine(3);
    core.gpr[1] = 0;
    assert_eq!(GP0, fault(run(&mut core, XSETBV, 1)));
    run(&mut core, XGETBV, u64::MAX).unwrap();
    assert_eq!((0x203, 0), (core.gpr[0], core.gpr[2]));
    core.gpr[1] = 2;
    assert_eq!(GP0, fault(run(&mut core, XGETBV, 0)));
}

#[test]
fn xgetbv_1_tells_what_is_in_use() {
    type Change = fn(&mut Core);
    let rows: [(Change, u64); 7] = [
        (|_| {}, 0),
        (|c| c.fx.0[32] = 1, 1),
        (|c| c.pointers.fip = 1, 1),
        (|c| c.fx.0[160 + 255] = 1, 2),
        (|c| c.fx.set_mxcsr(0x1F81), 2),
        (|c| c.pkru = 4, 0x200),
        (|c| c.upper.change(|halves| halves[15][15] = 1), 4),
    ];
    for (change, expected) in rows {
        let mut core = machine(3);
        core.xcr0 = 0x207;
        change(&mut core);
        core.gpr[1] = 1;
        run(&mut core, XGETBV, 0).unwrap();
        assert_eq!(expected, core.gpr[0]);
    }
}

#[test]
fn pkru_has_a_place_in_each_format() {
    for (code, at, expected) in [
        (XSAVE, 2688, [0x200, 0]),
        (XSAVEOPT, 2688, [0x200, 0]),
        (XSAVEC, 576, [0x200, COMPACTED | 0x203]),
        (XSAVES, 576, [0x200, COMPACTED | 0x203]),
    ] {
        let mut core = machine(0);
        core.pkru = 0x5555_5554;
        core.mem.store(AREA + at, 8, u64::MAX);
        run(&mut core, code, u64::MAX).unwrap();
        assert_eq!(expected, header(&core), "{code:x?}");
        assert_eq!(0x5555_5554, core.mem.load(AREA + at, 8));
        core.pkru = 0;
        core.fx.0[170] = 9;
        run(&mut core, XRSTOR, u64::MAX).unwrap();
        assert_eq!((0x5555_5554, Fx::at_reset()), (core.pkru, core.fx));
        run(&mut core, XRSTOR, 0x200).unwrap();
        set_header(&core, [0, header(&core)[1], 0]);
        run(&mut core, XRSTOR, 3).unwrap();
        assert_eq!(0x5555_5554, core.pkru);
        run(&mut core, XRSTOR, 0x200).unwrap();
        assert_eq!(0, core.pkru);
    }
}

#[test]
fn upper_halves_have_a_place_before_pkru() {
    for (code, pkru_at, xcomp) in [
        (XSAVE, 2688, 0),
        (XSAVEOPT, 2688, 0),
        (XSAVEC, 832, COMPACTED | 0x207),
        (XSAVES, 832, COMPACTED | 0x207),
    ] {
        let mut core = machine(0);
        core.xcr0 = 0x207;
        core.pkru = 4;
        let filled = std::array::from_fn(|i| [i as u8 + 1; 16]);
        core.upper.change(|halves| *halves = filled);
        run(&mut core, code, u64::MAX).unwrap();
        assert_eq!([0x204, xcomp], header(&core), "{code:x?}");
        assert_eq!(4, core.mem.load(AREA + pkru_at, 8));
        assert_eq!(0x1010_1010_1010_1010, core.mem.load(AREA + 576 + 248, 8));
        core.upper.change(|halves| *halves = [[9; 16]; 16]);
        core.pkru = 0;
        run(&mut core, XRSTOR, 3).unwrap();
        assert_eq!([[9; 16]; 16], core.upper.all());
        run(&mut core, XRSTOR, u64::MAX).unwrap();
        assert_eq!((filled, 4), (core.upper.all(), core.pkru));
        set_header(&core, [0, xcomp, 0]);
        run(&mut core, XRSTOR, 4).unwrap();
        assert_eq!([[0; 16]; 16], core.upper.all());
    }
    // Without them PKRU is where they would be.
    let mut core = machine(0);
    (core.xcr0, core.pkru) = (0x207, 4);
    run(&mut core, XSAVEC, 0x203).unwrap();
    assert_eq!(4, core.mem.load(AREA + 576, 8));
}

#[test]
fn mxcsr_goes_with_the_upper_halves_in_the_standard_format() {
    let mut core = machine(3);
    core.xcr0 = 7;
    core.fx.set_mxcsr(0x1FA0);
    run(&mut core, XSAVE, 4).unwrap();
    assert_eq!(0x1FA0, core.mem.load(AREA + 24, 4));
    core.mem.store(AREA + 24, 4, 0x1F81);
    run(&mut core, XRSTOR, 4).unwrap();
    assert_eq!(0x1F81, core.fx.mxcsr());
    core.mem.store(AREA + 24, 4, 0x1_0000);
    assert_eq!(GP0, fault(run(&mut core, XRSTOR, 4)));
    set_header(&core, [4, COMPACTED | 7, 0]);
    run(&mut core, XRSTOR, 4).unwrap();
    run(&mut core, XSAVEC, 4).unwrap();
    assert_eq!((0x1F81, 0x1_0000), (core.fx.mxcsr(), core.mem.load(AREA + 24, 4)));
}

#[test]
fn a_header_that_says_what_cannot_be_is_refused() {
    // (instruction, XSTATE_BV, XCOMP_BV, next word, whether it is taken)
    let rows: [(&[u8], [u64; 3], bool); 13] = [
        (XRSTOR, [0x203, 0, 0], true),
        (XRSTOR, [4, 0, 0], false),
        (XRSTOR, [COMPACTED, 0, 0], false),
        (XRSTOR, [3, 1, 0], false),
        (XRSTOR, [3, 0, 1], false),
        (XRSTOR, [1, COMPACTED | 3, 0], true),
        (XRSTOR, [3, COMPACTED | 1, 0], false),
        (XRSTOR, [1, COMPACTED | 7, 0], false),
        (XRSTOR, [COMPACTED | 1, COMPACTED | 3, 0], false),
        (XRSTOR, [1, COMPACTED | 3, 1], false),
        (XRSTORS, [1, COMPACTED | 3, 0], true),
        (XRSTORS, [1, 0, 0], false),
        (XRSTORS, [1, COMPACTED | 0x103, 0], false),
    ];
    for (code, words, is_fine) in rows {
        let mut core = machine(0);
        core.mem.store(AREA + 24, 4, 0x1F80);
        set_header(&core, words);
        let result = run(&mut core, code, u64::MAX);
        if is_fine { result.unwrap() } else { assert_eq!(GP0, fault(result), "{words:x?}") }
    }
    // The last word of the header: of the compacted format alone.
    for (xcomp, is_fine) in [(0, true), (COMPACTED | 3, false)] {
        let mut core = machine(3);
        set_header(&core, [0, xcomp, 0]);
        core.mem.store(AREA + 0x238, 8, 1);
        assert_eq!(is_fine, run(&mut core, XRSTOR, u64::MAX).is_ok());
    }
}

#[test]
fn reserved_bits_of_mxcsr_are_refused_where_it_is_loaded() {
    for (xstate, xcomp, wanted, is_fine) in [
        (3, 0, 3, false),
        (0, 0, 2, false), // the standard format has it in any case
        (0, 0, 1, true),
        (1, COMPACTED | 3, 3, true),
        (2, COMPACTED | 3, 3, false),
    ] {
        let mut core = machine(3);
        core.fx.set_mxcsr(0x1FA0);
        core.mem.store(AREA + 24, 4, 0x1_0000);
        set_header(&core, [xstate, xcomp, 0]);
        let result = run(&mut core, XRSTOR, wanted);
        assert_eq!(is_fine, result.is_ok(), "{xstate:x} {xcomp:x} {wanted:x}");
        let expected = if is_fine && wanted & 2 != 0 { 0x1F80 } else { 0x1FA0 };
        assert_eq!(expected, core.fx.mxcsr());
    }
}

#[test]
fn faults_come_in_the_manuals_order_and_change_nothing() {
    for code in [XSAVE, XRSTOR, XSAVEC, XSAVES, XRSTORS] {
        let mut core = machine(0);
        core.gpr[7] = AREA + 16;
        assert_eq!(GP0, fault(run(&mut core, code, 3)), "not aligned");
        core.cr0 |= cr0::TS;
        assert_eq!((vector::NM, None), fault(run(&mut core, code, 3)));
        core.cr0 = core.cr0 & !cr0::TS | cr0::EM;
        core.gpr[7] = AREA;
        if code != XRSTORS {
            run(&mut core, code, 3).unwrap(); // CR0.EM is nothing to these
        }
    }
    for code in [XSAVES, XRSTORS] {
        assert_eq!(GP0, fault(run(&mut machine(3), code, 3)));
    }
    // The area ends where the mapped pages do: with PKRU it reaches beyond them.
    let mut core = machine(3);
    core.gpr[7] = (4 << 20) - 1024;
    core.pkru = 4;
    core.fx.0[40] = 7;
    run(&mut core, XSAVE, 3).unwrap();
    core.mem.store((4 << 20) - 1024 + 40, 8, 0);
    assert_eq!((vector::PF, Some(6)), fault(run(&mut core, XSAVE, u64::MAX)));
    assert_eq!(0, core.mem.load((4 << 20) - 1024 + 40, 8));
}

#[test]
fn upper_registers_are_of_64_bit_code_alone() {
    let mut core = protected(3);
    core.cr4 |= cr4::OSXSAVE;
    (core.xcr0, core.gpr[7]) = (3, AREA);
    core.fx.0[160..416].fill(5);
    core.upper.change(|halves| *halves = [[6; 16]; 16]);
    core.mem.store(AREA + 288, 8, 0x77);
    run(&mut core, XSAVE, 3).unwrap();
    assert_eq!((0x0505_0505_0505_0505, 0x77), (core.mem.load(AREA + 280, 8), core.mem.load(AREA + 288, 8)));
    set_header(&core, [0, 0, 0]);
    run(&mut core, XRSTOR, 2).unwrap();
    assert_eq!((0, 5), (core.fx.0[287], core.fx.0[288]));
    core.xcr0 = 7;
    core.mem.store(AREA + 576 + 128, 8, 0x77);
    run(&mut core, XSAVE, 4).unwrap();
    let at = |at: u64| core.mem.load(AREA + at, 8);
    assert_eq!((0x0606_0606_0606_0606, 0x77), (at(576 + 120), at(576 + 128)));
    set_header(&core, [0, 0, 0]);
    run(&mut core, XRSTOR, 4).unwrap();
    let halves = core.upper.all();
    assert_eq!(([0; 16], [6; 16]), (halves[7], halves[8]));
}

#[test]
fn cpuid_follows_what_is_enabled() {
    let cpuid = &[0x0F, 0xA2];
    let mut core = machine(3);
    for (subleaf, words) in [(0, [0x203, 1, 2696, 0]), (1, [0xF, 1, 0, 0])] {
        core.cpuid.insert((0xD, subleaf), words);
    }
    core.cpuid.insert((1, 0), [0, 0, 1 << 26, 0]);
    for (xcr0, standard, compacted) in
        [(1, 576, 576), (3, 576, 576), (0x203, 2696, 584), (7, 832, 832), (0x207, 2696, 840)]
    {
        core.xcr0 = xcr0;
        for (subleaf, size) in [(0, standard), (1, compacted)] {
            core.gpr[1] = subleaf;
            run(&mut core, cpuid, 0xD).unwrap();
            assert_eq!(size, core.gpr[3]);
        }
    }
    run(&mut core, cpuid, 1).unwrap();
    assert_eq!(3 << 26, core.gpr[1]);
    core.cr4 &= !cr4::OSXSAVE;
    run(&mut core, cpuid, 1).unwrap();
    assert_eq!(1 << 26, core.gpr[1]);
}

/// As on this computer, which the fuzz compares it with: here the header is mapped, and what is before is not.
#[test]
fn the_first_page_is_tried_whatever_is_saved() {
    for code in [XSAVE, XRSTOR, XSAVEOPT, XSAVEC] {
        for components in [0, 1] {
            let at = 0x20_0000 - 512;
            let mut core = machine(0);
            core.mem.store(PML4 + 0x2000, 8, (PML4 + 0x3000) | 7);
            (0..511).for_each(|i| core.mem.store(PML4 + 0x3000 + 8 * i, 8, i << 12 | 7));
            core.gpr[7] = at;
            let end = run(&mut core, code, components);
            let Err(Trap::Exception(e)) = end else { panic!("{code:x?}: {end:?}") };
            assert_eq!((vector::PF, at), (e.vector, e.payload), "{code:x?}");
        }
    }
}

#[test]
fn alignment_comes_before_the_segment() {
    for (rbp, expected) in [(1 << 63, (vector::SS, Some(0))), (1 << 63 | 8, GP0)] {
        let mut core = machine(0);
        core.gpr[5] = rbp;
        assert_eq!(expected, fault(run(&mut core, &[0x0F, 0xAE, 0x65, 0], 3)));
    }
}

#[test]
fn all_sixteen_registers_are_in_use_in_every_mode() {
    let mut core = protected(3);
    core.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
    (core.xcr0, core.gpr[1]) = (3, 1);
    core.fx.0[160 + 255] = 1;
    run(&mut core, XGETBV, 0).unwrap();
    assert_eq!(2, core.gpr[0]);
}
