//! What this computer's processor does where the manual leaves it open.
//!
//! Generated code runs such instructions as themselves, so the interpreter does as the computer does.
//! Source: SDM 2A, "BSF" and "BSR": CF, OF, SF, AF and PF are undefined.  Processors of one maker
//! clear them, those of another leave them as they were.

use std::arch::asm;
use std::sync::LazyLock;

use crate::arch::bits::rflags::{AF, CF, OF, PF, SF, ZF};

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
