//! What this computer's processor does where the manual leaves it open.
//!
//! Generated code runs such instructions as themselves, so the interpreter does as the computer does.
//! Source: SDM 2A, "BSF" and "BSR": CF, OF, SF, AF and PF are undefined.  Processors of one maker
//! clear them, those of another leave them as they were.

use std::arch::asm;
use std::sync::LazyLock;

use crate::arch::bits::rflags::{AF, CF, OF, PF, SF, ZF};
use crate::cpu::state::Fx;

/// Whether BSF and BSR change no flag but ZF.
#[must_use]
pub fn scans_keep_flags() -> bool {
    static KEPT: LazyLock<bool> = LazyLock::new(|| {
        let (before, after): (u64, u64) = (CF | PF | AF | ZF | SF | OF, flags_after_bsf());
        after & before == before & !ZF
    });
    *KEPT
}

/// The flags after BSF of 2, with all status flags set before.
fn flags_after_bsf() -> u64 {
    let after: u64;
    // SAFETY: the flags that are loaded are status flags, which no ABI keeps; the stack is as before
    // at the end; nothing else is touched.
    unsafe {
        asm!(
            "push {before}",
            "popfq",
            "bsf {found}, {word}",
            "pushfq",
            "pop {after}",
            before = in(reg) CF | PF | AF | ZF | SF | OF | 2,
            word = in(reg) 2_u64,
            found = out(reg) _,
            after = lateout(reg) after,
        );
    }
    after
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
