//! What instructions do to the arithmetic flags, as far as the translator must know.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// What an instruction does to the six arithmetic flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing.
    None,
    /// Sets all six from its operands alone.
    Overwrites,
    /// Reads some, changes none.
    Reads,
    /// Changes some, and the result depends on what they were.
    Changes,
}

const ARITH: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// See [`Effect`].
#[must_use]
pub fn effect(insn: &Instruction) -> Effect {
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        // Processors recompute OF even where the rotation comes full circle.
        return Effect::Changes;
    }
    let modified = insn.rflags_modified() & ARITH;
    let undefined = insn.rflags_undefined() & ARITH;
    let read = insn.rflags_read() & ARITH;
    if modified == 0 {
        return if read != 0 { Effect::Reads } else { Effect::None };
    }
    let is_certain = match insn.mnemonic() {
        Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test => true,
        // A count of zero leaves the flags alone; CL may be zero.
        Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Sal => {
            let mask =
                if insn.op0_register().size() == 8 || insn.memory_size().size() == 8 { 63 } else { 31 };
            insn.op1_kind() != OpKind::Register && insn.immediate(1) & mask != 0
        }
        _ => undefined == 0,
    };
    if modified == ARITH && read == 0 && is_certain { Effect::Overwrites } else { Effect::Changes }
}
