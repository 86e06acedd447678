//! Near branches, BOUND, and what only looks at the pipeline or the caches.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::arch::bits::rflags::ZF;
use crate::arch::exception::{Exception, vector};
use crate::cpu::flags::{holds, mask, sign_extend};
use crate::cpu::operand::{ea, get_reg, linear_at, mem_linear, read_op, segment_of, size_of_op};
use crate::cpu::segment;
use crate::cpu::stack::{moved, pop_peek, push, stack_linear};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap, ud};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const RCX: usize = 1;
const RSP: usize = 4;

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Jmp => {
            let target = target(core, insn)?;
            branch(core, target)
        }
        M::Call => {
            let size = size_of_op(insn, 0);
            let target = target(core, insn)?;
            if let Err(refused) = segment::code_linear(core, target) {
                // What is wrong with the stack comes first.
                let place = stack_linear(core, moved(core, -(size as i64)), size, Access::Write)?;
                core.probe_write(place, size, Who::Program)?;
                return Err(refused);
            }
            push(core, size, insn.next_ip())?;
            core.rip = target;
            Ok(())
        }
        M::Ret => ret(core, insn),
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => count(core, insn),
        M::Bound => bound(core, insn),
        M::Clflush | M::Clflushopt | M::Clwb => {
            let gva = mem_linear(core, insn, 1, Access::Read)?;
            core.translate(gva, Access::Read)?;
            Ok(())
        }
        M::Nop
        | M::Rdsspd
        | M::Rdsspq
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Lfence
        | M::Mfence
        | M::Sfence
        | M::Serialize
        | M::Cldemote
        | M::Prefetch
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1 => Ok(()),
        _ if insn.is_jcc_short_or_near() => {
            if holds(core.rflags, insn.condition_code()) {
                branch(core, insn.near_branch_target())
            } else {
                Ok(())
            }
        }
        _ => Err(ud()),
    }
}

#[inline]
fn branch(core: &mut Core, target: u64) -> Exec<()> {
    segment::code_linear(core, target)?;
    core.rip = target;
    Ok(())
}

#[inline]
fn target(core: &mut Core, insn: &Instruction) -> Exec<u64> {
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(insn.near_branch_target()),
        _ => read_op(core, insn, 0),
    }
}

fn ret(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let (size, extra) = match insn.code() {
        Code::Retnw => (2, 0),
        Code::Retnd => (4, 0),
        Code::Retnw_imm16 => (2, insn.immediate(0)),
        Code::Retnd_imm16 => (4, insn.immediate(0)),
        Code::Retnq_imm16 => (8, insn.immediate(0)),
        _ => (8, 0),
    };
    let target = pop_peek(core, size, 0)?;
    segment::code_linear(core, target)?;
    core.gpr[RSP] = moved(core, size as i64 + (extra & 0xFFFF) as i64);
    core.rip = target;
    Ok(())
}

/// LOOPcc and J(E/R)CXZ: the counter's width is the address size.
fn count(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Code as C;
    let size = match insn.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => 8,
        _ => 4,
    };
    let old = core.gpr[RCX] & mask(size);
    let (new, is_taken) = match insn.mnemonic() {
        Mnemonic::Loop => (old.wrapping_sub(1), old != 1),
        Mnemonic::Loope => (old.wrapping_sub(1), old != 1 && core.flag(ZF)),
        Mnemonic::Loopne => (old.wrapping_sub(1), old != 1 && !core.flag(ZF)),
        _ => (old, old == 0),
    };
    if is_taken {
        branch(core, insn.near_branch_target())?;
    }
    if new != old {
        crate::cpu::operand::set_gpr(core, RCX, size, new);
    }
    Ok(())
}

fn bound(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let index = sign_extend(size, get_reg(core, insn.op0_register())).cast_signed();
    let offset = ea(core, insn);
    let mut limits = [0; 2];
    for (i, limit) in limits.iter_mut().enumerate() {
        let at = offset.wrapping_add((i * size) as u64) & crate::cpu::operand::address_mask(insn);
        let gva = linear_at(core, segment_of(insn), at, size, Access::Read)?;
        *limit = sign_extend(size, core.read_lin(gva, size, Who::Program)?).cast_signed();
    }
    if index < limits[0] || index > limits[1] {
        return Err(Trap::Exception(Exception::plain(vector::BR)));
    }
    Ok(())
}
