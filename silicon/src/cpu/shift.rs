//! Shifts and rotates.
//!
//! Flags that the manual leaves undefined (OF for counts other than 1, AF, CF of a shift by more
//! than the width) are as the processors of the AMD Zen family leave them.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::rflags::{AF, ARITH, CF, OF};
use crate::cpu::flags::{mask, of_result, sign_extend};
use crate::cpu::operand::{get_reg, modify_op0, read_op, size_of_op};
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;

/// Execute an instruction of this group.
///
/// # Errors
/// What the memory access raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    let size = size_of_op(insn, 0);
    let mnemonic = insn.mnemonic();
    let is_double = matches!(mnemonic, M::Shld | M::Shrd);
    let count = read_op(core, insn, if is_double { 2 } else { 1 })?;
    let count = count as u32 & if size == 8 { 63 } else { 31 };
    let before = core.rflags & ARITH;
    if count == 0 {
        return modify_op0(core, insn, size, |v| (v, before));
    }
    match mnemonic {
        M::Shl | M::Sal => modify_op0(core, insn, size, |v| left(size, v, count)),
        M::Shr => modify_op0(core, insn, size, |v| right(size, v & mask(size), count)),
        M::Sar => modify_op0(core, insn, size, |v| right_signed(size, v, count)),
        M::Shld | M::Shrd => {
            let filler = get_reg(core, insn.op1_register());
            let double = if mnemonic == M::Shld { left_double } else { right_double };
            modify_op0(core, insn, size, |v| double(size, v & mask(size), filler, count))
        }
        _ => {
            let keep = before & !(CF | OF);
            modify_op0(core, insn, size, |v| {
                let (r, f) = rotate(mnemonic, size, v & mask(size), count, before & CF);
                (r, keep | f)
            })
        }
    }
}

fn bit(v: u64, n: usize) -> u64 {
    v >> n & 1
}

/// OF of what moves left: whether the last step changed the sign.
fn over_left(size: usize, r: u64, carry: u64) -> u64 {
    (bit(r, 8 * size - 1) ^ carry) * OF
}

/// OF of what moves right: whether the two highest bits differ.
fn over_right(size: usize, r: u64) -> u64 {
    (bit(r, 8 * size - 1) ^ bit(r, 8 * size - 2)) * OF
}

pub(crate) fn left(size: usize, v: u64, count: u32) -> (u64, u64) {
    let wide = u128::from(v) << count;
    let (r, carry) = (wide as u64 & mask(size), (wide >> (8 * size)) as u64 & 1);
    (r, of_result(size, r) | AF | (carry * CF) | over_left(size, r, carry))
}

pub(crate) fn right(size: usize, v: u64, count: u32) -> (u64, u64) {
    let r = v >> count;
    (r, of_result(size, r) | AF | ((v >> (count - 1) & 1) * CF) | over_right(size, r))
}

pub(crate) fn right_signed(size: usize, v: u64, count: u32) -> (u64, u64) {
    let v = sign_extend(size, v).cast_signed();
    let r = (v >> count).cast_unsigned() & mask(size);
    (r, of_result(size, r) | AF | (((v >> (count - 1)).cast_unsigned() & 1) * CF))
}

/// `dst:filler` moved left.  Counts above the width (possible for words) bring `filler` again.
fn left_double(size: usize, v: u64, filler: u64, count: u32) -> (u64, u64) {
    let n = 8 * size as u32;
    let (r, carry) = if count <= n && n == 64 {
        let wide = u128::from(v) << 64 | u128::from(filler);
        ((wide << count >> 64) as u64, v >> (64 - count) & 1)
    } else {
        let wide = u128::from(v) << (2 * n) | u128::from(filler) << n | u128::from(filler);
        ((wide << count >> (2 * n)) as u64 & mask(size), if count > n { 0 } else { v >> (n - count) & 1 })
    };
    // From the full width on, nothing of the old sign is left to compare the carry with.
    let over = if count < n { over_left(size, r, carry) } else { carry * OF };
    (r, of_result(size, r) | AF | (carry * CF) | over)
}

/// `filler:dst` moved right.
fn right_double(size: usize, v: u64, filler: u64, count: u32) -> (u64, u64) {
    let n = 8 * size as u32;
    let carry = if count > n { 0 } else { v >> (count - 1) & 1 };
    let r = if n == 64 {
        ((u128::from(filler) << 64 | u128::from(v)) >> count) as u64
    } else {
        let wide = u128::from(filler) << (2 * n) | u128::from(filler) << n | u128::from(v);
        (wide >> count) as u64 & mask(size)
    };
    (r, of_result(size, r) | AF | (carry * CF) | over_right(size, r))
}

fn rotate(mnemonic: Mnemonic, size: usize, v: u64, count: u32, carry: u64) -> (u64, u64) {
    let n = 8 * size as u32;
    let wide = u128::from(v);
    match mnemonic {
        Mnemonic::Rol => {
            let r = ((wide << n | wide) << (count % n) >> n) as u64 & mask(size);
            let carry = r & 1;
            (r, (carry * CF) | over_left(size, r, carry))
        }
        Mnemonic::Ror => {
            let r = ((wide << n | wide) >> (count % n)) as u64 & mask(size);
            (r, (bit(r, 8 * size - 1) * CF) | over_right(size, r))
        }
        // Through carry: n + 1 bits go round.
        Mnemonic::Rcl => {
            let (r, carry) = through_carry(n, v, carry, count % (n + 1));
            (r, (carry * CF) | over_left(size, r, carry))
        }
        _ => {
            let (r, carry) = through_carry(n, v, carry, (n + 1 - count % (n + 1)) % (n + 1));
            (r, (carry * CF) | over_right(size, r))
        }
    }
}

/// Rotate carry:value of `n + 1` bits left.
fn through_carry(n: u32, v: u64, carry: u64, count: u32) -> (u64, u64) {
    let ring = u128::from(carry) << n | u128::from(v);
    let r = if count == 0 { ring } else { ring << count | ring >> (n + 1 - count) };
    let value = r as u64 & (u64::MAX >> (64 - n));
    (value, (r >> n) as u64 & 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::bits::rflags::{PF, SF, ZF};

    #[test]
    fn shifts_leave_what_hardware_leaves() {
        assert_eq!((0x8000_0000, CF | PF | AF | SF), left(4, 0x1800_0000, 4));
        assert_eq!((0x8000_0000, PF | AF | SF | OF), left(4, 0x0800_0000, 4));
        assert_eq!((0, PF | AF | ZF), left(1, 0xFF, 9));
        assert_eq!((0, CF | PF | AF | ZF | OF), left(1, 0xFF, 8));
        assert_eq!((0x4000_0004, AF | OF), right(4, 0x8000_0008, 1));
        assert_eq!((0xFF, CF | PF | AF | SF), right_signed(1, 0xFF, 9));
        assert_eq!(1 << 63, left(8, 1, 63).0);
    }

    #[test]
    fn rotates_leave_what_hardware_leaves() {
        let go = |m, v, count, carry| rotate(m, 1, v, count, carry);
        assert_eq!((0x84, OF), go(Mnemonic::Rol, 0x90, 3, 0));
        assert_eq!((1, CF | OF), go(Mnemonic::Rol, 1, 8, 0));
        assert_eq!((0x81, CF | OF), go(Mnemonic::Ror, 0x81, 8, 0));
        assert_eq!((0x82, OF), go(Mnemonic::Rcl, 0x90, 3, 0));
        assert_eq!((0x86, OF), go(Mnemonic::Rcl, 0x90, 3, 1));
        assert_eq!((0x90, CF), go(Mnemonic::Rcl, 0x90, 9, 1));
        assert_eq!((0x32, CF), go(Mnemonic::Rcr, 0x94, 3, 1));
        assert_eq!((0x40, CF | OF), go(Mnemonic::Rcr, 2, 2, 1));
        assert_eq!(1, rotate(Mnemonic::Rcl, 8, 1 << 63, 1, 1).0);
    }

    #[test]
    fn double_shifts_take_bits_from_the_filler() {
        assert_eq!((0x8000_000A, CF | PF | AF | SF), left_double(4, 0x1800_0000, 0xA000_0000, 4));
        assert_eq!((0xA180_0000, CF | PF | AF | SF | OF), right_double(4, 0x1800_0008, 0xA, 4));
        assert_eq!((0xBCDA, AF | SF), left_double(2, 0x1234, 0xABCD, 20));
        assert_eq!((0x8000, CF | PF | AF | SF | OF), left_double(2, 1, 0x8000, 16));
        assert_eq!((0xDABC, AF | SF), right_double(2, 0x1234, 0xABCD, 20));
        assert_eq!(3, left_double(8, 1 << 62 | 1, 1 << 63, 1).0 & 3);
        assert_eq!(1 << 63, right_double(8, 0, 1, 1).0);
    }
}
