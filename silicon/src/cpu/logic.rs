//! AND, OR, XOR, NOT, TEST, and the instructions that set single flags.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::rflags::{AF, ARITH, CF, DF, PF, SF, ZF};
use crate::cpu::flags::logic;
use crate::cpu::operand::{modify_op0, read_op, size_of_op};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, ud};

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    match mnemonic {
        M::And | M::Or | M::Xor => {
            let size = size_of_op(insn, 0);
            let b = read_op(core, insn, 1)?;
            match mnemonic {
                M::And => modify_op0(core, insn, size, |a| logic(size, a & b)),
                M::Or => modify_op0(core, insn, size, |a| logic(size, a | b)),
                _ => modify_op0(core, insn, size, |a| logic(size, a ^ b)),
            }
        }
        M::Not => {
            let (size, flags) = (size_of_op(insn, 0), core.rflags & ARITH);
            modify_op0(core, insn, size, |a| (!a, flags))
        }
        M::Test => {
            let (a, b) = (read_op(core, insn, 0)?, read_op(core, insn, 1)?);
            let (_, flags) = logic(size_of_op(insn, 0), a & b);
            core.set_arith(flags);
            Ok(())
        }
        M::Clc => set(core, CF, 0),
        M::Stc => set(core, CF, CF),
        M::Cmc => set(core, CF, !core.rflags),
        M::Cld => set(core, DF, 0),
        M::Std => set(core, DF, DF),
        M::Lahf => {
            core.gpr[0] = core.gpr[0] & !0xFF00 | (core.rflags & 0xD7) << 8;
            Ok(())
        }
        M::Sahf => set(core, SF | ZF | AF | PF | CF, core.gpr[0] >> 8),
        _ => Err(ud()),
    }
}

fn set(core: &mut Core, which: u64, flags: u64) -> Exec<()> {
    core.set_flags(which, flags);
    Ok(())
}
