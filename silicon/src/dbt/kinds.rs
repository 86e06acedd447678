//! What kind of instruction it is, as far as the translator is concerned.

use iced_x86::{
    CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::asm::cc;
use super::avx::{is_avx, is_avx_feature};
use super::map::number;
use crate::cpu::operand::address_mask;
use crate::cpu::pointers;

/// Whether nothing of the block can follow this instruction.
pub(super) fn ends_block(insn: &Instruction) -> bool {
    match insn.flow_control() {
        FlowControl::Next => is_mode_change(insn),
        _ => true,
    }
}

/// Instructions after which the next one may have to be looked up under another mode.
fn is_mode_change(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Clac
            | M::Stac
            | M::Popf
            | M::Popfq
            | M::Popfd
            | M::Hlt
            | M::Clts
            | M::Lmsw
            | M::Wrmsr
            | M::Wrpkru
            | M::Xsetbv
    ) || matches!(insn.mnemonic(), M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64)
        || matches!(insn.mnemonic(), M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
        || (insn.mnemonic() == M::Mov && insn.op0_register().is_cr())
        || insn.op0_register().is_segment_register()
}

/// Whether a block goes on behind the instruction, a conditional jump, if it leads forward.
pub(super) fn may_fall_through(insn: &Instruction) -> bool {
    insn.is_jcc_short_or_near() || matches!(insn.mnemonic(), Mnemonic::Jrcxz | Mnemonic::Jecxz)
}

/// How an instruction is lowered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// Interpreted at its place.
    Step,
    /// Re-encoded for the computer.
    Native,
    /// Re-encoded, and it uses x87 or SSE state.
    Vector,
    /// Re-encoded, and it uses AVX state.
    Avx,
    /// Nothing to do.
    Nothing,
}

/// Whether the instruction is always interpreted (as far as its kind tells).
pub(super) fn is_interpreted(insn: &Instruction) -> bool {
    way(insn) == Way::Step
        && insn.flow_control() == FlowControl::Next
        && !insn.is_stack_instruction()
        && !super::strings::is_lowered(insn)
}

/// See [`Way`].
pub(super) fn way(insn: &Instruction) -> Way {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Lea
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Imul
        | M::Mul
        | M::Div
        | M::Idiv
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Crc32
        | M::Movbe
        | M::Bswap
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Lahf
        | M::Sahf
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx
        | M::Adcx
        | M::Adox
        | M::Bt
        | M::Bts
        | M::Btr
        | M::Btc => {
            if touches_system_register(insn) || is_far_bit(insn) {
                Way::Step
            } else {
                Way::Native
            }
        }
        M::Lfence | M::Sfence | M::Mfence => Way::Native,
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw => Way::Nothing,
        m if is_condition_of(m) => Way::Native,
        M::Ldmxcsr
        | M::Vldmxcsr
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Fnsave
        | M::Frstor
        | M::Fldenv
        | M::Fnstenv
        | M::Wait => Way::Step,
        // They change whether an exception is pending, of which the report of the last instruction depends.
        M::Fldcw | M::Fnclex if pointers::habits().wait_for_exceptions() => Way::Step,
        _ if is_vector(insn) => Way::Vector,
        _ if is_avx(insn) => Way::Avx,
        _ => Way::Step,
    }
}

fn is_condition_of(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

/// Whether the instruction has a native form that works on x87 or SSE state.
fn is_vector(insn: &Instruction) -> bool {
    insn.encoding() == EncodingKind::Legacy
        && insn.cpuid_features().iter().all(|&f| is_vector_feature(f) || f == CpuidFeature::CMOV)
}

/// Whether the interpreter may touch the x87/SSE state for this instruction.
pub(super) fn uses_vector_state(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    insn.mnemonic() == Mnemonic::Wait
        || insn.cpuid_features().iter().any(|&f| {
            is_vector_feature(f)
                || is_avx_feature(f)
                || matches!(f, F::FXSR | F::SSE4A | F::XSAVE | F::XSAVEC | F::XSAVEOPT | F::XSAVES)
        })
}

/// Whether it stores an MMX register: if that faults, some processors have turned the x87's stack already.
pub(super) fn stores_mmx(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register && insn.op1_register().is_mm()
}

/// Whether it is an x87 instruction.
pub(super) fn is_x87(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    insn.mnemonic() == Mnemonic::Fisttp
        || insn.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

fn is_vector_feature(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
    )
}

fn touches_system_register(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register && {
            let r = insn.op_register(i);
            r.is_segment_register() || r.is_cr() || r.is_dr()
        }
    })
}

/// Whether it pushes a segment register as a word of so many bytes.
pub(super) fn pushes_selector(insn: &Instruction, word: i64) -> bool {
    insn.mnemonic() == Mnemonic::Push
        && insn.op0_register().is_segment_register()
        && i64::from(insn.stack_pointer_increment()) == -word
}

/// BT and its kin with a register offset reach beyond their operand.
pub(super) fn is_far_bit(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
}

/// Whether 64-bit code gives its memory operand an address of 32 bits.
pub(super) fn is_short(insn: &Instruction) -> bool {
    address_mask(insn) != u64::MAX
}

/// By number: the general registers that the instruction writes, or may write.
pub(super) fn written(info: &mut InstructionInfoFactory, insn: &Instruction) -> [bool; 16] {
    let mut out = [false; 16];
    for r in info.info(insn).used_registers() {
        let writes = !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        if writes && r.register().is_gpr() {
            out[number(r.register())] = true;
        }
    }
    out
}

/// Whether an operand is in memory.
pub(super) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Whether the memory operand's segment may have a base, in 64-bit code or where the others are flat.
pub(super) fn has_base(insn: &Instruction) -> bool {
    matches!(insn.memory_segment(), Register::FS | Register::GS)
}

/// The condition code of a Jcc, as encoded.
pub(super) fn condition(insn: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => cc::E,
        C::ne => cc::NE,
        C::be => 6,
        C::a => cc::A,
        C::s => cc::S,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}
