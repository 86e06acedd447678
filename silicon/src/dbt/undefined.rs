//! What this computer's processor does where the manual leaves it open.
//!
//! Generated code runs such instructions as themselves, so the interpreters ask the computer: for flags that
//! are undefined, which Intel's and AMD's processors leave in ways of their own, and for the results of a
//! double shift of a word by more than its width, and of a scan of 0.
//!
//! Source: SDM 2, the instructions' own pages.

use std::arch::asm;
use std::sync::LazyLock;

use crate::arch::bits::rflags::{ARITH, OF};
use crate::cpu::flags::{mask, sign_extend};
use crate::cpu::state::Fx;

/// Instructions that the manual leaves something open of: flags mostly, of words also the result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // they are mnemonics
pub enum Open {
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    /// Of a register, by a number in the instruction.
    RolBy,
    /// Of a register, by a number in the instruction.
    RorBy,
    Rcl,
    Rcr,
    Shld,
    Shrd,
    Mul,
    /// Of one operand.
    ImulWide,
    Imul,
    Div,
    Idiv,
    Bsf,
    Bsr,
    Tzcnt,
    Lzcnt,
    Andn,
    Bextr,
    Bzhi,
    Blsi,
    Blsmsk,
    Blsr,
}

/// All of them, by the names that Python has for them.
pub const OPEN: [(&str, Open); 26] = [
    ("shl", Open::Shl),
    ("shr", Open::Shr),
    ("sar", Open::Sar),
    ("rol", Open::Rol),
    ("ror", Open::Ror),
    ("rol by", Open::RolBy),
    ("ror by", Open::RorBy),
    ("rcl", Open::Rcl),
    ("rcr", Open::Rcr),
    ("shld", Open::Shld),
    ("shrd", Open::Shrd),
    ("mul", Open::Mul),
    ("imul", Open::Imul),
    ("imul wide", Open::ImulWide),
    ("div", Open::Div),
    ("idiv", Open::Idiv),
    ("bsf", Open::Bsf),
    ("bsr", Open::Bsr),
    ("tzcnt", Open::Tzcnt),
    ("lzcnt", Open::Lzcnt),
    ("andn", Open::Andn),
    ("bextr", Open::Bextr),
    ("bzhi", Open::Bzhi),
    ("blsi", Open::Blsi),
    ("blsmsk", Open::Blsmsk),
    ("blsr", Open::Blsr),
];

/// The template, executed: RAX and the flags behind it.
macro_rules! go {
    ($v:ident, $before:ident, $($text:literal),+) => {{
        let (result, after): (u64, u64);
        // SAFETY: the flags that are loaded are status flags, which no ABI keeps; the stack is as before at
        // the end; of registers the instruction writes RAX and RDX at most; it accesses no memory, and does
        // not fault: a division that would was refused.
        unsafe {
            asm!(
                "push {before}", "popfq", concat!($($text),+), "pushfq", "pop {after}",
                before = in(reg) $before, after = lateout(reg) after,
                inout("rax") $v[0] => result, inout("rdx") $v[1] => _, in("rcx") $v[2],
            );
        }
        (result, after)
    }};
}

/// By the size of the operand, 8 bits too: the registers' names go behind the mnemonic.
macro_rules! sized {
    ($v:ident, $before:ident, $size:ident, $name:literal, $r1:literal $r2:literal $r4:literal $r8:literal) => {
        match $size {
            1 => go!($v, $before, $name, $r1),
            2 => go!($v, $before, $name, $r2),
            4 => go!($v, $before, $name, $r4),
            _ => go!($v, $before, $name, $r8),
        }
    };
    ($v:ident, $before:ident, $size:ident, $name:literal, $r2:literal $r4:literal $r8:literal) => {
        match $size {
            1 | 2 => go!($v, $before, $name, $r2),
            4 => go!($v, $before, $name, $r4),
            _ => go!($v, $before, $name, $r8),
        }
    };
    ($v:ident, $before:ident, $size:ident, $name:literal, $r4:literal $r8:literal) => {
        match $size {
            8 => go!($v, $before, $name, $r8),
            _ => go!($v, $before, $name, $r4),
        }
    };
}

/// What this computer makes of one of them: RAX, where the result is (its low half), and the status flags.
///
/// `a`: the first operand, for a division the low half of the dividend.  `b`: the second one: of SHLD and SHRD
/// the filler, of a division the upper half of the dividend, of a scan, a count or a field its source.  `c`: the
/// count of a shift, the factor of MUL, a divisor that fits, what BEXTR and BZHI take their place from, the
/// second source of ANDN.  Operands of `size` bytes; `before`: the status flags.
///
/// `None` for what this computer's processor has not got, and for a division that faults.
#[must_use]
pub fn as_the_computer(op: Open, size: usize, [a, b, c]: [u64; 3], before: u64) -> Option<(u64, u64)> {
    let v = [a, b, c];
    let f = before & ARITH | 2;
    let is_there = match op {
        Open::Tzcnt | Open::Andn | Open::Bextr | Open::Blsi | Open::Blsmsk | Open::Blsr => {
            is_x86_feature_detected!("bmi1")
        }
        Open::Bzhi => is_x86_feature_detected!("bmi2"),
        Open::Lzcnt => is_x86_feature_detected!("lzcnt"),
        Open::Div | Open::Idiv => divide(op == Open::Idiv, size, v).is_some(),
        _ => true,
    };
    let (result, after) = match op {
        _ if !is_there => return None,
        Open::Shl => sized!(v, f, size, "shl ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Shr => sized!(v, f, size, "shr ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Sar => sized!(v, f, size, "sar ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Rol | Open::RolBy => sized!(v, f, size, "rol ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Ror | Open::RorBy => sized!(v, f, size, "ror ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Rcl => sized!(v, f, size, "rcl ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Rcr => sized!(v, f, size, "rcr ", "al, cl" "ax, cl" "eax, cl" "rax, cl"),
        Open::Shld => sized!(v, f, size, "shld ", "ax, dx, cl" "eax, edx, cl" "rax, rdx, cl"),
        Open::Shrd => sized!(v, f, size, "shrd ", "ax, dx, cl" "eax, edx, cl" "rax, rdx, cl"),
        Open::Mul => sized!(v, f, size, "mul ", "cl" "cx" "ecx" "rcx"),
        Open::ImulWide => sized!(v, f, size, "imul ", "cl" "cx" "ecx" "rcx"),
        Open::Imul => sized!(v, f, size, "imul ", "ax, dx" "eax, edx" "rax, rdx"),
        Open::Div => sized!(v, f, size, "div ", "cl" "cx" "ecx" "rcx"),
        Open::Idiv => sized!(v, f, size, "idiv ", "cl" "cx" "ecx" "rcx"),
        Open::Bsf => sized!(v, f, size, "bsf ", "ax, dx" "eax, edx" "rax, rdx"),
        Open::Bsr => sized!(v, f, size, "bsr ", "ax, dx" "eax, edx" "rax, rdx"),
        Open::Tzcnt => sized!(v, f, size, "tzcnt ", "ax, dx" "eax, edx" "rax, rdx"),
        Open::Lzcnt => sized!(v, f, size, "lzcnt ", "ax, dx" "eax, edx" "rax, rdx"),
        Open::Andn => sized!(v, f, size, "andn ", "eax, edx, ecx" "rax, rdx, rcx"),
        Open::Bextr => sized!(v, f, size, "bextr ", "eax, edx, ecx" "rax, rdx, rcx"),
        Open::Bzhi => sized!(v, f, size, "bzhi ", "eax, edx, ecx" "rax, rdx, rcx"),
        Open::Blsi => sized!(v, f, size, "blsi ", "eax, edx" "rax, rdx"),
        Open::Blsmsk => sized!(v, f, size, "blsmsk ", "eax, edx" "rax, rdx"),
        Open::Blsr => sized!(v, f, size, "blsr ", "eax, edx" "rax, rdx"),
    };
    let steps = c & if size == 8 { 63 } else { 31 };
    let is_kept = matches!(op, Open::RolBy | Open::RorBy) && steps != 1 && *OVERFLOW_STAYS;
    let kept = if is_kept { OF } else { 0 };
    Some((result, after & ARITH & !kept | before & kept))
}

/// OF stays as it was in a rotation of a register by a number in the instruction, other than 1.
static OVERFLOW_STAYS: LazyLock<bool> = LazyLock::new(|| {
    let (operands, none) = ([0x6000_0000_u64, 0, 2], 2_u64); // OF: of the first step, or of the last
    let by_count = go!(operands, none, "rol eax, cl").1;
    let by_number = go!(operands, none, "rol eax, 2").1;
    by_count & OF != by_number & OF
});

/// The quotient and the remainder of a division, as [`as_the_computer`] takes its operands.  `None`: #DE.
#[must_use]
pub fn divide(is_signed: bool, size: usize, [a, b, c]: [u64; 3]) -> Option<(u64, u64)> {
    let (n, m) = (8 * size as u32, mask(size));
    let dividend =
        if size == 1 { u128::from(a & 0xFFFF) } else { u128::from(b & m) << n | u128::from(a & m) };
    if !is_signed {
        let by = u128::from(c & m);
        let quotient = dividend.checked_div(by)?;
        return (quotient <= u128::from(m)).then(|| (quotient as u64, (dividend % by) as u64));
    }
    let signed = |v: u64| i128::from(sign_extend(size, v).cast_signed());
    let unused = 128 - 2 * n;
    let (dividend, by) = ((dividend << unused).cast_signed() >> unused, signed(c));
    let quotient = dividend.checked_div(by)?;
    let is_narrow = quotient == signed(quotient as u64);
    is_narrow.then(|| (quotient as u64 & m, (dividend % by) as u64 & m))
}

/// The status flags behind one that every processor has.
///
/// # Panics
/// BMI1, BMI2 or LZCNT, and the computer lacks it.
#[must_use]
pub fn flags_of(op: Open, size: usize, operands: [u64; 3], before: u64) -> u64 {
    as_the_computer(op, size, operands, before).expect("every processor has it").1
}

/// FOP in the image that [`x87_images`] restores.
pub const X87_MARK: u16 = 0x123;

/// What the processor tells of its last x87 instruction, a load from memory, without an exception: the
/// environment behind it, and that behind an FXRSTOR64 of an image with [`X87_MARK`]; and the image of FXSAVE64.
/// The x87 registers, which may be the guest's, are as before at the end.
#[must_use]
pub fn x87_images() -> ([[u32; 7]; 2], Fx) {
    let (mut image, mut environments, one) = (Fx([0; 512]), [[0_u32; 7]; 2], 1.0_f64);
    let (mut marked, mut before) = (Fx([0; 512]), Fx([0; 512]));
    // SAFETY: aligned images and environments of the right size; the registers are those of the start at the
    // end.
    unsafe {
        asm!(
            "fxsave64 [{before}]",
            "fninit", "fld qword ptr [{one}]", "fxsave64 [{image}]", "fnstenv [{env}]",
            "fxsave64 [{marked}]", "mov word ptr [{marked} + 6], {mark}",
            "fninit", "fxrstor64 [{marked}]", "fnstenv [{env} + 28]",
            "fxrstor64 [{before}]",
            one = in(reg) &raw const one, image = in(reg) &raw mut image,
            marked = in(reg) &raw mut marked, env = in(reg) environments.as_mut_ptr(),
            before = in(reg) &raw mut before, mark = const X87_MARK,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    (environments, image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_ask_for_the_pointers_leaves_the_x87_alone() {
        let (unusual, mut control): (u16, u16) = (0xC60, 0);
        // SAFETY: control words of the right size; the one that was there comes back.
        unsafe {
            let mut ours: u16 = 0;
            asm!("fnstcw [{}]", "fldcw [{}]", in(reg) &raw mut ours, in(reg) &raw const unusual);
            let _ = x87_images();
            asm!("fnstcw [{}]", "fldcw [{}]", in(reg) &raw mut control, in(reg) &raw const ours);
        }
        assert_eq!(unusual, control);
    }
}
