//! CLI, STI, PUSHF, POPF, CLAC, STAC, with IOPL and the virtual interrupt flag of CR4.VME and
//! CR4.PVI (SDM 2 under their names; SDM 3B, "Virtual-8086 Mode").

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::{cr4, rflags};
use crate::cpu::stack;
use crate::cpu::state::{Core, Mode, Shadow};
use crate::cpu::system::flags_changed;
use crate::cpu::trap::{Exec, gp, ud};

/// What POPF may change at any level, with an operand size of 16 bits.
const PLAIN16: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;

/// Execute an instruction of this group.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Cli => {
            let flag = interrupt_flag(core)?;
            core.rflags &= !flag;
            Ok(())
        }
        Mnemonic::Sti => sti(core),
        Mnemonic::Pushf => pushf(core, 2),
        Mnemonic::Pushfd => pushf(core, 4),
        Mnemonic::Pushfq => pushf(core, 8),
        Mnemonic::Popf => popf(core, 2),
        Mnemonic::Popfd => popf(core, 4),
        Mnemonic::Popfq => popf(core, 8),
        _ if core.cpl != 0 => Err(ud()),
        Mnemonic::Clac => {
            core.rflags &= !rflags::AC;
            Ok(())
        }
        _ => {
            core.rflags |= rflags::AC;
            Ok(())
        }
    }
}

/// The flag that CLI and STI mean: IF, or VIF where that is virtual.
fn interrupt_flag(core: &Core) -> Exec<u64> {
    if core.cpl <= core.iopl() || core.mode == Mode::Real {
        return Ok(rflags::IF);
    }
    let is_virtual = if core.mode == Mode::V86 {
        core.cr4 & cr4::VME != 0
    } else {
        core.cr4 & cr4::PVI != 0 && core.cpl == 3
    };
    if is_virtual { Ok(rflags::VIF) } else { Err(gp(0)) }
}

fn sti(core: &mut Core) -> Exec<()> {
    let flag = interrupt_flag(core)?;
    if flag == rflags::VIF && core.flag(rflags::VIP) {
        return Err(gp(0));
    }
    if flag == rflags::IF && !core.flag(rflags::IF) {
        core.shadow = Shadow::Sti;
        core.attention = 1;
    }
    core.rflags |= flag;
    Ok(())
}

/// Whether PUSHF and POPF work on VIF instead of IF.
///
/// # Errors
/// #GP(0) where they may not be executed.
fn is_flag_virtual(core: &Core, size: usize) -> Exec<bool> {
    if core.mode != Mode::V86 || core.iopl() == 3 {
        Ok(false)
    } else if core.cr4 & cr4::VME != 0 && size == 2 {
        Ok(true)
    } else {
        Err(gp(0))
    }
}

fn pushf(core: &mut Core, size: usize) -> Exec<()> {
    let mut image = core.rflags & !(rflags::VM | rflags::RF);
    if is_flag_virtual(core, size)? {
        image = image & !rflags::IF | rflags::IOPL;
        if core.flag(rflags::VIF) {
            image |= rflags::IF;
        }
    }
    stack::push(core, size, image)
}

fn popf(core: &mut Core, size: usize) -> Exec<()> {
    let is_virtual = is_flag_virtual(core, size)?;
    let image = stack::pop_peek(core, size, 0)?;
    let before = core.rflags;
    let mut mask = PLAIN16;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if is_virtual {
        if image & rflags::IF != 0 && core.flag(rflags::VIP) || image & rflags::TF != 0 {
            return Err(gp(0));
        }
        core.rflags &= !rflags::VIF;
        if image & rflags::IF != 0 {
            core.rflags |= rflags::VIF;
        }
    } else {
        if core.cpl <= core.iopl() {
            mask |= rflags::IF;
        }
        if core.cpl == 0 {
            mask |= rflags::IOPL;
        }
    }
    core.gpr[4] = stack::moved(core, size as i64);
    core.rflags = core.rflags & !(mask | rflags::RF) | image & mask | rflags::FIXED1;
    flags_changed(core, before);
    Ok(())
}
