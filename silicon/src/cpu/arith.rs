//! Addition, subtraction, multiplication, division, compare-and-exchange, decimal adjustment.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::bits::rflags::{AF, CF, ZF};
use crate::arch::exception::{Exception, vector};
use crate::cpu::flags::{add, mask, of_result, sign_extend, sub};
use crate::cpu::operand::{
    get_reg, is_misaligned, mem_linear, modify_mem, modify_op0, read_op, set_gpr, set_reg, size_of_op,
};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap, gp, ud};
use crate::dbt::undefined::{self, Open, flags_of};
use crate::mmu::walk::Access;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    match mnemonic {
        M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp => {
            let size = size_of_op(insn, 0);
            let b = read_op(core, insn, 1)?;
            let carry = core.rflags & CF;
            match mnemonic {
                M::Add => modify_op0(core, insn, size, |a| add(size, a, b, 0)),
                M::Adc => modify_op0(core, insn, size, |a| add(size, a, b, carry)),
                M::Sub => modify_op0(core, insn, size, |a| sub(size, a, b, 0)),
                M::Sbb => modify_op0(core, insn, size, |a| sub(size, a, b, carry)),
                _ => {
                    let a = read_op(core, insn, 0)?;
                    core.set_arith(sub(size, a, b, 0).1);
                    Ok(())
                }
            }
        }
        M::Inc | M::Dec => {
            let (size, carry) = (size_of_op(insn, 0), core.rflags & CF);
            modify_op0(core, insn, size, |a| {
                let (r, f) = if mnemonic == M::Inc { add(size, a, 1, 0) } else { sub(size, a, 1, 0) };
                (r, f & !CF | carry)
            })
        }
        M::Neg => {
            let size = size_of_op(insn, 0);
            modify_op0(core, insn, size, |a| sub(size, 0, a, 0))
        }
        M::Mul => multiply(core, insn),
        M::Imul => match insn.op_count() {
            1 => multiply(core, insn),
            2 => multiply_into(core, insn, 0, 1),
            _ => multiply_into(core, insn, 1, 2),
        },
        M::Div | M::Idiv => divide(core, insn),
        M::Xadd => exchange_add(core, insn),
        M::Cmpxchg => compare_exchange(core, insn),
        M::Cmpxchg8b => compare_exchange_8(core, insn),
        M::Cmpxchg16b => compare_exchange_16(core, insn),
        _ => decimal(core, insn),
    }
}

/// The product's two halves into (E/R)DX and (E/R)AX, or AX.
fn multiply(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let b = read_op(core, insn, 0)?;
    let a = core.gpr[RAX] & mask(size);
    let n = 8 * size as u32;
    let (op, p) = if insn.mnemonic() == Mnemonic::Mul {
        (Open::Mul, u128::from(a) * u128::from(b))
    } else {
        (Open::ImulWide, (signed(size, a) * signed(size, b)).cast_unsigned())
    };
    let (low, high) = (p as u64 & mask(size), (p >> n) as u64 & mask(size));
    if size == 1 {
        set_gpr(core, RAX, 2, high << 8 | low);
    } else {
        set_gpr(core, RAX, size, low);
        set_gpr(core, RDX, size, high);
    }
    core.set_arith(flags_of(op, size, [a, 0, b], core.rflags));
    Ok(())
}

fn signed(size: usize, v: u64) -> i128 {
    i128::from(sign_extend(size, v).cast_signed())
}

fn multiply_into(core: &mut Core, insn: &Instruction, a: u32, b: u32) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let (a, b) = (read_op(core, insn, a)?, read_op(core, insn, b)?);
    let p = signed(size, a) * signed(size, b);
    let low = p as u64 & mask(size);
    set_reg(core, insn.op0_register(), low);
    core.set_arith(flags_of(Open::Imul, size, [a, b, 0], core.rflags));
    Ok(())
}

fn divide(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let op = if insn.mnemonic() == Mnemonic::Div { Open::Div } else { Open::Idiv };
    let operands = [core.gpr[RAX], core.gpr[RDX], read_op(core, insn, 0)?];
    let found = undefined::divide(op == Open::Idiv, size, operands);
    let (q, r) = found.ok_or(Trap::Exception(Exception::plain(vector::DE)))?;
    let flags = flags_of(op, size, operands, core.rflags);
    if size == 1 {
        set_gpr(core, RAX, 2, r << 8 | q);
    } else {
        set_gpr(core, RAX, size, q);
        set_gpr(core, RDX, size, r);
    }
    core.set_arith(flags);
    Ok(())
}

fn exchange_add(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let r = insn.op1_register();
    let b = get_reg(core, r);
    if insn.op0_kind() == OpKind::Register {
        let a = get_reg(core, insn.op0_register());
        let (sum, flags) = add(size, a, b, 0);
        set_reg(core, r, a);
        set_reg(core, insn.op0_register(), sum);
        core.set_arith(flags);
        return Ok(());
    }
    let gva = mem_linear(core, insn, size, Access::Write)?;
    let old = modify_mem(core, insn, gva, size, |a| (add(size, a, b, 0).0, a))?;
    set_reg(core, r, old);
    core.set_arith(add(size, old, b, 0).1);
    Ok(())
}

fn compare_exchange(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let new = get_reg(core, insn.op1_register());
    let expected = core.gpr[RAX] & mask(size);
    if insn.op0_kind() == OpKind::Register {
        let r = insn.op0_register();
        let old = get_reg(core, r);
        core.set_arith(sub(size, expected, old, 0).1);
        if old == expected {
            set_reg(core, r, new);
        } else {
            set_gpr_sized(core, RAX, size, old);
        }
        return Ok(());
    }
    let gva = mem_linear(core, insn, size, Access::Write)?;
    // The destination is written in any case: with its old value if the comparison fails.
    let old = modify_mem(core, insn, gva, size, |old| (if old == expected { new } else { old }, old))?;
    core.set_arith(sub(size, expected, old, 0).1);
    if old != expected {
        set_gpr_sized(core, RAX, size, old);
    }
    Ok(())
}

fn set_gpr_sized(core: &mut Core, n: usize, size: usize, v: u64) {
    if size == 1 {
        core.gpr[n] = core.gpr[n] & !0xFF | v & 0xFF;
    } else {
        set_gpr(core, n, size, v);
    }
}

fn compare_exchange_8(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let pair = |high: u64, low: u64| high << 32 | u64::from(low as u32);
    let expected = pair(core.gpr[RDX], core.gpr[RAX]);
    let new = pair(core.gpr[RCX], core.gpr[RBX]);
    let gva = mem_linear(core, insn, 8, Access::Write)?;
    let old = modify_mem(core, insn, gva, 8, |old| (if old == expected { new } else { old }, old))?;
    if old != expected {
        set_gpr(core, RDX, 4, old >> 32);
        set_gpr(core, RAX, 4, old);
    }
    core.set_flags(ZF, if old == expected { ZF } else { 0 });
    Ok(())
}

fn compare_exchange_16(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = pair(core.gpr[RDX], core.gpr[RAX]);
    let new = pair(core.gpr[RCX], core.gpr[RBX]);
    if is_misaligned(core, insn) {
        return Err(gp(0));
    }
    let gva = mem_linear(core, insn, 16, Access::Write)?;
    debug_assert!((gva & PAGE_OFFSET) + 16 <= FRAME_BYTES);
    let (hpa, special) = core.translate(gva, Access::Write)?;
    let old = if special {
        let old = pair(core.read_special(hpa + 8, 8)?, core.read_special(hpa, 8)?);
        let v = if old == expected { new } else { old };
        core.write_special(hpa, 8, v as u64)?;
        core.write_special(hpa + 8, 8, (v >> 64) as u64)?;
        old
    } else {
        let old = core.mem.compare_exchange_16(hpa, expected, new);
        core.note_write(hpa, 16);
        old
    };
    if old != expected {
        (core.gpr[RDX], core.gpr[RAX]) = ((old >> 64) as u64, old as u64);
    }
    core.set_flags(ZF, if old == expected { ZF } else { 0 });
    Ok(())
}

/// DAA, DAS, AAA, AAS, AAM, AAD.
fn decimal(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let (al, ah) = (core.gpr[RAX] & 0xFF, core.gpr[RAX] >> 8 & 0xFF);
    let (carry, adjust) = (core.flag(CF), core.flag(AF));
    let low_digit = al & 15 > 9 || adjust;
    match insn.mnemonic() {
        Mnemonic::Daa | Mnemonic::Das => {
            let is_add = insn.mnemonic() == Mnemonic::Daa;
            let high_digit = al > 0x99 || carry;
            let correction = if low_digit { 6 } else { 0 } + if high_digit { 0x60 } else { 0 };
            let (r, after) = if is_add { add(1, al, correction, 0) } else { sub(1, al, correction, 0) };
            // DAS of a small number borrows in its low digit's correction.
            let borrows = !is_add && low_digit && al < 6;
            let mut f = after & !(CF | AF);
            f |= if high_digit || borrows { CF } else { 0 };
            f |= if low_digit { AF } else { 0 };
            core.gpr[RAX] = core.gpr[RAX] & !0xFF | r;
            core.set_arith(f);
        }
        Mnemonic::Aaa | Mnemonic::Aas => {
            let ax = core.gpr[RAX] & 0xFFFF;
            let by = if low_digit { 0x106 } else { 0 };
            let op = if insn.mnemonic() == Mnemonic::Aaa { add } else { sub };
            // OF, SF, ZF and PF are those of AX before the upper digit of AL goes.
            let (ax, f) = op(2, ax, by, 0);
            set_gpr(core, RAX, 2, ax & 0xFF0F);
            core.set_arith(f & !(AF | CF) | if low_digit { AF | CF } else { 0 });
        }
        Mnemonic::Aam => {
            let by = insn.immediate(0) & 0xFF;
            if by == 0 {
                return Err(Trap::Exception(Exception::plain(vector::DE)));
            }
            set_gpr(core, RAX, 2, ((al / by) << 8) | (al % by));
            core.set_arith(of_result(1, al % by));
        }
        Mnemonic::Aad => {
            let (r, f) = add(1, al, ah.wrapping_mul(insn.immediate(0)) & 0xFF, 0);
            set_gpr(core, RAX, 2, r);
            core.set_arith(f);
        }
        _ => return Err(ud()),
    }
    Ok(())
}
