//! The arithmetic flags: what additions, subtractions and logic leave, and the conditions.
//!
//! Operands may have rubbish above their size; results come masked.  Flags are returned as
//! RFLAGS bits, all six of [`crate::arch::bits::rflags::ARITH`]; the AF of logic, which is undefined,
//! is clear, as on all processors of today.

use iced_x86::ConditionCode;

use crate::arch::bits::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};
use crate::cpu::state::Core;

/// All ones in an operand of `size` bytes.
#[inline]
#[must_use]
pub fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// The highest bit of an operand of `size` bytes.
#[inline]
#[must_use]
pub fn top(size: usize) -> u64 {
    1 << (8 * size - 1)
}

/// The operand's value, sign-extended to 64 bits.
#[inline]
#[must_use]
pub fn sign_extend(size: usize, v: u64) -> u64 {
    let unused = 64 - 8 * size as u32;
    ((v << unused).cast_signed() >> unused).cast_unsigned()
}

/// ZF, SF and PF of a result.
#[inline]
#[must_use]
pub fn of_result(size: usize, r: u64) -> u64 {
    let r = r & mask(size);
    let even = u64::from((r as u8).count_ones() & 1 == 0);
    let zero = u64::from(r == 0);
    (zero * ZF) | ((r >> (8 * size - 1)) * SF) | (even * PF)
}

/// `a + b + carry` and its flags.
#[inline]
#[must_use]
pub fn add(size: usize, a: u64, b: u64, carry: u64) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(carry);
    let n = 8 * size - 1;
    let carries = (a & b) | ((a | b) & !r);
    let over = (a ^ r) & (b ^ r);
    let f = ((carries >> n & 1) * CF) | ((over >> n & 1) * OF) | ((a ^ b ^ r) & AF);
    (r & mask(size), f | of_result(size, r))
}

/// `a - b - borrow` and its flags.
#[inline]
#[must_use]
pub fn sub(size: usize, a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow);
    let n = 8 * size - 1;
    let borrows = (!a & b) | ((!a | b) & r);
    let over = (a ^ b) & (a ^ r);
    let f = ((borrows >> n & 1) * CF) | ((over >> n & 1) * OF) | ((a ^ b ^ r) & AF);
    (r & mask(size), f | of_result(size, r))
}

/// The flags after a bitwise operation with this result.
#[inline]
#[must_use]
pub fn logic(size: usize, r: u64) -> (u64, u64) {
    (r & mask(size), of_result(size, r))
}

/// Whether a condition holds under these RFLAGS.
#[inline]
#[must_use]
pub fn holds(f: u64, condition: ConditionCode) -> bool {
    let is = |bit: u64| f & bit != 0;
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => is(OF),
        ConditionCode::no => !is(OF),
        ConditionCode::b => is(CF),
        ConditionCode::ae => !is(CF),
        ConditionCode::e => is(ZF),
        ConditionCode::ne => !is(ZF),
        ConditionCode::be => is(CF | ZF),
        ConditionCode::a => !is(CF | ZF),
        ConditionCode::s => is(SF),
        ConditionCode::ns => !is(SF),
        ConditionCode::p => is(PF),
        ConditionCode::np => !is(PF),
        ConditionCode::l => is(SF) != is(OF),
        ConditionCode::ge => is(SF) == is(OF),
        ConditionCode::le => is(ZF) || is(SF) != is(OF),
        ConditionCode::g => !is(ZF) && is(SF) == is(OF),
    }
}

impl Core {
    /// Replace the six arithmetic flags.
    #[inline]
    pub fn set_arith(&mut self, flags: u64) {
        self.set_flags(ARITH, flags);
    }

    /// Replace the flags in `which`.
    #[inline]
    pub fn set_flags(&mut self, which: u64, flags: u64) {
        self.rflags = self.rflags & !which | flags & which;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_addition_and_subtraction_agree_with_arithmetic_in_wider_numbers() {
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                for c in 0..=1 {
                    let signed = |v: u64| i64::from(v as u8 as i8);
                    let c_signed = c as i64;
                    let (r, f) = add(1, a, b, c);
                    let wide = signed(a) + signed(b) + c_signed;
                    assert_eq!((a + b + c) & 255, r);
                    assert_eq!(a + b + c > 255, f & CF != 0);
                    assert_eq!((a & 15) + (b & 15) + c > 15, f & AF != 0);
                    assert_eq!(!(-128..=127).contains(&wide), f & OF != 0);
                    let (r, f) = sub(1, a, b, c);
                    let wide = signed(a) - signed(b) - c_signed;
                    assert_eq!(a.wrapping_sub(b + c) & 255, r);
                    assert_eq!(a < b + c, f & CF != 0);
                    assert_eq!(a & 15 < (b & 15) + c, f & AF != 0);
                    assert_eq!(!(-128..=127).contains(&wide), f & OF != 0);
                    assert_eq!((r == 0, r > 127), (f & ZF != 0, f & SF != 0));
                }
            }
        }
    }

    #[test]
    fn parity_counts_the_low_byte_only() {
        assert_eq!((PF, 0), (of_result(4, 0x1_03) & PF, of_result(4, 0x3_01) & PF));
    }
}
