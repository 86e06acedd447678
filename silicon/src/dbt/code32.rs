//! 32-bit code on a computer in 64-bit mode: which instructions need another encoding, and which
//! have to be interpreted.
//!
//! Registers keep their numbers, and what is 32 bits wide clears the upper halves, so most
//! instructions are what they are in 64-bit code.  Addresses are computed with 32 bits.  The
//! segments CS, DS, ES and SS are flat, or nothing is translated ([`super::mode`]); FS and GS may
//! have a base, but no limit.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::kinds::has_memory;
use super::mode::{MODE_FS, MODE_GS};

/// The same instruction in an encoding that 64-bit mode has too.
pub(super) fn widen(mut insn: Instruction) -> Instruction {
    let code = match insn.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        _ => return insn,
    };
    insn.set_code(code);
    insn
}

/// Whether the instruction (of 32-bit code) has to be interpreted because of where it goes or
/// how it addresses memory.
pub(super) fn must_step(insn: &Instruction, mode: u32) -> bool {
    if insn.op0_kind() == OpKind::NearBranch16 {
        return true;
    }
    if !has_memory(insn) {
        return false;
    }
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let is_absolute = base == Register::None && index == Register::None;
    let width = if is_absolute { insn.memory_displ_size() as usize } else { base.size().max(index.size()) };
    if width != 4 {
        return true;
    }
    match insn.memory_segment() {
        Register::CS => true,
        Register::FS => mode & MODE_FS == 0 || is_absolute && !fits(insn),
        Register::GS => mode & MODE_GS == 0 || is_absolute && !fits(insn),
        _ => false,
    }
}

/// Whether the memory operand, whose address is known, ends below 4 GBytes.
fn fits(insn: &Instruction) -> bool {
    insn.memory_displacement64() + insn.memory_size().size() as u64 <= 1 << 32
}

/// The highest offset in FS or GS at which the memory operand ends below 4 GBytes, if its address
/// is not known before.
pub(super) fn last_offset(insn: &Instruction) -> Option<u32> {
    let is_absolute = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
    let size = insn.memory_size().size() as u32;
    (!is_absolute && size > 1).then(|| size.wrapping_neg())
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Mnemonic};

    use super::super::kinds::{Way, way};
    use super::*;

    /// Every instruction of 32-bit code that is re-encoded exists in 64-bit mode then.
    #[test]
    fn what_is_re_encoded_has_an_encoding() {
        let mut seen = 0;
        for code in Code::values().filter(|c| c.op_code().mode32() && !c.op_code().mode64()) {
            let mut insn = Instruction::default();
            insn.set_code(code);
            // MOV of a control, debug or test register is known by its operands.
            let is_system = code.mnemonic() == Mnemonic::Mov;
            let is_optional = code.op_code().decoder_option() != DecoderOptions::NONE;
            if is_system || is_optional || !matches!(way(&insn), Way::Native | Way::Vector | Way::Avx) {
                continue;
            }
            seen += 1;
            assert!(widen(insn).code().op_code().mode64(), "{code:?}");
        }
        assert_eq!(12, seen);
    }

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(32, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    #[test]
    fn inc_and_dec_get_the_long_encoding() {
        let insn = widen(decode(&[0x46])); // inc esi
        let mut encoder = Encoder::new(64);
        encoder.encode(&insn, 0x1000).unwrap();
        assert_eq!(vec![0xFF, 0xC6], encoder.take_buffer());
    }

    #[test]
    fn segments_that_may_have_a_limit_are_interpreted() {
        let percpu = decode(&[0x64, 0xA1, 0x10, 0, 0, 0]); // mov eax,[fs:10h]
        assert_eq!((true, false), (must_step(&percpu, 0), must_step(&percpu, MODE_FS)));
        let last = decode(&[0x65, 0xA1, 0xFD, 0xFF, 0xFF, 0xFF]); // mov eax,[gs:0FFFFFFFDh]
        assert!(must_step(&last, MODE_GS));
        let flat = decode(&[0x36, 0x8B, 0x03]); // mov eax,[ss:ebx]
        assert!(!must_step(&flat, 0));
        let short = decode(&[0x67, 0x8B, 0x07]); // mov eax,[bx]
        assert!(must_step(&short, MODE_FS | MODE_GS));
        assert_eq!(Some(0xFFFF_FFFC), last_offset(&decode(&[0x65, 0x8B, 0x03])));
    }
}
