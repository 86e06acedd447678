//! Rows of x87 and SSE code against known results, and the order of their exceptions.

use crate::arch::bits::{cr0, cr4};
use crate::arch::exception::vector;
use crate::cpu::pointers::habits;
use crate::cpu::state::{Core, Fx};
use crate::cpu::step::step;
use crate::cpu::testbed::{fault, long, protected};
use crate::dbt::home::Home;

const DATA: u64 = 0x2_0000;
/// SUB, UM, … : every exception masked.
const MASKED: u32 = 0x1F80;

fn machine() -> Home {
    ready(long(3))
}

fn ready(mut core: Home) -> Home {
    core.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
    core.cr0 |= cr0::MP | cr0::NE;
    core.gpr[6] = DATA;
    core.gpr[7] = DATA + 0x100;
    core
}

fn load(core: &mut Core, code: &[u8]) {
    let at = core.rip;
    assert!(core.mem.write_bytes(at, code));
}

fn run(core: &mut Core, code: &[u8], n: usize) {
    load(core, code);
    for i in 0..n {
        if let Err(t) = step(core) {
            panic!("instruction {i} at {:#x}: {t:?}", core.rip);
        }
    }
}

fn put(core: &Core, offset: u64, bytes: &[u8]) {
    assert!(core.mem.write_bytes(DATA + offset, bytes));
}

fn get<const N: usize>(core: &Core, offset: u64) -> [u8; N] {
    let mut out = [0; N];
    assert!(core.mem.read_bytes(DATA + offset, &mut out));
    out
}

#[test]
fn x87_divides_in_every_mode() {
    // fninit; fld1; fidiv dword [rsi]; fstp qword [rdi]; fnstsw ax
    for mut core in [machine(), ready(protected(3)), ready(protected(0))] {
        put(&core, 0, &8_u32.to_le_bytes());
        let code = [0xDB, 0xE3, 0xD9, 0xE8, 0xDA, 0x36, 0xDD, 0x1F, 0xDF, 0xE0];
        run(&mut core, &code, 5);
        assert_eq!(0.125_f64.to_le_bytes(), get(&core, 0x100));
        assert_eq!(0, core.gpr[0] & 0xFFFF);
    }
}

#[test]
fn vectors_add_and_general_registers_take_part() {
    // movdqa xmm9,[rsi]; paddd xmm9,xmm9; movdqu [rdi+1],xmm9; movd r13d,xmm9; cvtsi2sd xmm0,rsp
    let mut core = machine();
    put(&core, 0, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0x80]);
    core.gpr[4] = 3;
    core.gpr[13] = u64::MAX;
    let code = [
        0x66, 0x44, 0x0F, 0x6F, 0x0E, 0x66, 0x45, 0x0F, 0xFE, 0xC9, 0xF3, 0x44, 0x0F, 0x7F, 0x4F, 1, 0x66,
        0x45, 0x0F, 0x7E, 0xCD, 0xF2, 0x48, 0x0F, 0x2A, 0xC4,
    ];
    run(&mut core, &code, 5);
    assert_eq!([2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0], get::<16>(&core, 0x101));
    assert_eq!(2, core.gpr[13]);
    assert_eq!(3.0_f64.to_le_bytes(), core.fx.xmm(0)[..8]);
}

#[test]
fn comparisons_set_the_flags_and_nothing_else() {
    // comisd xmm0,xmm1 with a NaN: ZF PF CF
    let mut core = machine();
    core.fx.0[160..168].copy_from_slice(&f64::NAN.to_le_bytes());
    core.rflags |= 1 << 11 | 1 << 9;
    run(&mut core, &[0x66, 0x0F, 0x2F, 0xC1], 1);
    assert_eq!(1 << 9 | 0x45 | 2, core.rflags);
}

#[test]
fn a_misaligned_operand_is_refused_before_its_page_is_looked_at() {
    // movaps xmm0,[rsi]
    let mut core = machine();
    core.gpr[6] = 0x4000_0008;
    load(&mut core, &[0x0F, 0x28, 0x06]);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
    core.gpr[6] = 0x4000_0000;
    assert_eq!((vector::PF, Some(4)), fault(step(&mut core)));
}

#[test]
fn the_control_registers_refuse_in_the_manuals_order() {
    let sse = [0x0F, 0x58, 0xC1];
    let mmx = [0x0F, 0xFC, 0xC1];
    let x87 = [0xD9, 0xE8];
    let wait = [0x9B];
    let rows: [(u64, u64, &[u8], Option<u8>); 9] = [
        (cr0::EM | cr0::TS, 0, &sse, Some(vector::UD)),
        (cr0::TS, 0, &sse, Some(vector::NM)),
        (cr0::EM | cr0::TS, 0, &mmx, Some(vector::UD)),
        (cr0::TS, 0, &mmx, Some(vector::NM)),
        (cr0::EM, 0, &x87, Some(vector::NM)),
        (cr0::TS, 0, &wait, Some(vector::NM)),
        (cr0::EM, 0, &wait, None),
        (0, cr4::OSFXSR, &sse, Some(vector::UD)),
        (0, cr4::OSFXSR, &mmx, None),
    ];
    for (set, clear, code, expected) in rows {
        let mut core = machine();
        core.cr0 |= set;
        core.cr4 &= !clear;
        load(&mut core, code);
        match expected {
            Some(v) => assert_eq!((v, None), fault(step(&mut core)), "{code:x?} {set:x}"),
            None => assert_eq!(Ok(()), step(&mut core), "{code:x?} {set:x}"),
        }
    }
}

#[test]
fn an_unmasked_simd_exception_is_xm_with_its_flag_set() {
    // divps xmm0,xmm1: 0/0
    let mut core = machine();
    core.fx.set_mxcsr(MASKED & !(1 << 7));
    load(&mut core, &[0x0F, 0x5E, 0xC1]);
    assert_eq!((vector::XM, None), fault(step(&mut core)));
    assert_eq!((1, 0x1000), (core.fx.mxcsr() & 0x3F, core.rip));
    core.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!((vector::UD, None), fault(step(&mut core)));
    core.fx.set_mxcsr(MASKED);
    assert_eq!(Ok(()), step(&mut core));
    assert_eq!([0, 0, 0xC0, 0xFF], core.fx.xmm(0)[..4]);
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    // fldcw [rsi]; fldz; fld1; fdiv st,st(1); fnstsw ax; fwait
    let mut core = machine();
    put(&core, 0, &0x037B_u16.to_le_bytes()); // zero-divide not masked
    let code = [0xD9, 0x2E, 0xD9, 0xEE, 0xD9, 0xE8, 0xD8, 0xF1, 0xDF, 0xE0, 0x9B];
    run(&mut core, &code, 5);
    assert_eq!(0x8084, core.gpr[0] & 0x80FF);
    assert_eq!((vector::MF, None), fault(step(&mut core)));
    load(&mut core, &[0xD9, 0xE8]);
    assert_eq!((vector::MF, None), fault(step(&mut core)));
    load(&mut core, &[0x0F, 0x77]);
    assert_eq!((vector::MF, None), fault(step(&mut core)));
    load(&mut core, &[0x0F, 0x58, 0xC1]);
    assert_eq!(Ok(()), step(&mut core));
}

#[test]
fn a_store_with_an_unmasked_exception_leaves_memory_alone() {
    // fldcw [rsi]; fldz; fld qword [rsi+8]; fistp dword [rdi]
    let mut core = machine();
    put(&core, 0, &0x037E_u16.to_le_bytes()); // invalid operation not masked
    put(&core, 8, &1e300_f64.to_le_bytes());
    put(&core, 0x100, &[0xAA; 4]);
    run(&mut core, &[0xD9, 0x2E, 0xD9, 0xEE, 0xDD, 0x46, 8, 0xDB, 0x1F], 4);
    assert_eq!([0xAA; 4], get::<4>(&core, 0x100));
    assert_eq!(1, core.fx.pending());
}

#[test]
fn the_state_survives_a_save_and_a_load() {
    // fldpi; pcmpeqb xmm15,xmm15; fxsave64 [rdi]; fnstenv [rsi]; fninit; fxrstor64 [rdi]
    let mut core = machine();
    let code = [
        0xD9, 0xEB, 0x66, 0x45, 0x0F, 0x74, 0xFF, 0x48, 0x0F, 0xAE, 0x07, 0xD9, 0x36, 0xDB, 0xE3, 0x48, 0x0F,
        0xAE, 0x0F,
    ];
    run(&mut core, &code, 3);
    let saved = core.fx;
    assert_eq!([0xFF; 16], get::<16>(&core, 0x100 + 400));
    core.fx.0[400..416].fill(0);
    for _ in 0..3 {
        assert_eq!(Ok(()), step(&mut core));
    }
    let fop = if habits().has_opcode { 0x1EB } else { 0 };
    assert_eq!(fop, u16::from_le_bytes(get(&core, 18)));
    assert_eq!(core.rip - code.len() as u64, u64::from(u32::from_le_bytes(get(&core, 12))));
    assert_eq!(saved.0[32..416], core.fx.0[32..416]);
    assert_eq!(saved.0[..5], core.fx.0[..5]);
}

#[test]
fn reserved_bits_of_mxcsr_are_refused() {
    let mut core = machine();
    put(&core, 0, &0x2_1F80_u32.to_le_bytes());
    load(&mut core, &[0x0F, 0xAE, 0x16]); // ldmxcsr [rsi]
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
    put(&core, 0, &Fx::at_reset().0);
    put(&core, 24, &0x1_0000_u32.to_le_bytes());
    load(&mut core, &[0x0F, 0xAE, 0x0E]); // fxrstor [rsi]
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
}

#[test]
fn masked_stores_touch_only_the_bytes_they_choose() {
    // maskmovdqu xmm0,xmm1
    let mut core = machine();
    core.gpr[7] = DATA + 5;
    core.fx.0[160..176].copy_from_slice(&[7; 16]);
    core.fx.0[176..178].fill(0x80);
    load(&mut core, &[0x66, 0x0F, 0xF7, 0xC1]);
    assert_eq!(Ok(()), step(&mut core));
    assert_eq!([0, 7, 7, 0], get::<4>(&core, 4));
    core.rip = 0x1000;
    core.gpr[7] = (4 << 20) - 8;
    assert_eq!((vector::PF, Some(6)), fault(step(&mut core)));
    assert_eq!(0, core.mem.load((4 << 20) - 8, 8));
}

#[test]
fn what_the_guests_processor_lacks_is_undefined() {
    let rows: [&[u8]; 4] = [
        &[0xC5, 0xF8, 0x58, 0xC1],             // vaddps
        &[0x62, 0xF1, 0x7C, 0x48, 0x58, 0xC1], // vaddps zmm
        &[0xF2, 0x0F, 0x79, 0xC1],             // insertq
        &[0x0F, 0x0F, 0xC1, 0x9E],             // pfadd
    ];
    for code in rows {
        let mut core = machine();
        load(&mut core, code);
        assert_eq!((vector::UD, None), fault(step(&mut core)), "{code:x?}");
    }
}

#[test]
fn the_area_for_copies_starts_afresh_when_it_is_full() {
    // pshufd/shufps xmmN,xmmM,imm8: more forms than there is room
    let mut core = machine();
    for i in 0..20_000_u32 {
        core.rip = 0x1000;
        let modrm = 0xC0 | (i >> 8) as u8 & 0x3F;
        let rex = 0x40 | (i >> 14 & 1) as u8;
        load(&mut core, &[0x66, rex, 0x0F, 0x70, modrm, i as u8]);
        assert_eq!(Ok(()), step(&mut core));
    }
}
