//! Instructions encoded with VEX, and the upper halves of the YMM registers ([`crate::cpu::upper`]), which
//! are in the computer's registers while generated code runs, if they are in use.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use super::asm::state;
use super::translate::Translator;
use crate::cpu::avx::is_special;
use crate::cpu::upper;
use crate::cpu::vector::is_known;

/// Whether it is encoded with VEX, works on AVX state, and can be re-encoded for this computer.
pub(super) fn is_avx(insn: &Instruction) -> bool {
    insn.encoding() == EncodingKind::VEX
        && insn.cpuid_features().iter().any(|&f| is_avx_feature(f))
        && (clears_upper(insn) || !is_special(insn))
        && is_known(insn)
}

/// Whether what a feature adds works on AVX state.
pub(super) fn is_avx_feature(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(f, F::AVX | F::AVX2 | F::FMA | F::F16C)
}

/// Whether it leaves every upper half zero, in 64-bit code.
pub(super) fn clears_upper(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Vzeroall | Mnemonic::Vzeroupper)
}

impl Translator<'_> {
    /// Before an instruction is executed that may give upper halves other values than zero: they are in use.
    /// (It is said each time: what an interpreted instruction leaves of them may be nothing.)
    pub(super) fn note_upper(&mut self, insn: &Instruction) {
        let fills = insn.encoding() == EncodingKind::VEX
            && insn.op0_kind() == OpKind::Register
            && insn.op0_register().is_ymm();
        if fills {
            self.a.store_imm(state(upper::IN_USE), 1);
        }
    }

    /// VZEROUPPER, VZEROALL.  Returns false, having emitted nothing, where they leave some registers alone.
    pub(super) fn clear_upper(&mut self, insn: &Instruction) -> bool {
        if self.is_32 {
            return false;
        }
        let is_all = insn.mnemonic() == Mnemonic::Vzeroall;
        self.a.raw(&[0xC5, if is_all { 0xFC } else { 0xF8 }, 0x77]);
        self.a.store_imm(state(upper::IN_USE), 0);
        true
    }
}
