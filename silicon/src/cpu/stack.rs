//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and the words other instructions push.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::arch::segment::seg;
use crate::cpu::flags::mask;
use crate::cpu::operand::{linear_at, read_op, set_gpr, set_reg, size_of_op, write_op};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, ud};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const RSP: usize = 4;
const RBP: usize = 5;

/// The linear address of `size` bytes at an offset in the stack segment.
///
/// # Errors
/// #SS(0).
#[inline]
pub fn stack_linear(core: &mut Core, offset: u64, size: usize, access: Access) -> Exec<u64> {
    let offset = offset & core.stack_mask();
    linear_at(core, seg::SS, offset, size, access)
}

/// The stack pointer after moving it by `by` bytes.
#[inline]
#[must_use]
pub fn moved(core: &Core, by: i64) -> u64 {
    placed(core, core.gpr[RSP].wrapping_add(by.cast_unsigned()))
}

/// The stack pointer with a new value in its width: of 16 bits the bits above stay, as with any
/// register, of 32 bits they are cleared.
fn placed(core: &Core, sp: u64) -> u64 {
    match core.stack_mask() {
        0xFFFF => core.gpr[RSP] & !0xFFFF | sp & 0xFFFF,
        mask => sp & mask,
    }
}

/// Push a word of 2, 4 or 8 bytes.
///
/// # Errors
/// #SS(0) or what the write raises; RSP is unchanged then.
#[inline]
pub fn push(core: &mut Core, size: usize, v: u64) -> Exec<()> {
    let rsp = moved(core, -(size as i64));
    let gva = stack_linear(core, rsp, size, Access::Write)?;
    core.write_lin(gva, size, v & mask(size), Who::Program)?;
    core.gpr[RSP] = rsp;
    Ok(())
}

/// Pop a word of 2, 4 or 8 bytes.
///
/// # Errors
/// #SS(0) or what the read raises; RSP is unchanged then.
#[inline]
pub fn pop(core: &mut Core, size: usize) -> Exec<u64> {
    let v = pop_peek(core, size, 0)?;
    core.gpr[RSP] = moved(core, size as i64);
    Ok(v)
}

/// The word of 2, 4 or 8 bytes that lies `skip` bytes above the stack pointer.
///
/// # Errors
/// As [`pop`].
#[inline]
pub fn pop_peek(core: &mut Core, size: usize, skip: u64) -> Exec<u64> {
    let at = core.gpr[RSP].wrapping_add(skip);
    let gva = stack_linear(core, at, size, Access::Read)?;
    core.read_lin(gva, size, Who::Program)
}

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Push => {
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let v = read_op(core, insn, 0)?;
            push(core, size, v)
        }
        Mnemonic::Pop => pop_op(core, insn),
        Mnemonic::Pusha => push_all(core, 2),
        Mnemonic::Pushad => push_all(core, 4),
        Mnemonic::Popa => pop_all(core, 2),
        Mnemonic::Popad => pop_all(core, 4),
        Mnemonic::Enter => match insn.code() {
            Code::Enterw_imm16_imm8 => enter(core, insn, 2),
            Code::Enterd_imm16_imm8 => enter(core, insn, 4),
            _ => enter(core, insn, 8),
        },
        Mnemonic::Leave => match insn.code() {
            Code::Leavew => leave(core, 2),
            Code::Leaved => leave(core, 4),
            _ => leave(core, 8),
        },
        _ => Err(ud()),
    }
}

fn pop_op(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let rsp = core.gpr[RSP];
    let v = pop(core, size)?;
    if insn.op0_kind() == OpKind::Register {
        set_reg(core, insn.op0_register(), v);
        return Ok(());
    }
    // An address that uses RSP sees it after the pop.
    let written = write_op(core, insn, 0, v);
    if written.is_err() {
        core.gpr[RSP] = rsp;
    }
    written
}

fn push_all(core: &mut Core, size: usize) -> Exec<()> {
    let rsp = core.gpr[RSP];
    // Check all of it first, so that a fault leaves nothing half done.
    for i in 1..=8 {
        let at = rsp.wrapping_sub(i * size as u64);
        let gva = stack_linear(core, at, size, Access::Write)?;
        core.probe_write(gva, size, Who::Program)?;
    }
    for n in 0..8 {
        let v = if n == RSP { rsp } else { core.gpr[n] };
        push(core, size, v)?;
    }
    Ok(())
}

fn pop_all(core: &mut Core, size: usize) -> Exec<()> {
    let mut values = [0; 8];
    for (i, v) in values.iter_mut().enumerate() {
        *v = pop_peek(core, size, (i * size) as u64)?;
    }
    core.gpr[RSP] = moved(core, 8 * size as i64);
    for (i, v) in values.into_iter().enumerate() {
        if 7 - i != RSP {
            set_gpr(core, 7 - i, size, v);
        }
    }
    Ok(())
}

fn enter(core: &mut Core, insn: &Instruction, size: usize) -> Exec<()> {
    let bytes = insn.immediate(0) & 0xFFFF;
    let level = insn.immediate(1) & 31;
    let (rsp, rbp) = (core.gpr[RSP], core.gpr[RBP]);
    let result = enter_body(core, size, bytes, level);
    if result.is_err() {
        (core.gpr[RSP], core.gpr[RBP]) = (rsp, rbp);
    }
    result
}

fn enter_body(core: &mut Core, size: usize, bytes: u64, level: u64) -> Exec<()> {
    let rbp = core.gpr[RBP];
    push(core, size, rbp)?;
    let frame = core.gpr[RSP];
    for i in 1..level {
        let at = rbp.wrapping_sub(i * size as u64);
        let gva = stack_linear(core, at, size, Access::Read)?;
        let v = core.read_lin(gva, size, Who::Program)?;
        push(core, size, v)?;
    }
    if level > 0 {
        push(core, size, frame)?;
    }
    let rsp = moved(core, -(bytes as i64));
    // The new top of the stack must be writable, though nothing is written.
    let gva = stack_linear(core, rsp, size, Access::Write)?;
    core.probe_write(gva, size, Who::Program)?;
    core.gpr[RSP] = rsp;
    set_gpr(core, RBP, size, frame);
    Ok(())
}

fn leave(core: &mut Core, size: usize) -> Exec<()> {
    let rsp = placed(core, core.gpr[RBP]);
    let gva = stack_linear(core, rsp, size, Access::Read)?;
    let rbp = core.read_lin(gva, size, Who::Program)?;
    core.gpr[RSP] = rsp;
    core.gpr[RSP] = moved(core, size as i64);
    set_gpr(core, RBP, size, rbp);
    Ok(())
}
