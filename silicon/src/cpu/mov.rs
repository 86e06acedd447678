//! Moves: MOV and its extensions, exchanges, conditional moves and sets, LEA.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::arch::bits::rflags::CF;
use crate::cpu::flags::{holds, sign_extend};
use crate::cpu::operand::{
    address_mask, ea, get_reg, linear_at, mem_linear, read_op, segment_of, set_gpr, set_reg, size_of_op,
    write_op,
};
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const RAX: usize = 0;
const RDX: usize = 2;
const RBX: usize = 3;

/// MOV between general-purpose registers, memory and immediates.
///
/// # Errors
/// What the memory access raises.
pub fn mov(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let v = read_op(core, insn, 1)?;
    write_op(core, insn, 0, v)
}

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Movzx | M::Movnti => mov(core, insn),
        M::Movsx | M::Movsxd => {
            let size = size_of_op(insn, 1);
            let v = read_op(core, insn, 1)?;
            write_op(core, insn, 0, sign_extend(size, v))
        }
        M::Lea => {
            let v = ea(core, insn);
            set_reg(core, insn.op0_register(), v);
            Ok(())
        }
        M::Xchg => exchange(core, insn),
        M::Bswap => {
            let r = insn.op0_register();
            let v = get_reg(core, r);
            let swapped = match size_of_op(insn, 0) {
                8 => v.swap_bytes(),
                4 => u64::from((v as u32).swap_bytes()),
                _ => 0, // undefined; the processors of today leave zero
            };
            set_reg(core, r, swapped);
            Ok(())
        }
        M::Movbe => {
            let v = read_op(core, insn, 1)?;
            let unused = 64 - 8 * size_of_op(insn, 0);
            write_op(core, insn, 0, v.swap_bytes() >> unused)
        }
        M::Xlatb => translate_byte(core, insn),
        M::Salc => {
            let v = if core.flag(CF) { 0xFF } else { 0 };
            core.gpr[RAX] = core.gpr[RAX] & !0xFF | v;
            Ok(())
        }
        M::Cbw => widen(core, 1),
        M::Cwde => widen(core, 2),
        M::Cdqe => widen(core, 4),
        M::Cwd => spread(core, 2),
        M::Cdq => spread(core, 4),
        M::Cqo => spread(core, 8),
        _ => conditional(core, insn),
    }
}

fn widen(core: &mut Core, size: usize) -> Exec<()> {
    let v = sign_extend(size, core.gpr[RAX]);
    set_gpr(core, RAX, 2 * size, v);
    Ok(())
}

fn spread(core: &mut Core, size: usize) -> Exec<()> {
    let sign = (sign_extend(size, core.gpr[RAX]).cast_signed() >> 63).cast_unsigned();
    set_gpr(core, RDX, size, sign);
    Ok(())
}

fn conditional(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let is_true = holds(core.rflags, insn.condition_code());
    if insn.op_count() == 1 {
        return write_op(core, insn, 0, u64::from(is_true));
    }
    // The source is read in any case, and a 32-bit move clears the upper half in any case.
    let v = read_op(core, insn, 1)?;
    let r = insn.op0_register();
    let v = if is_true { v } else { get_reg(core, r) };
    set_reg(core, r, v);
    Ok(())
}

fn exchange(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let b = insn.op1_register();
    if insn.op0_kind() == OpKind::Register {
        let a = insn.op0_register();
        let (va, vb) = (get_reg(core, a), get_reg(core, b));
        set_reg(core, a, vb);
        set_reg(core, b, va);
        return Ok(());
    }
    // Locked even without the prefix.
    let size = size_of_op(insn, 1);
    let gva = mem_linear(core, insn, size, Access::Write)?;
    let v = get_reg(core, b);
    let old = core.update_lin(gva, size, |_| v)?;
    set_reg(core, b, old);
    Ok(())
}

fn translate_byte(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let table = core.gpr[RBX].wrapping_add(core.gpr[RAX] & 0xFF);
    let offset = table & address_mask(insn);
    let gva = linear_at(core, segment_of(insn), offset, 1, Access::Read)?;
    let v = core.read_lin(gva, 1, Who::Program)?;
    core.gpr[RAX] = core.gpr[RAX] & !0xFF | v;
    Ok(())
}
