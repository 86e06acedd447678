//! What the makers of processors do each in their own way (docs/reference/vendor-differences.md).

use iced_x86::{Code, CpuidFeature as F, Instruction, Mnemonic, OpCodeTableKind, OpKind};
use silicon::cpu::pointers;

use crate::areas;
use crate::case::{Outcome, Start};
use crate::session::any;

/// The SHA extensions: AMD's processors take a misaligned operand.
pub fn is_lax_on_amd(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&F::SHA) && insn.op1_kind() == OpKind::Memory
}

/// 0F 0D with a register: nothing on Intel's processors, #UD on AMD's.
/// F3 90 with REX.B: PAUSE, or XCHG with R8.  MOVSXD of 16 bits reads 2 bytes or 4.
pub fn differs_by_maker(insn: &Instruction) -> bool {
    let o = insn.code().op_code();
    if insn.mnemonic() == Mnemonic::Pause && insn.len() > 2 || insn.code() == Code::Movsxd_r16_rm16 {
        return true;
    }
    o.table() == OpCodeTableKind::T0F && o.op_code() == 0x0D && insn.op0_kind() == OpKind::Register
}

/// Whether an instruction's memory image differs between processors (the mask of MXCSR).
pub fn has_mask(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64)
        || areas::is_area(insn) && !areas::restores(insn)
}

/// Whether it stores the last-instruction pointers, which Linux drops when it switches programs.
pub fn has_pointers(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) || has_mask(insn)
}

/// MASKMOVQ, stores of MMX registers: whether the x87 state is already that of MMX when it faults differs.
pub fn is_eager(insn: &Instruction) -> bool {
    let is_store = insn.op_count() > 1 && insn.op0_kind() == OpKind::Memory && insn.op1_register().is_mm();
    is_store || insn.mnemonic() == Mnemonic::Maskmovq
}

/// What makers do each in their own way, and the machine in AMD's, without a flag that is undefined: a
/// selector is pushed with zeros above it, or alone; which faults an area of XSAVE has, and of parts that
/// are not asked for; a near call to where no code can be has pushed, or not.
pub fn is_the_makers(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Push && insn.op0_register().is_segment_register()
        || areas::is_area(insn)
        || insn.is_call_near_indirect()
}

/// Instructions that leave flags, or a register, undefined: followed by others they would make
/// every later difference doubtful on processors of another maker.
pub fn is_vague(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Aaa | Aas | Aam | Aad | Daa | Das)
        || insn.mnemonic() == Bswap && insn.op0_register().size() == 2
}

/// MASKMOVDQU and its kin.
pub fn is_masked_by_bytes(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq)
}

/// Whether a difference from a processor that is not AMD's is one of those.
pub fn excuse(s: &Start, native: &Outcome, ours: &Outcome) -> bool {
    // Intel's check less alignment, of AVX none, and have an order of their own for faults; of a gather, or a
    // masked store, other elements are done when one faults; VCVTPS2PH has told of what it rounded.
    let is_partly_done = |i: &Instruction| {
        use Mnemonic as M;
        let is_masked = matches!(i.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq);
        is_masked_by_bytes(i)
            || is_masked
            || i.memory_size().size() == 10
            || i.mnemonic() == M::Vcvtps2ph
            || i.is_vsib()
    };
    let is_same = native.rip == ours.rip;
    let is_fault = |vector| (12..=17).contains(&vector);
    let is_order = is_same && is_fault(ours.vector) && (is_fault(native.vector) || native.vector == 19);
    let is_lax = ours.vector == 17 && !(native.vector == 17 && is_same);
    // Of an x87 store with an unmasked exception they try no memory.
    let stores = |i: &Instruction| {
        let (has_memory, is_control) = (i.op0_kind() == OpKind::Memory, !pointers::are_noted_for(i));
        i.op_count() > 0
            && has_memory
            && !is_control
            && matches!(i.cpuid_features()[0], F::FPU | F::FPU287 | F::FPU387 | F::SSE3)
    };
    let is_late = matches!(ours.vector, 12..=14) && native.fx.0[2] & 0x80 != 0 && any(s, stores);
    // How long an opcode is that is none: whether it is all there, and not too long.  (And BOUND's two faults.)
    let ends = (native.vector, ours.vector);
    let is_none = is_same && matches!(ends, (6, 13 | 14) | (13 | 14, 6) | (5, 14));
    // A repeated move whose operands overlap in memory, but not by their addresses: fast strings read ahead.
    let moves = |i: &Instruction| {
        use Mnemonic as M;
        i.has_rep_prefix() && matches!(i.mnemonic(), M::Movsb | M::Movsw | M::Movsd | M::Movsq)
    };
    let (from, to) = (s.gpr[6], s.gpr[7]);
    let is_aliased = (from ^ to) >> 32 != 0 && (from as u32).abs_diff(to as u32) < 4096 && any(s, moves);
    let is_cut = is_order && (native.vector != ours.vector || any(s, is_partly_done));
    is_none || is_late || is_lax || is_cut || is_aliased || any(s, areas::is_area)
}
