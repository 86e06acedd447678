//! System instructions by their bytes: control registers, tables, flags, calls, ports.

use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::exception::vector;
use crate::arch::exit::reason;
use crate::arch::segment::seg;
use crate::cpu::segment::v86_segment;
use crate::cpu::state::{Activity, Core, Mode, Shadow};
use crate::cpu::step::step;
use crate::cpu::testbed::*;
use crate::cpu::trap::{Exec, Trap};
use crate::cpu::{cr, msr};
use crate::dbt::home::Home;

fn run(core: &mut Core, bytes: &[u8]) -> Exec<()> {
    assert!(core.mem.write_bytes(0x1000, bytes));
    core.rip = 0x1000;
    step(core)
}

fn v86(iopl: u64) -> Home {
    let mut core = protected(3);
    core.rflags |= rflags::VM | iopl << 12;
    core.seg = core.seg.map(|_| v86_segment(0));
    core.refresh();
    core
}

const GP0: (u8, Option<u32>) = (vector::GP, Some(0));
const UD: (u8, Option<u32>) = (vector::UD, None);

/// Every #GP(0) of "MOV—Move to/from Control Registers".
#[test]
fn control_register_writes_that_are_gp() {
    type Write = fn(&mut Core, u64) -> Exec<()>;
    type Prepare = fn(&mut Core);
    let on = cr0::PE | cr0::PG | cr0::NE | cr0::ET;
    type Row = (&'static str, fn(u8) -> Home, Prepare, Write, u64);
    let rows: [Row; 18] = [
        ("CR0 63:32", long, |_| {}, cr::write_cr0, on | 1 << 32),
        ("PG without PE", protected, |_| {}, cr::write_cr0, cr0::PG),
        ("NW without CD", protected, |_| {}, cr::write_cr0, cr0::PE | cr0::NW),
        ("PG with LME without PAE", protected, |c| c.efer = efer::LME, cr::write_cr0, on),
        (
            "PG with LME from CS.L",
            protected,
            |c| {
                c.efer = efer::LME;
                c.cr4 = cr4::PAE;
                c.seg[seg::CS].attr |= 1 << 13;
            },
            cr::write_cr0,
            on,
        ),
        (
            "PG with LME and a 16-bit TSS",
            protected,
            |c| {
                c.efer = efer::LME;
                c.cr4 = cr4::PAE;
                c.tr.attr = 0x83;
            },
            cr::write_cr0,
            on,
        ),
        ("PG cleared in 64-bit mode", long, |_| {}, cr::write_cr0, on & !cr0::PG),
        (
            "PG cleared with PCIDE",
            long,
            |c| {
                c.seg[seg::CS].attr = 0xC09B;
                c.cr4 |= cr4::PCIDE;
                c.refresh();
            },
            cr::write_cr0,
            on & !cr0::PG,
        ),
        (
            "PG with bad PDPTEs",
            protected,
            |c| {
                c.cr4 = cr4::PAE;
                c.cr3 = 0x4000;
                c.mem.store(0x4000, 8, 3);
            },
            cr::write_cr0,
            on,
        ),
        ("CR3 above MAXPHYADDR", long, |_| {}, cr::write_cr3, 1 << 46),
        ("CR3 63 without PCIDE", long, |_| {}, cr::write_cr3, 1 << 63),
        ("CR4 reserved", long, |_| {}, cr::write_cr4, cr4::PAE | 1 << 31),
        ("CR4.LA57", long, |_| {}, cr::write_cr4, cr4::PAE | 1 << 12),
        ("PAE cleared in IA-32e mode", long, |_| {}, cr::write_cr4, 0),
        ("PCIDE outside IA-32e mode", protected, |_| {}, cr::write_cr4, cr4::PCIDE),
        ("PCIDE with CR3[11:0]", long, |c| c.cr3 |= 0x18, cr::write_cr4, cr4::PAE | cr4::PCIDE),
        ("VMXE cleared in VMX operation", protected, |c| c.vmx.is_on = true, cr::write_cr4, 0),
        ("NE cleared in VMX operation", long, |c| c.vmx.is_on = true, cr::write_cr0, on & !cr0::NE),
    ];
    for (name, make, prepare, write, value) in rows {
        let mut core = make(0);
        prepare(&mut core);
        let before = (core.cr0, core.cr3, core.cr4, core.efer);
        assert_eq!(GP0, fault(write(&mut core, value)), "{name}");
        assert_eq!(before, (core.cr0, core.cr3, core.cr4, core.efer), "{name}");
    }
}

#[test]
fn control_registers_are_for_level_0_and_the_others_do_not_exist() {
    assert_eq!(GP0, fault(run(&mut long(3), &[0x0F, 0x20, 0xC0])));
    assert_eq!(GP0, fault(run(&mut v86(3), &[0x0F, 0x22, 0xC0])));
    assert_eq!(UD, fault(run(&mut long(0), &[0x0F, 0x20, 0xC8]))); // CR1
    let mut core = long(0);
    core.gpr[0] = 0x10;
    assert_eq!(GP0, fault(run(&mut core, &[0x44, 0x0F, 0x22, 0xC0]))); // CR8
}

#[test]
fn paging_with_lme_activates_ia_32e_mode_and_a_far_jump_makes_it_64_bit() {
    let mut core = long(0);
    core.cr0 &= !cr0::PG;
    core.efer &= !efer::LMA;
    core.seg[seg::CS] = protected(0).seg[seg::CS];
    core.refresh();
    core.gpr[0] = core.cr0 | cr0::PG;
    run(&mut core, &[0x0F, 0x22, 0xC0]).unwrap();
    assert_eq!((Mode::Bits32, true), (core.mode, core.is_long()));
    run(&mut core, &[0xEA, 0, 0x20, 0, 0, LONG0 as u8, 0]).unwrap();
    assert_eq!((Mode::Bits64, 0x2000), (core.mode, core.rip));
    assert_eq!(GP0, fault(msr::write(&mut core, 0xC000_0080, efer::SCE)), "LME while paging");
}

#[test]
fn mov_to_cr3_flushes_unless_bit_63_says_no() {
    for (bit, misses) in [(0, 1), (1 << 63, 0)] {
        let mut core = long(0);
        core.cr4 |= cr4::PCIDE;
        core.refresh();
        core.read_lin(0x4000, 8, crate::mmu::access::Who::Program).unwrap();
        let before = core.counts.tlb_misses;
        cr::write_cr3(&mut core, PML4 | bit).unwrap();
        core.read_lin(0x4000, 8, crate::mmu::access::Who::Program).unwrap();
        assert_eq!((misses, PML4), (core.counts.tlb_misses - before, core.cr3));
    }
}

#[test]
fn pae_paging_loads_the_pdptes_with_cr3() {
    let mut core = protected(0);
    core.cr4 = cr4::PAE;
    core.mem.store(0x4020, 8, 0x5001);
    core.mem.store(0x4028, 8, 0xFFFE); // not present: anything goes
    cr::write_cr0(&mut core, cr0::PE | cr0::NE).unwrap();
    core.cr3 = 0x4020;
    cr::write_cr0(&mut core, cr0::PE | cr0::NE | cr0::PG).unwrap();
    assert_eq!([0x5001, 0xFFFE, 0, 0], core.pdpte);
}

#[test]
fn lmsw_sets_pe_but_does_not_clear_it() {
    let mut core = real();
    core.gpr[0] = 1;
    run(&mut core, &[0x0F, 0x01, 0xF0]).unwrap();
    assert_eq!(Mode::Bits16, core.mode);
    core.gpr[0] = 8;
    run(&mut core, &[0x0F, 0x01, 0xF0]).unwrap();
    assert_eq!(cr0::PE | cr0::TS, core.cr0 & 0xF);
    run(&mut core, &[0x0F, 0x06]).unwrap();
    assert_eq!(cr0::PE, core.cr0 & 0xF);
}

#[test]
fn umip_hides_the_tables_from_programs() {
    for bytes in
        [&[0x0F, 0x01, 0x00][..], &[0x0F, 0x01, 0x08], &[0x0F, 0, 0xC0], &[0x0F, 0, 0xC8], &[0x0F, 1, 0xE0]]
    {
        let mut core = long(3);
        core.gpr[0] = 0x4000;
        run(&mut core, bytes).unwrap();
        core.cr4 |= cr4::UMIP;
        assert_eq!(GP0, fault(run(&mut core, bytes)), "{bytes:x?}");
    }
}

#[test]
fn lgdt_and_sgdt_move_ten_bytes_in_64_bit_mode() {
    let mut core = long(0);
    core.gpr[0] = 0x4000;
    core.mem.store(0x4000, 2, 0x77);
    core.mem.store(0x4002, 8, 0xFFFF_8000_0000_1000);
    run(&mut core, &[0x0F, 0x01, 0x10]).unwrap();
    assert_eq!((0x77, 0xFFFF_8000_0000_1000), (core.gdtr.limit, core.gdtr.base));
    core.gpr[0] = 0x4100;
    run(&mut core, &[0x0F, 0x01, 0x00]).unwrap();
    assert_eq!(vec![0x77, 0x1000, 0, 0x8000, 0xFFFF], words(&core, 0x4100, 2, 5));
    core.mem.store(0x4102, 8, 1 << 60);
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x01, 0x10])));
}

#[test]
fn ltr_takes_an_available_tss_and_makes_it_busy() {
    let mut core = long(0);
    set_descriptor(&core, TSS2_SEL + 8, 0xFFFF_8000);
    core.gpr[0] = u64::from(TSS2_SEL);
    run(&mut core, &[0x0F, 0x00, 0xD8]).unwrap();
    assert_eq!((0xFFFF_8000_0000_3200, 0x8B), (core.tr.base, core.tr.attr));
    assert_eq!((vector::GP, Some(0x68)), fault(run(&mut core, &[0x0F, 0x00, 0xD8])), "busy now");
    core.gpr[0] = 0;
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x00, 0xD8])));
    assert_eq!(UD, fault(run(&mut real(), &[0x0F, 0x00, 0xD8])));
}

#[test]
fn loads_of_segment_registers_check_in_the_manuals_order() {
    type Row = (u8, u16, Option<(u8, u32)>);
    let rows: [Row; 9] = [
        (3, 0, None),                           // DS: null is fine
        (3, 0x90, Some((vector::GP, 0x90))),    // beyond the table
        (3, TSS_SEL, Some((vector::GP, 0x28))), // a system segment
        (3, CONFORMING, None),                  // readable conforming code: any level
        (3, ABSENT, Some((vector::NP, 0x38))),
        (2, 0, Some((vector::GP, 0))),        // SS: null is not
        (2, DATA3, Some((vector::GP, 0x20))), // RPL
        (2, CODE0, Some((vector::GP, 8))),    // not data
        (2, ABSENT, Some((vector::SS, 0x38))),
    ];
    for (index, selector, expected) in rows {
        let mut core = protected(0);
        core.gpr[0] = u64::from(selector);
        let result = run(&mut core, &[0x8E, 0xC0 | index << 3]);
        match expected {
            None => {
                result.unwrap();
                assert_eq!(selector, core.seg[usize::from(index)].selector);
            }
            Some((v, code)) => {
                assert_eq!((v, Some(code)), fault(result), "{index} {selector:x}");
                assert_eq!(DATA0, core.seg[usize::from(index)].selector);
            }
        }
    }
    assert_eq!(UD, fault(run(&mut protected(0), &[0x8E, 0xC8])), "MOV CS");
}

#[test]
fn mov_ss_and_sti_hold_interrupts_for_one_instruction() {
    let mut core = protected(0);
    core.gpr[0] = u64::from(DATA0);
    run(&mut core, &[0x8E, 0xD0]).unwrap();
    assert_eq!((Shadow::MovSs, 1), (core.shadow, core.attention));
    run(&mut core, &[0xFB]).unwrap();
    assert_eq!(Shadow::Sti, core.shadow);
    run(&mut core, &[0xFB]).unwrap();
    assert_eq!(Shadow::None, core.shadow, "IF was set already");
}

#[test]
fn verr_verw_lar_lsl_answer_in_zf() {
    // (opcode of 0F 00 /n or 0F nn, selector, ZF)
    let rows: [(&[u8], u16, bool); 8] = [
        (&[0x0F, 0x00, 0xE0], DATA0, true),  // VERR
        (&[0x0F, 0x00, 0xE8], CODE0, false), // VERW code
        (&[0x0F, 0x00, 0xE8], DATA0, true),
        (&[0x0F, 0x00, 0xE8], 0x90, false),
        (&[0x0F, 0x02, 0xC8], TSS_SEL, true),    // LAR ecx, eax
        (&[0x0F, 0x03, 0xC8], TSS_SEL, true),    // LSL ecx, eax
        (&[0x0F, 0x03, 0xC8], DATA0 | 3, false), // RPL above DPL
        (&[0x0F, 0x03, 0xC8], 0, false),
    ];
    for (bytes, selector, zf) in rows {
        let mut core = protected(0);
        core.gpr[0] = u64::from(selector);
        run(&mut core, bytes).unwrap();
        assert_eq!(zf, core.flag(rflags::ZF), "{bytes:x?} {selector:x}");
    }
    let mut core = protected(0);
    core.gpr[0] = u64::from(DATA0);
    run(&mut core, &[0x0F, 0x03, 0xC8]).unwrap();
    assert_eq!(0xFFFF_FFFF, core.gpr[1]);
    run(&mut core, &[0x0F, 0x02, 0xC8]).unwrap();
    assert_eq!(0x00C0_9300, core.gpr[1]);
}

#[test]
fn cli_sti_popf_obey_iopl_vme_and_pvi() {
    assert_eq!(GP0, fault(run(&mut protected(3), &[0xFA])));
    let mut core = protected(3);
    core.cr4 |= cr4::PVI;
    run(&mut core, &[0xFB]).unwrap();
    assert_eq!(rflags::VIF, core.rflags & (rflags::IF | rflags::VIF));
    core.rflags |= rflags::VIP;
    assert_eq!(GP0, fault(run(&mut core, &[0xFB])));

    assert_eq!(GP0, fault(run(&mut v86(0), &[0x9C])));
    let mut core = v86(0);
    core.cr4 |= cr4::VME;
    core.rflags |= rflags::VIF;
    run(&mut core, &[0x9C]).unwrap();
    assert_eq!(0x3202, core.mem.load(core.gpr[4], 2));
    run(&mut core, &[0x9D]).unwrap();
    assert!(core.flag(rflags::VIF) && core.iopl() == 0);

    // POPF at level 3 changes neither IF nor IOPL.
    let mut core = protected(3);
    core.mem.store(0x7000, 4, 0x3ED7 | rflags::VM | rflags::VIP);
    run(&mut core, &[0x9D]).unwrap();
    assert_eq!(0xCD7, core.rflags);
}

#[test]
fn syscall_and_sysret_of_an_intel_processor() {
    let mut core = long(3);
    core.rflags |= rflags::IF | rflags::CF;
    core.msr.star = 0x0063_0010 << 32;
    core.msr.lstar = 0xFFFF_8000_0000_0000;
    core.msr.fmask = rflags::IF;
    run(&mut core, &[0x0F, 0x05]).unwrap();
    assert_eq!((0xFFFF_8000_0000_0000, 0x1002, 0x203), (core.rip, core.gpr[1], core.gpr[11]));
    assert_eq!((0, 3, 0x10, 0x18), (core.cpl, core.rflags, core.seg[1].selector, core.seg[2].selector));
    run(&mut core, &[0x48, 0x0F, 0x07]).unwrap();
    assert_eq!((3, 0x1002, 0x203), (core.cpl, core.rip, core.rflags));
    assert_eq!((0x73, 0x6B, Mode::Bits64), (core.seg[1].selector, core.seg[2].selector, core.mode));
    assert_eq!(GP0, fault(run(&mut core, &[0x48, 0x0F, 0x07])), "SYSRET at level 3");
    let mut core = long(0);
    core.gpr[1] = 1 << 47;
    assert_eq!(GP0, fault(run(&mut core, &[0x48, 0x0F, 0x07])), "RCX");
    core.gpr[1] = 0x1_2000;
    run(&mut core, &[0x0F, 0x07]).unwrap();
    assert_eq!((Mode::Bits32, 0x1_2000), (core.mode, core.rip));
    assert_eq!(UD, fault(run(&mut protected(0), &[0x0F, 0x05])), "outside 64-bit mode");
    let mut core = long(0);
    core.efer &= !efer::SCE;
    assert_eq!(UD, fault(run(&mut core, &[0x0F, 0x05])));
}

#[test]
fn sysenter_and_sysexit() {
    let mut core = protected(3);
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x34])), "no IA32_SYSENTER_CS");
    core.rflags |= rflags::IF;
    (core.msr.sysenter_cs, core.msr.sysenter_esp, core.msr.sysenter_eip) = (8, 0x6000, 0x2000);
    run(&mut core, &[0x0F, 0x34]).unwrap();
    assert_eq!((0, 0x2000, 0x6000, 2), (core.cpl, core.rip, core.gpr[4], core.rflags));
    (core.gpr[1], core.gpr[2]) = (0x7000, 0x3000);
    run(&mut core, &[0x0F, 0x35]).unwrap();
    assert_eq!((3, 0x3000, 0x7000), (core.cpl, core.rip, core.gpr[4]));
    assert_eq!((0x1B, 0x23), (core.seg[1].selector, core.seg[2].selector));
}

#[test]
fn swapgs_and_the_base_instructions() {
    let mut core = long(0);
    core.seg[seg::GS].base = 1;
    core.msr.kernel_gs_base = 2;
    run(&mut core, &[0x0F, 0x01, 0xF8]).unwrap();
    assert_eq!((2, 1), (core.seg[seg::GS].base, core.msr.kernel_gs_base));
    assert_eq!(GP0, fault(run(&mut long(3), &[0x0F, 0x01, 0xF8])));
    let bytes = [0xF3, 0x48, 0x0F, 0xAE, 0xD0]; // wrfsbase rax
    assert_eq!(UD, fault(run(&mut core, &bytes)));
    core.cr4 |= cr4::FSGSBASE;
    core.gpr[0] = 1 << 55;
    assert_eq!(GP0, fault(run(&mut core, &bytes)));
    core.gpr[0] = 0x1234;
    run(&mut core, &bytes).unwrap();
    assert_eq!(0x1234, core.seg[seg::FS].base);
}

#[test]
fn msrs_that_do_not_exist_or_do_not_take_a_value_are_gp() {
    let rows = [
        (0xDEAD, 0),            // none
        (0xC000_0080, 1 << 20), // EFER reserved
        (0xC000_0082, 1 << 50), // LSTAR not canonical
        (0x277, 2),             // PAT type 2
        (0xFE, 0),              // MTRRCAP is read-only
        (0x3A, 1),              // FEATURE_CONTROL is locked
        (0xC000_0103, 1 << 32), // TSC_AUX
        (0x49, 2),              // PRED_CMD
    ];
    for (index, value) in rows {
        let mut core = long(0);
        core.gpr[1] = index;
        core.gpr[0] = value & 0xFFFF_FFFF;
        core.gpr[2] = value >> 32;
        assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x30])), "{index:x}");
    }
    let mut core = long(0);
    core.gpr[1] = 0xDEAD;
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x32])));
    assert_eq!(GP0, fault(run(&mut long(3), &[0x0F, 0x32])));
}

#[test]
fn a_write_of_the_tsc_moves_what_rdtsc_shows() {
    let mut core = long(0);
    msr::write(&mut core, 0x10, 1 << 40).unwrap();
    run(&mut core, &[0x0F, 0x31]).unwrap();
    assert_eq!((1 << 8, 0), (core.gpr[2], core.gpr[0]));
    core.cr4 |= cr4::TSD;
    core.cpl = 3;
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x31])));
}

#[test]
fn debug_registers() {
    let mut core = long(0);
    core.gpr[0] = u64::MAX >> 32;
    run(&mut core, &[0x0F, 0x23, 0xF8]).unwrap();
    assert_eq!(0xFFFF_27FF, core.dr[7]);
    // DR7.GD is set now: the next access is a #DB, and DR6.BD will say why.
    let Err(Trap::Exception(e)) = run(&mut core, &[0x0F, 0x21, 0xC0]) else { panic!() };
    assert_eq!((vector::DB, 1 << 13), (e.vector, e.payload));
    let mut core = long(0);
    core.gpr[0] = 1 << 32;
    assert_eq!(GP0, fault(run(&mut core, &[0x0F, 0x23, 0xF0])));
    run(&mut core, &[0x0F, 0x21, 0xE3]).unwrap(); // DR4 is DR6
    assert_eq!(0xFFFF_0FF0, core.gpr[3]);
    core.cr4 |= cr4::DE;
    assert_eq!(UD, fault(run(&mut core, &[0x0F, 0x21, 0xE3])));
    assert_eq!(GP0, fault(run(&mut long(3), &[0x0F, 0x21, 0xC0])));
}

#[test]
fn ports_stop_the_bare_machine_as_exit_reason_30_would() {
    let mut core = real();
    core.gpr[0] = 0x1234;
    let Err(Trap::Stop(stop)) = run(&mut core, &[0xE7, 0x80]) else { panic!() };
    assert_eq!((reason::PIO, 0x0080_0041, 2), (stop.reason, stop.qualification, stop.length));
    assert_eq!((0x1234, 0x1000), (stop.gla, core.rip));
    core.gpr[2] = 0x3F8;
    let Err(Trap::Stop(stop)) = run(&mut core, &[0xEC]) else { panic!() };
    assert_eq!(0x03F8_0008, stop.qualification);
    core.gpr[1] = 3;
    core.gpr[7] = 0x500;
    let Err(Trap::Stop(stop)) = run(&mut core, &[0xF3, 0x6C]) else { panic!() };
    assert_eq!((0x03F8_0038, 0x500), (stop.qualification, stop.gla));
    core.gpr[1] = 0;
    run(&mut core, &[0xF3, 0x6C]).unwrap();
}

#[test]
fn the_io_permission_bit_map() {
    let mut core = protected(3);
    core.gpr[2] = 0x3F8;
    assert_eq!(GP0, fault(run(&mut core, &[0xEC])), "no map in a TSS of 104 bytes");
    core.tr.limit = 0x68 + 0x80;
    core.mem.store(TSS + 0x66, 2, 0x68);
    let Err(Trap::Stop(_)) = run(&mut core, &[0xEC]) else { panic!("all bits are clear") };
    core.mem.store(TSS + 0x68 + 0x7F, 1, 2);
    let Err(Trap::Stop(_)) = run(&mut core, &[0xEC]) else { panic!("bit 0 is clear") };
    assert_eq!(GP0, fault(run(&mut core, &[0x66, 0xED])), "bit 1 is set");
    core.tr.limit = 0x68 + 0x7F;
    assert_eq!(GP0, fault(run(&mut core, &[0xEC])), "two bytes are read");
    core.rflags |= rflags::IOPL;
    let Err(Trap::Stop(_)) = run(&mut core, &[0xEC]) else { panic!("IOPL 3") };
}

#[test]
fn hlt_halts_and_is_privileged() {
    let mut core = protected(0);
    run(&mut core, &[0xF4]).unwrap();
    assert_eq!((Activity::Hlt, 0x1001, 1), (core.activity, core.rip, core.attention));
    assert_eq!(GP0, fault(run(&mut protected(3), &[0xF4])));
}

#[test]
fn invlpg_and_invpcid_drop_translations() {
    use crate::mmu::access::Who;
    let bytes: [&[u8]; 2] = [&[0x0F, 0x01, 0x3B], &[0x66, 0x0F, 0x38, 0x82, 0x03]];
    for bytes in bytes {
        let mut core = long(0);
        core.gpr[3] = 0x4000;
        core.mem.store(0x4008, 8, 0x5000);
        core.gpr[0] = 0;
        for gva in [0x4000, 0x5000] {
            core.read_lin(gva, 8, Who::Program).unwrap();
        }
        run(&mut core, bytes).unwrap();
        let before = core.counts.tlb_misses;
        for gva in [0x4000, 0x5000] {
            core.read_lin(gva, 8, Who::Program).unwrap();
        }
        assert!(core.counts.tlb_misses > before);
    }
    let mut core = long(0);
    core.gpr[3] = 0x4000;
    core.gpr[0] = 4;
    assert_eq!(GP0, fault(run(&mut core, bytes[1])), "type 4");
    core.gpr[0] = 1;
    core.mem.store(0x4000, 8, 5);
    assert_eq!(GP0, fault(run(&mut core, bytes[1])), "a PCID without CR4.PCIDE");
}

#[test]
fn clac_and_stac_are_for_level_0() {
    let mut core = long(0);
    run(&mut core, &[0x0F, 0x01, 0xCB]).unwrap();
    assert!(core.flag(rflags::AC));
    run(&mut core, &[0x0F, 0x01, 0xCA]).unwrap();
    assert!(!core.flag(rflags::AC));
    assert_eq!(UD, fault(run(&mut long(3), &[0x0F, 0x01, 0xCB])));
}
