//! Small programs in every mode, assembled by hand, and the debug conditions around them.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, RflagsBits};

use crate::arch::bits::rflags::{AF, CF, FIXED1, OF, PF, RF, SF, TF, ZF};
use crate::arch::exception::{Exception, vector};
use crate::cpu::state::{Core, Shadow};
use crate::cpu::step::step;
use crate::cpu::testbed::{fault, long, protected, real, words};
use crate::cpu::trap::Trap;
use crate::features::is_amd;

/// Put code at RIP and run `n` instructions of it.
fn run(core: &mut Core, code: &[u8], n: usize) {
    load(core, code);
    for i in 0..n {
        if let Err(t) = step(core) {
            panic!("instruction {i} at {:#x}: {t:?}", core.rip);
        }
    }
}

fn load(core: &mut Core, code: &[u8]) {
    let at = core.rip;
    assert!(core.mem.write_bytes(at, code));
}

#[test]
fn a_loop_in_real_mode() {
    // mov ax,0; mov cx,5; l: add ax,cx; loop l; push ax; pop [0x500]
    let mut core = real();
    run(&mut core, &[0xB8, 0, 0, 0xB9, 5, 0, 1, 0xC8, 0xE2, 0xFC, 0x50, 0x8F, 6, 0, 5], 14);
    assert_eq!((15, 0, 0x7000), (core.gpr[0], core.gpr[1], core.gpr[4]));
    assert_eq!((15, 0x100F), (core.mem.load(0x500, 2), core.rip));
}

#[test]
fn retired_instructions_are_counted_and_faults_are_not() {
    let mut core = real();
    core.set_countdown(100);
    run(&mut core, &[0x90, 0x90, 0xF7, 0xF1], 2); // nop; nop; div cx
    assert_eq!((vector::DE, None), fault(step(&mut core)));
    assert_eq!((98, 0x1002), (core.countdown.get(), core.rip));
}

#[test]
fn calls_and_frames_in_protected_mode() {
    // call f; hlt-place: nop; f: enter 8,0; mov [ebp-4],0x11223344; mov eax,[esp+4]; leave; ret 4
    let mut core = protected(0);
    core.gpr[5] = 0xBB;
    let code = [
        0xE8, 1, 0, 0, 0, 0x90, 0xC8, 8, 0, 0, 0xC7, 0x45, 0xFC, 0x44, 0x33, 0x22, 0x11, 0x8B, 0x44, 0x24, 4,
        0xC9, 0xC2, 4, 0,
    ];
    run(&mut core, &code, 6);
    assert_eq!((0x1122_3344, 0x1005, 0xBB), (core.gpr[0], core.rip, core.gpr[5]));
    assert_eq!(0x7004, core.gpr[4]);
    assert_eq!(vec![0x1122_3344, 0xBB, 0x1005], words(&core, 0x6FF4, 4, 3));
}

#[test]
fn addresses_and_widths_in_long_mode() {
    let mut core = long(3);
    core.gpr[0] = u64::MAX;
    core.gpr[3] = 0x2000;
    core.gpr[9] = 4;
    core.mem.store(0x2000 + 4 * 8 + 0x10, 8, 0x8000_0001_9000_0002);
    // mov rdx,[rbx+r9*8+0x10]; movsxd rcx,edx; mov eax,edx; lea rsi,[rip+0x100]; push rdx; mov r8b,[rsp+7]
    let code = [
        0x4A, 0x8B, 0x54, 0xCB, 0x10, 0x48, 0x63, 0xCA, 0x89, 0xD0, 0x48, 0x8D, 0x35, 0, 1, 0, 0, 0x52, 0x44,
        0x8A, 0x44, 0x24, 7,
    ];
    run(&mut core, &code, 6);
    assert_eq!(0x8000_0001_9000_0002, core.gpr[2]);
    assert_eq!(0xFFFF_FFFF_9000_0002, core.gpr[1]);
    assert_eq!((0x9000_0002, 0x1111, 0x80), (core.gpr[0], core.gpr[6], core.gpr[8]));
    assert_eq!(0x6FF8, core.gpr[4]);
}

#[test]
fn arithmetic_sets_flags_and_conditions_read_them() {
    let mut core = protected(0);
    core.gpr[0] = 0x7FFF_FFFF;
    run(&mut core, &[0x83, 0xC0, 1, 0x0F, 0x90, 0xC1], 2); // add eax,1; seto cl
    assert_eq!(FIXED1 | OF | SF | AF | PF, core.rflags);
    assert_eq!(1, core.gpr[1]);
    run(&mut core, &[0x31, 0xC0, 0x48, 0x83, 0xD0, 1], 3); // xor eax,eax; dec eax; adc eax,1
    assert_eq!(FIXED1 | ZF | CF | AF | PF, core.rflags);
}

#[test]
fn changed_code_is_executed_as_it_is_now() {
    let mut core = protected(0);
    // l: inc eax; mov byte [0x1000],0x4B (dec ebx); jmp l
    run(&mut core, &[0x40, 0xC6, 5, 0, 0x10, 0, 0, 0x4B, 0xEB, 0xF6], 4);
    assert_eq!((1, 0xFFFF_FFFF), (core.gpr[0], core.gpr[3]));
}

#[test]
fn an_instruction_across_two_pages_is_fetched_from_both() {
    let mut core = long(3);
    core.rip = 0x1FFD;
    run(&mut core, &[0xB8, 1, 2, 3, 4], 1);
    assert_eq!((0x0403_0201, 0x2002), (core.gpr[0], core.rip));
    assert_eq!(2, core.counts.itlb_misses);
    core.rip = 0x1FFF;
    run(&mut core, &[0x90], 1); // touches one page only
    assert_eq!(2, core.counts.itlb_misses);
}

#[test]
fn a_fetch_beyond_the_limit_or_of_sixteen_bytes_is_a_general_protection_fault() {
    let mut core = real();
    core.rip = 0xFFFE;
    load(&mut core, &[0xB8, 1, 2]);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
    let mut core = protected(0);
    load(&mut core, &[0x66; 15]);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
    assert_eq!(0x1000, core.rip);
}

/// Flat segments end at 4 GBytes, as on this computer; nothing wraps.
#[test]
fn an_operand_beyond_4_gbytes_is_outside_its_segment() {
    let rows: [(&[u8], u8); 6] = [
        (&[0xA1, 0xFD, 0xFF, 0xFF, 0xFF], vector::GP), // mov eax, [-3]
        (&[0x36, 0xA3, 0xFD, 0xFF, 0xFF, 0xFF], vector::SS), // mov [ss:-3], eax
        (&[0x0F, 0x10, 0x05, 0xF8, 0xFF, 0xFF, 0xFF], vector::GP), // movups xmm0, [-8]
        (&[0xFF, 0x05, 0xFE, 0xFF, 0xFF, 0xFF], vector::GP), // inc dword [-2]
        (&[0xDD, 0x05, 0xF9, 0xFF, 0xFF, 0xFF], vector::GP), // fld qword [-7]
        (&[0xA5], vector::GP),                         // movsd
    ];
    for (code, expected) in rows {
        let mut core = protected(0);
        core.cr4 |= 1 << 9; // OSFXSR
        core.gpr[6] = 0xFFFF_FFFD;
        load(&mut core, code);
        assert_eq!((expected, Some(0)), fault(step(&mut core)), "{code:x?}");
    }
    // The last bytes are inside: no fault, if nothing is there either.
    let mut core = protected(0);
    load(&mut core, &[0xA1, 0xFC, 0xFF, 0xFF, 0xFF]);
    assert!(matches!(step(&mut core), Err(Trap::Stop(e)) if e.gpa == 0xFFFF_FFFC));
}

#[test]
fn lock_is_undefined_where_it_may_not_be() {
    for code in [&[0xF0, 0x90][..], &[0xF0, 1, 0xC0], &[0xF0, 0x8B, 3], &[0xF0, 0x39, 3], &[0x0F, 0x0B]] {
        let mut core = protected(0);
        load(&mut core, code);
        assert_eq!((vector::UD, None), fault(step(&mut core)), "{code:x?}");
    }
    let mut core = protected(0);
    core.gpr[3] = 0x2000;
    run(&mut core, &[0xF0, 0xFF, 3], 1);
    assert_eq!(1, core.mem.load(0x2000, 4));
}

#[test]
fn a_write_to_a_page_without_write_permission_changes_nothing() {
    let mut core = long(3);
    core.mem.store(0xA008, 8, 0x20_0085); // the second 2 MBytes: read-only
    core.gpr[3] = 0x20_0000;
    core.mem.store(0x20_0000, 4, 5);
    let before = (core.gpr, core.rflags);
    load(&mut core, &[1, 3]); // add [rbx],eax
    assert_eq!((vector::PF, Some(7)), fault(step(&mut core)));
    assert_eq!((before, 5), ((core.gpr, core.rflags), core.mem.load(0x20_0000, 4)));
}

#[test]
fn single_step_traps_after_the_instruction_that_began_with_tf() {
    let mut core = protected(0);
    core.rflags |= TF;
    load(&mut core, &[0x40]);
    let Err(Trap::Exception(e)) = step(&mut core) else { panic!("no trap") };
    assert_eq!(Exception { payload: 1 << 14, is_trap: true, ..Exception::plain(vector::DB) }, e);
    assert_eq!((0x1001, 1), (core.rip, core.gpr[0]));
}

#[test]
fn an_instruction_breakpoint_faults_before_and_rf_passes_it() {
    let mut core = protected(0);
    (core.dr[1], core.dr[7]) = (0x1000, 0x404);
    load(&mut core, &[0x40]);
    let Err(Trap::Exception(e)) = step(&mut core) else { panic!("no fault") };
    assert_eq!((2, false, 0x1000), (e.payload, e.is_trap, core.rip));
    core.rflags |= RF;
    assert_eq!(Ok(()), step(&mut core));
    assert_eq!((1, 0), (core.gpr[0], core.rflags & RF));
}

#[test]
fn a_data_breakpoint_traps_after_the_access() {
    for (control, code, meets) in [
        (0x000D_0001, [0x89, 3], true),  // write of 4 bytes at a 4-byte watch for writes
        (0x000D_0001, [0x8B, 3], false), // a read does not meet it
        (0x000F_0001, [0x8B, 3], true),
        (0x0003_0001, [0x8B, 3], true), // one byte inside the four
    ] {
        let mut core = protected(0);
        (core.dr[0], core.dr[7], core.gpr[3]) = (0x2000, control | 0x400, 0x2000);
        load(&mut core, &code);
        let result = step(&mut core);
        assert_eq!(0x1002, core.rip);
        match result {
            Err(Trap::Exception(e)) => assert_eq!((true, 1, true), (meets, e.payload, e.is_trap)),
            other => assert_eq!((false, Ok(())), (meets, other)),
        }
    }
}

#[test]
fn the_interrupt_shadow_lasts_one_instruction_and_a_fault_leaves_it() {
    let mut core = protected(0);
    core.shadow = Shadow::Sti;
    load(&mut core, &[0x90, 0x0F, 0x0B]);
    assert_eq!((Ok(()), Shadow::None), (step(&mut core), core.shadow));
    core.shadow = Shadow::Sti;
    assert!(step(&mut core).is_err());
    assert_eq!(Shadow::Sti, core.shadow);
}

/// Every row: code, RAX RCX RDX before, RAX and the arithmetic flags after, as an AMD Zen leaves them
/// (flags before: none, or all six); other computers leave those that the manual defines.
#[test]
fn flags_that_the_manual_leaves_open_are_as_hardware_leaves_them() {
    let all = CF | PF | AF | ZF | SF | OF;
    let is_zen = is_amd();
    let open = |code: &[u8]| {
        let insn = Decoder::new(64, code, DecoderOptions::NONE).decode();
        let (u, is_open) = (insn.rflags_undefined(), !is_zen || insn.mnemonic() == Mnemonic::Bsf);
        let pairs = [
            (RflagsBits::CF, CF),
            (RflagsBits::PF, PF),
            (RflagsBits::AF, AF),
            (RflagsBits::ZF, ZF),
            (RflagsBits::SF, SF),
            (RflagsBits::OF, OF),
        ];
        pairs.iter().filter(|p| is_open && u & p.0 != 0).map(|p| p.1).sum::<u64>()
    };
    for (name, code, [rax, rcx, rdx], before, after_rax, after) in [
        ("mul", &[0xF7, 0xE1][..], [u64::MAX >> 32, 3, 0], 0, 0xFFFF_FFFD, CF | OF),
        ("mul", &[0xF7, 0xE1], [0, 3, 0], all, 0, all & !(CF | OF)),
        ("imul", &[0x0F, 0xAF, 0xC1], [0x7FFF_FFFF, 5, 0], all, 0x7FFF_FFFB, all),
        ("div", &[0xF7, 0xF1], [7, 2, 0], all, 3, CF | AF | OF),
        ("idiv", &[0xF7, 0xF9], [7, 2, 0], 0, 3, AF),
        ("xor", &[0x31, 0xC8], [5, 5, 0], all, 0, ZF | PF),
        ("bt", &[0x0F, 0xA3, 0xC8], [8, 3, 0], all, 8, all),
        ("bsf", &[0x0F, 0xBC, 0xC1], [9, 0, 0], all, 9, ZF),
        ("bsf", &[0x0F, 0xBC, 0xC1], [9, 0x10, 0], all, 4, 0),
        ("tzcnt", &[0xF3, 0x0F, 0xBC, 0xC1], [5, 0, 0], all, 32, CF | OF),
        ("lzcnt", &[0xF3, 0x0F, 0xBD, 0xC1], [5, 0x8000_0000, 0], all, 0, ZF | OF),
        ("popcnt", &[0xF3, 0x0F, 0xB8, 0xC1], [5, 3, 0], all, 2, 0),
        ("andn", &[0xC4, 0xE2, 0x78, 0xF2, 0xC1], [8, 3, 0], all, 3, PF),
        ("bextr", &[0xC4, 0xE2, 0x70, 0xF7, 0xC0], [0xF8, 0x403, 0], all, 0x1F & 0xF, PF | AF),
        ("bextr", &[0xC4, 0xE2, 0x70, 0xF7, 0xC0], [0x8000_0000, 0x2000, 0], all, 0x8000_0000, PF | AF),
        ("bzhi", &[0xC4, 0xE2, 0x70, 0xF5, 0xC0], [0xF8, 33, 0], all, 0xF8, CF),
        ("blsi", &[0xC4, 0xE2, 0x78, 0xF3, 0xD9], [0, 0x80, 0], all, 0x80, CF),
        ("blsmsk", &[0xC4, 0xE2, 0x78, 0xF3, 0xD1], [0, 0, 0], all, 0xFFFF_FFFF, CF | PF | SF),
        ("blsr", &[0xC4, 0xE2, 0x78, 0xF3, 0xC9], [0, 3, 0], all, 2, 0),
        ("adcx", &[0x66, 0x0F, 0x38, 0xF6, 0xC1], [0xFFFF_FFFF, 1, 0], 0, 0, CF),
        ("rol by 8", &[0xD2, 0xC0], [1, 8, 0], 0, 1, CF | OF),
        ("shl by 0", &[0xD3, 0xE0], [0x11_5566_7788, 32, 0], all, 0x5566_7788, all),
    ] {
        let mut core = long(3);
        (core.gpr[0], core.gpr[1], core.gpr[2]) = (rax, rcx, rdx);
        core.rflags |= before;
        run(&mut core, code, 1);
        let flags = core.rflags & all & !open(code);
        assert_eq!((after_rax, after & !open(code)), (core.gpr[0], flags), "{name} {rax:#x} {rcx:#x}");
    }
}

#[test]
fn what_stays_in_the_upper_half() {
    // cmpxchg edx,ecx: equal writes the destination only, different the accumulator only.
    for (edx, rax, rdx) in [(5, 0xAAAA_AAAA_0000_0005, 9), (6, 6, 0xDDDD_DDDD_0000_0006)] {
        let mut core = long(3);
        core.gpr[0] = 0xAAAA_AAAA_0000_0005;
        core.gpr[1] = 0xCCCC_CCCC_0000_0009;
        core.gpr[2] = 0xDDDD_DDDD_0000_0000 | edx;
        run(&mut core, &[0x0F, 0xB1, 0xCA], 1);
        assert_eq!((rax, rdx), (core.gpr[0], core.gpr[2]));
    }
    let mut core = long(3);
    core.gpr[0] = 0x1122_3344_5566_7788;
    run(&mut core, &[0x66, 0x0F, 0xC8, 0x04, 1], 2); // bswap ax; add al,1
    assert_eq!(0x1122_3344_5566_0001, core.gpr[0]);
}

#[test]
fn compare_and_exchange_of_16_bytes() {
    let mut core = long(3);
    core.gpr[6] = 0x2000;
    (core.gpr[0], core.gpr[2], core.gpr[3], core.gpr[1]) = (1, 2, 3, 4);
    core.mem.store(0x2000, 8, 1);
    core.mem.store(0x2008, 8, 2);
    let code = [0xF0, 0x48, 0x0F, 0xC7, 0x0E];
    run(&mut core, &code, 1);
    assert_eq!((3, 4, ZF), (core.mem.load(0x2000, 8), core.mem.load(0x2008, 8), core.rflags & ZF));
    run(&mut core, &code, 1);
    assert_eq!((3, 4, 0), (core.gpr[0], core.gpr[2], core.rflags & ZF));
    core.gpr[6] = 0x2008;
    load(&mut core, &code);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
}

#[test]
fn branches_to_where_no_code_may_be_fault_before_they_change_anything() {
    let mut core = long(3);
    core.gpr[0] = 1 << 62;
    for code in [&[0xFF, 0xE0][..], &[0xFF, 0xD0]] {
        load(&mut core, code);
        assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
        assert_eq!((0x1000, 0x7000), (core.rip, core.gpr[4]));
    }
    core.mem.store(0x7000, 8, 1 << 62);
    load(&mut core, &[0xC3]);
    assert_eq!((vector::GP, Some(0)), fault(step(&mut core)));
    assert_eq!((0x1000, 0x7000), (core.rip, core.gpr[4]));
}

#[test]
fn stack_faults_in_long_mode_are_stack_faults() {
    let mut core = long(3);
    core.gpr[4] = 1 << 62;
    load(&mut core, &[0x50]);
    assert_eq!((vector::SS, Some(0)), fault(step(&mut core)));
    core.gpr[5] = 1 << 62;
    load(&mut core, &[0x8B, 0x45, 0]); // mov eax,[rbp]
    assert_eq!((vector::SS, Some(0)), fault(step(&mut core)));
}

#[test]
fn bounds_and_division_by_zero() {
    let mut core = protected(0);
    (core.gpr[0], core.gpr[3]) = (11, 0x2000);
    core.mem.store(0x2004, 4, 10);
    load(&mut core, &[0x62, 3]);
    assert_eq!((vector::BR, None), fault(step(&mut core)));
    core.gpr[0] = 10;
    assert_eq!(Ok(()), step(&mut core));
    load(&mut core, &[0xD4, 0]);
    assert_eq!((vector::DE, None), fault(step(&mut core)));
}

#[test]
fn hints_do_nothing_and_vex_is_undefined_in_real_mode() {
    let hints = [
        0x0F, 0x1F, 0x40, 0, 0xF3, 0x0F, 0x1E, 0xFA, 0x0F, 0x18, 0x08, 0x0F, 0x0D, 0x08, 0xF3, 0x48, 0x0F,
        0x1E, 0xC8, 0x0F, 0xAE, 0xF8,
    ];
    let mut core = long(3);
    core.gpr[0] = u64::MAX << 62;
    let before = core.gpr;
    run(&mut core, &hints, 6);
    assert_eq!((before, 0x1000 + hints.len() as u64), (core.gpr, core.rip));
    let mut core = real();
    load(&mut core, &[0xC4, 0xE2, 0x78, 0xF2, 0xC1]);
    assert_eq!((vector::UD, None), fault(step(&mut core)));
}

#[test]
fn a_debug_condition_of_mov_ss_waits_for_the_next_instruction() {
    let mut core = protected(0);
    (core.dr[0], core.dr[7], core.gpr[3]) = (0x2000, 0x0007_0401, 0x2000);
    core.mem.store(0x2000, 2, u64::from(crate::cpu::testbed::DATA0));
    load(&mut core, &[0x8E, 0x13, 0x40]); // mov ss,[ebx]; inc eax
    assert_eq!((Ok(()), Shadow::MovSs), (step(&mut core), core.shadow));
    let Err(Trap::Exception(e)) = step(&mut core) else { panic!("no trap") };
    assert_eq!((1, true, 0x1003, 1), (e.payload, e.is_trap, core.rip, core.gpr[0]));
}

#[test]
fn a_16_bit_stack_keeps_the_upper_half_of_esp_and_wraps() {
    let mut core = protected(0);
    core.seg[crate::arch::segment::seg::SS].attr &= !(1 << 14);
    core.gpr[4] = 0xABCD_0002;
    core.gpr[0] = 0x1122_3344;
    load(&mut core, &[0x66, 0x50, 0x50, 0x59]); // push ax; push eax; pop ecx
    for expected in [0xABCD_0000u64, 0xABCD_FFFC, 0xABCD_0000] {
        assert_eq!(Ok(()), step(&mut core));
        assert_eq!(expected, core.gpr[4]);
    }
    assert_eq!((0x3344, 0x1122_3344), (core.mem.load(0, 2), core.mem.load(0xFFFC, 4)));
    assert_eq!(0x1122_3344, core.gpr[1]);
}
