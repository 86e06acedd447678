//! Shifts and rotates.
//!
//! Flags are as the computer leaves them, for the manual leaves some undefined: OF for counts other than 1,
//! AF, CF of a shift by more than the width ([`crate::dbt::undefined`]).

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::arch::bits::rflags::{ARITH, CF};
use crate::cpu::flags::{mask, sign_extend};
use crate::cpu::operand::{get_reg, modify_op0, read_op, size_of_op};
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::dbt::undefined::{Open, as_the_computer};

/// Execute an instruction of this group.
///
/// # Errors
/// What the memory access raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    let size = size_of_op(insn, 0);
    let is_by_number = insn.op0_kind() == OpKind::Register && insn.op1_kind() == OpKind::Immediate8;
    let op = match insn.mnemonic() {
        M::Shl | M::Sal => Open::Shl,
        M::Shr => Open::Shr,
        M::Sar => Open::Sar,
        M::Rol if is_by_number => Open::RolBy,
        M::Ror if is_by_number => Open::RorBy,
        M::Rol => Open::Rol,
        M::Ror => Open::Ror,
        M::Rcl => Open::Rcl,
        M::Rcr => Open::Rcr,
        M::Shld => Open::Shld,
        _ => Open::Shrd,
    };
    let is_double = matches!(op, Open::Shld | Open::Shrd);
    let count = read_op(core, insn, if is_double { 2 } else { 1 })?;
    let count = count as u32 & if size == 8 { 63 } else { 31 };
    let before = core.rflags & ARITH;
    if count == 0 {
        return modify_op0(core, insn, size, |v| (v, before));
    }
    let filler = if is_double { get_reg(core, insn.op1_register()) } else { 0 };
    modify_op0(core, insn, size, |v| shifted(op, size, v & mask(size), filler, count, before))
}

/// The result of a shift or rotate by a count that is not 0, and all status flags.
///
/// # Panics
/// Never: every processor has them.
#[must_use]
pub fn shifted(op: Open, size: usize, v: u64, filler: u64, count: u32, before: u64) -> (u64, u64) {
    let (computers, flags) =
        as_the_computer(op, size, [v, filler, count.into()], before).expect("every processor has it");
    let result = match op {
        Open::Shl => ((u128::from(v) << count) as u64) & mask(size),
        Open::Shr => v >> count,
        Open::Sar => (sign_extend(size, v).cast_signed() >> count).cast_unsigned() & mask(size),
        // What a word has when it is shifted by more than its width is open as well.
        Open::Shld | Open::Shrd if count > 8 * size as u32 => computers & mask(size),
        Open::Shld => left_double(size, v, filler, count),
        Open::Shrd => right_double(size, v, filler, count),
        _ => rotate(op, size, v, count, before & CF),
    };
    (result, flags)
}

/// `dst:filler` moved left.
fn left_double(size: usize, v: u64, filler: u64, count: u32) -> u64 {
    let n = 8 * size as u32;
    let wide = u128::from(v) << n | u128::from(filler & mask(size));
    (wide << count >> n) as u64 & mask(size)
}

/// `filler:dst` moved right.
fn right_double(size: usize, v: u64, filler: u64, count: u32) -> u64 {
    let wide = u128::from(filler) << (8 * size) | u128::from(v);
    (wide >> count) as u64 & mask(size)
}

fn rotate(op: Open, size: usize, v: u64, count: u32, carry: u64) -> u64 {
    let n = 8 * size as u32;
    let wide = u128::from(v);
    match op {
        Open::Rol | Open::RolBy => ((wide << n | wide) << (count % n) >> n) as u64 & mask(size),
        Open::Ror | Open::RorBy => ((wide << n | wide) >> (count % n)) as u64 & mask(size),
        // Through carry: n + 1 bits go round.
        Open::Rcl => through_carry(n, v, carry, count % (n + 1)),
        _ => through_carry(n, v, carry, (n + 1 - count % (n + 1)) % (n + 1)),
    }
}

/// Rotate carry:value of `n + 1` bits left.
fn through_carry(n: u32, v: u64, carry: u64, count: u32) -> u64 {
    let ring = u128::from(carry) << n | u128::from(v);
    let r = if count == 0 { ring } else { ring << count | ring >> (n + 1 - count) };
    r as u64 & (u64::MAX >> (64 - n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::bits::rflags::{AF, OF, PF, SF, ZF};

    #[test]
    fn flags_that_the_manual_defines() {
        let go = |op, size, v, count, before| {
            let (r, f) = shifted(op, size, v, 0, count, before);
            (r, f & if count == 1 { CF | PF | ZF | SF | OF } else { CF | PF | ZF | SF })
        };
        assert_eq!((0x8000_0000, CF | PF | SF), go(Open::Shl, 4, 0x1800_0000, 4, 0));
        assert_eq!((0x8000_0000, PF | SF | OF), go(Open::Shl, 4, 0x4000_0000, 1, 0));
        assert_eq!((0, CF | PF | ZF), go(Open::Shl, 1, 0xFF, 8, 0));
        assert_eq!((0x4000_0004, OF), go(Open::Shr, 4, 0x8000_0008, 1, 0));
        assert_eq!((0xFF, CF | PF | SF), go(Open::Sar, 1, 0xFF, 7, 0));
        assert_eq!(1 << 63, go(Open::Shl, 8, 1, 63, 0).0);
        assert_eq!((0x84, PF | ZF), go(Open::Rol, 1, 0x90, 3, PF | ZF));
        assert_eq!((1, CF), go(Open::Rol, 1, 1, 8, 0));
        assert_eq!((0x81, CF), go(Open::Ror, 1, 0x81, 8, 0));
        assert_eq!((0x82, 0), go(Open::Rcl, 1, 0x90, 3, 0));
        assert_eq!((0x86, 0), go(Open::Rcl, 1, 0x90, 3, CF));
        assert_eq!((0x90, CF), go(Open::Rcl, 1, 0x90, 9, CF));
        assert_eq!((0x32, CF), go(Open::Rcr, 1, 0x94, 3, CF));
        assert_eq!((0x40, CF), go(Open::Rcr, 1, 2, 2, CF));
        assert_eq!((1, CF | OF), go(Open::Rcl, 8, 1 << 63, 1, CF));
        assert_eq!(AF, shifted(Open::Rol, 1, 1, 0, 1, AF).1 & AF);
    }

    #[test]
    fn double_shifts_take_bits_from_the_filler() {
        let go = |op, size, v, filler, count| shifted(op, size, v, filler, count, 0);
        assert_eq!(0x8000_000A, go(Open::Shld, 4, 0x1800_0000, 0xA000_0000, 4).0);
        assert_eq!(0xA180_0000, go(Open::Shrd, 4, 0x1800_0008, 0xA, 4).0);
        assert_eq!(0x8000, go(Open::Shld, 2, 1, 0x8000, 16).0);
        assert_eq!(3, go(Open::Shld, 8, 1 << 62 | 1, 1 << 63, 1).0 & 3);
        assert_eq!(1 << 63, go(Open::Shrd, 8, 0, 1, 1).0);
    }

    /// All results that the manual defines are those of the computer.
    #[test]
    fn results_are_the_computers() {
        let mut v = 0x9E37_79B9_7F4A_7C15_u64;
        let singles = [Open::Shl, Open::Shr, Open::Sar, Open::Rol, Open::Ror, Open::Rcl, Open::Rcr];
        for step in 0..20_000_u32 {
            v = v.rotate_left(7).wrapping_mul(0x2545_F491_4F6C_DD1D) ^ u64::from(step);
            let (size, filler, carry) = (1 << (step & 3), !v.rotate_left(29), v >> 40 & CF);
            let count = (v >> 50) as u32 & if size == 8 { 63 } else { 31 };
            let doubles: &[Open] =
                if size > 1 && count <= 8 * size as u32 { &[Open::Shld, Open::Shrd] } else { &[] };
            for &op in singles.iter().chain(doubles).filter(|_| count != 0) {
                let (v, operands) = (v & mask(size), [v & mask(size), filler, count.into()]);
                let (ours, _) = shifted(op, size, v, filler, count, carry);
                let (theirs, _) = as_the_computer(op, size, operands, carry).unwrap();
                assert_eq!(theirs & mask(size), ours, "{op:?} {size} {v:#x} {count}");
            }
        }
    }
}
