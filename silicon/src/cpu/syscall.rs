//! Fast system calls (SDM 2, "SYSCALL", "SYSRET", "SYSENTER", "SYSEXIT"), and the bases of FS and
//! GS that go with them.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::{cr4, efer, rflags};
use crate::arch::segment::{Segment, seg};
use crate::cpu::operand::{get_reg, set_reg};
use crate::cpu::pmu;
use crate::cpu::segment::is_canonical;
use crate::cpu::state::Core;
use crate::cpu::system::{flags_changed, require_level_0};
use crate::cpu::trap::{Exec, gp, ud};

const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;
const R11: usize = 11;

/// Flat segments as these instructions load them, without their DPL.
pub(crate) const CODE64: u32 = 0xA09B;
const CODE32: u32 = 0xC09B;
pub(crate) const DATA: u32 = 0xC093;

/// What of R11 SYSRET takes into RFLAGS.
pub(crate) const FLAGS_OF_SYSRET: u64 = 0x3C_7FD7;

/// Execute an instruction of this group.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Syscall => syscall(core),
        Mnemonic::Sysret => sysret(core, false),
        Mnemonic::Sysretq => sysret(core, true),
        Mnemonic::Sysenter => sysenter(core),
        Mnemonic::Sysexit => sysexit(core, false),
        _ => sysexit(core, true),
    }
}

/// Load CS and SS with flat segments of level `cpl` and go to `rip`.
fn enter(core: &mut Core, cs: u16, ss: u16, code: u32, cpl: u8, rip: u64) {
    let dpl = u32::from(cpl) << 5;
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, attr, selector };
    core.seg[seg::CS] = flat(cs, code | dpl);
    core.seg[seg::SS] = flat(ss, DATA | dpl);
    pmu::set_level(core, cpl);
    core.rip = rip;
    core.refresh();
}

/// Intel processors know SYSCALL and SYSRET in 64-bit mode only.
fn require_syscall(core: &Core) -> Exec<()> {
    if core.is_64() && core.efer & efer::SCE != 0 { Ok(()) } else { Err(ud()) }
}

fn syscall(core: &mut Core) -> Exec<()> {
    require_syscall(core)?;
    core.gpr[RCX] = core.rip;
    core.gpr[R11] = core.rflags & !rflags::RF;
    core.rflags = core.rflags & !(core.msr.fmask | rflags::RF) | rflags::FIXED1;
    let first = (core.msr.star >> 32) as u16;
    let rip = core.msr.lstar;
    enter(core, first & 0xFFFC, first.wrapping_add(8), CODE64, 0, rip);
    Ok(())
}

fn sysret(core: &mut Core, to_64: bool) -> Exec<()> {
    require_syscall(core)?;
    require_level_0(core)?;
    let rip = core.gpr[RCX];
    if to_64 && !is_canonical(rip) {
        return Err(gp(0));
    }
    let before = core.rflags;
    core.rflags = core.gpr[R11] & FLAGS_OF_SYSRET | rflags::FIXED1;
    flags_changed(core, before);
    let first = (core.msr.star >> 48) as u16;
    let ss = first.wrapping_add(8) | 3;
    if to_64 {
        enter(core, first.wrapping_add(16) | 3, ss, CODE64, 3, rip);
    } else {
        enter(core, first | 3, ss, CODE32, 3, rip & 0xFFFF_FFFF);
    }
    Ok(())
}

fn sysenter(core: &mut Core) -> Exec<()> {
    let cs = core.msr.sysenter_cs as u16 & 0xFFFC;
    if !core.is_protected() || cs == 0 {
        return Err(gp(0));
    }
    core.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let (mut rip, mut rsp) = (core.msr.sysenter_eip, core.msr.sysenter_esp);
    let code = if core.is_long() {
        CODE64
    } else {
        rip &= 0xFFFF_FFFF;
        rsp &= 0xFFFF_FFFF;
        CODE32
    };
    enter(core, cs, cs.wrapping_add(8), code, 0, rip);
    core.gpr[RSP] = rsp;
    Ok(())
}

fn sysexit(core: &mut Core, to_64: bool) -> Exec<()> {
    let first = core.msr.sysenter_cs as u16 & 0xFFFC;
    if !core.is_protected() || first == 0 || core.cpl != 0 {
        return Err(gp(0));
    }
    let (rsp, rip) = (core.gpr[RCX], core.gpr[RDX]);
    if to_64 {
        if !is_canonical(rsp) || !is_canonical(rip) {
            return Err(gp(0));
        }
        let cs = first.wrapping_add(32) | 3;
        enter(core, cs, cs.wrapping_add(8), CODE64, 3, rip);
        core.gpr[RSP] = rsp;
    } else {
        let cs = first.wrapping_add(16) | 3;
        enter(core, cs, cs.wrapping_add(8), CODE32, 3, rip & 0xFFFF_FFFF);
        core.gpr[RSP] = rsp & 0xFFFF_FFFF;
    }
    Ok(())
}

/// SWAPGS, RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(crate) fn segment_bases(core: &mut Core, insn: &Instruction) -> Exec<()> {
    if !core.is_64() {
        return Err(ud());
    }
    if insn.mnemonic() == Mnemonic::Swapgs {
        require_level_0(core)?;
        std::mem::swap(&mut core.seg[seg::GS].base, &mut core.msr.kernel_gs_base);
        return Ok(());
    }
    if core.cr4 & cr4::FSGSBASE == 0 {
        return Err(ud());
    }
    let r = insn.op0_register();
    let index = match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS,
        _ => seg::GS,
    };
    if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = core.seg[index].base;
        set_reg(core, r, base);
        return Ok(());
    }
    let base = get_reg(core, r);
    if !is_canonical(base) {
        return Err(gp(0));
    }
    core.seg[index].base = base;
    Ok(())
}
