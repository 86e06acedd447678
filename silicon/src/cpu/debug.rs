//! MOV to and from the debug registers (SDM 3B, "Debug Registers").

use iced_x86::Instruction;

use crate::arch::bits::cr4;
use crate::arch::exception::{Exception, vector};
use crate::cpu::operand::{get_reg, set_reg};
use crate::cpu::state::{Core, Mode};
use crate::cpu::system::require_level_0;
use crate::cpu::trap::{Exec, gp, ud};
use crate::vmx::intercept::Sensitive;

/// DR7.GD: any access to a debug register is a #DB; DR6.BD says so.
const GENERAL_DETECT: u64 = 1 << 13;
/// DR6: the bits that software may change, and those that are always one.
const DR6_WRITABLE: u64 = 0xE00F;
const DR6_ONES: u64 = 0xFFFF_0FF0;
/// DR7: the same.
const DR7_WRITABLE: u64 = 0xFFFF_23FF;
const DR7_ONES: u64 = 0x400;

/// MOV with a debug register as the destination or the source.
pub(crate) fn moves(core: &mut Core, insn: &Instruction, to_dr: bool) -> Exec<()> {
    let (dr, gpr) = if to_dr {
        (insn.op0_register(), insn.op1_register())
    } else {
        (insn.op1_register(), insn.op0_register())
    };
    let number = dr.number();
    let is_alias = number == 4 || number == 5;
    if number > 7 || is_alias && core.cr4 & cr4::DE != 0 {
        return Err(ud());
    }
    require_level_0(core)?;
    let exit = Sensitive::MovDr { dr: number as u8, from_dr: !to_dr, reg: gpr.number() as u8 };
    core.intercept(exit, insn.len() as u32)?;
    if core.dr[7] & GENERAL_DETECT != 0 {
        return Err(Exception { payload: GENERAL_DETECT, ..Exception::plain(vector::DB) }.into());
    }
    let index = if is_alias { number + 2 } else { number };
    if !to_dr {
        let value = core.dr[index];
        set_reg(core, gpr, value);
        return Ok(());
    }
    let value = get_reg(core, gpr);
    if index >= 6 && core.mode == Mode::Bits64 && value >> 32 != 0 {
        return Err(gp(0));
    }
    write(core, index, value);
    Ok(())
}

/// Write debug register `index` (0 … 3, 6, 7); bits that are fixed stay.
pub fn write(core: &mut Core, index: usize, value: u64) {
    core.dr[index] = match index {
        6 => value & DR6_WRITABLE | DR6_ONES,
        7 => value & DR7_WRITABLE | DR7_ONES,
        _ => value,
    };
    core.attention = 1;
}
