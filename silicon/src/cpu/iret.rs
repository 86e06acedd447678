//! IRET in every mode (SDM 2, "IRET/IRETD/IRETQ—Interrupt Return").

use iced_x86::Instruction;

use crate::arch::bits::{cr4, rflags};
use crate::arch::exception::vector;
use crate::arch::segment::{Segment, seg};
use crate::cpu::far::{
    check_target, enter_code, enter_stack, in_new_task, read_return_code, read_return_stack,
};
use crate::cpu::frame::Cursor;
use crate::cpu::segment::{
    drop_inner_segments, read_descriptor, real_segment, selector_fault, system_type, v86_segment,
};
use crate::cpu::state::{Core, Mode};
use crate::cpu::task::{self, Source};
use crate::cpu::trap::{Exec, Trap, gp};
use crate::mmu::access::Who;

/// The flags that a 16-bit IRET may write at any level (IF and IOPL come on top).
const PLAIN16: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
/// The flags that a wider one may write at any level.
const PLAIN32: u64 = PLAIN16 | rflags::RF | rflags::AC | rflags::ID;

/// IRET with an operand size of `size` bytes.
pub(crate) fn execute(core: &mut Core, insn: &Instruction, size: usize) -> Exec<()> {
    let result = match core.mode {
        Mode::Real => real(core, size),
        Mode::V86 => v86(core, size),
        _ if core.flag(rflags::NT) && core.is_long() => Err(gp(0)),
        _ if core.flag(rflags::NT) => to_task(core, insn),
        _ => protected(core, size),
    };
    // Also an IRET that faults ends the blocking of NMIs; one that exits does not.
    let unblocks = core.vmx.is_nmi_unblocked_by_iret();
    if unblocks && core.nmi_blocked && matches!(result, Ok(()) | Err(Trap::Exception(_))) {
        core.nmi_blocked = false;
        core.nmi_unblocked_by_fault = result.is_err();
    }
    if result.is_ok() {
        core.attention = 1;
    }
    result
}

fn write_flags(core: &mut Core, image: u64, mask: u64) {
    core.rflags = core.rflags & !mask | image & mask | rflags::FIXED1;
}

fn real(core: &mut Core, size: usize) -> Exec<()> {
    let mut stack = Cursor::current(core);
    let rip = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    let flags = stack.pop(core, size)?;
    let cs = real_segment(&core.seg[seg::CS], selector);
    check_target(core, &cs, rip)?;
    stack.commit(core);
    let plain = if size == 2 { PLAIN16 } else { PLAIN32 };
    write_flags(core, flags, plain | rflags::IF | rflags::IOPL);
    enter_code(core, cs, rip, 0);
    Ok(())
}

fn v86(core: &mut Core, size: usize) -> Exec<()> {
    let has_iopl = core.iopl() == 3;
    if !has_iopl && (core.cr4 & cr4::VME == 0 || size != 2) {
        return Err(gp(0));
    }
    let mut stack = Cursor::current(core);
    let rip = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    let flags = stack.pop(core, size)?;
    if !has_iopl && (flags & rflags::IF != 0 && core.flag(rflags::VIP) || flags & rflags::TF != 0) {
        return Err(gp(0));
    }
    let cs = v86_segment(selector);
    check_target(core, &cs, rip)?;
    stack.commit(core);
    let plain = if size == 2 { PLAIN16 } else { PLAIN32 };
    if has_iopl {
        write_flags(core, flags, plain | rflags::IF);
    } else {
        write_flags(core, flags, plain);
        let vif = if flags & rflags::IF != 0 { rflags::VIF } else { 0 };
        write_flags(core, vif, rflags::VIF);
    }
    enter_code(core, cs, rip, 3);
    Ok(())
}

/// IRET with NT: back to the task named by the TSS's link.
fn to_task(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let selector = core.read_lin(core.tr.base & 0xFFFF_FFFF, 2, Who::Processor)? as u16;
    if selector & 4 != 0 {
        return Err(selector_fault(vector::TS, selector, 0));
    }
    let d = read_descriptor(core, selector, vector::TS, 0)?;
    if !matches!(d.system_type(), Some(system_type::TSS16_BUSY | system_type::TSS32_BUSY)) {
        return Err(selector_fault(vector::TS, selector, 0));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, 0));
    }
    core.rip = insn.ip();
    let result = task::to(core, selector, d, Source::Iret, insn.len() as u32);
    in_new_task(core, insn.ip(), result)
}

fn protected(core: &mut Core, size: usize) -> Exec<()> {
    let mut stack = Cursor::current(core);
    let rip = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    let flags = stack.pop(core, size)?;
    if flags & rflags::VM != 0 && core.cpl == 0 && size == 4 && !core.is_long() {
        return to_v86(core, stack, rip, selector, flags);
    }
    let from_64 = core.is_64();
    let cs = read_return_code(core, selector)?;
    let is_outer = cs.rpl() > core.cpl;
    let new_stack: Option<(Segment, u64)> = if is_outer || from_64 {
        let sp = stack.pop(core, size)?;
        let ss = stack.pop(core, size)? as u16;
        Some((read_return_stack(core, ss, &cs)?, sp))
    } else {
        None
    };
    check_target(core, &cs, rip)?;

    let mut mask = if size == 2 { PLAIN16 } else { PLAIN32 };
    if core.cpl <= core.iopl() {
        mask |= rflags::IF;
    }
    if core.cpl == 0 {
        mask |= rflags::IOPL;
        if size != 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    write_flags(core, flags, mask);
    if new_stack.is_none() {
        stack.commit(core);
    }
    enter_code(core, cs, rip, cs.rpl());
    if let Some((ss, sp)) = new_stack {
        enter_stack(core, ss, sp);
    }
    if is_outer {
        drop_inner_segments(core);
    }
    Ok(())
}

fn to_v86(core: &mut Core, mut stack: Cursor, rip: u64, cs: u16, flags: u64) -> Exec<()> {
    let sp = stack.pop(core, 4)?;
    let mut selectors = [0; 5]; // SS ES DS FS GS
    for s in &mut selectors {
        *s = stack.pop(core, 4)? as u16;
    }
    if rip > 0xFFFF {
        return Err(gp(0));
    }
    let everything = PLAIN32 | rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP;
    write_flags(core, flags, everything);
    for (index, s) in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS].into_iter().zip(selectors) {
        core.seg[index] = v86_segment(s);
    }
    core.gpr[4] = sp;
    enter_code(core, v86_segment(cs), rip, 3);
    Ok(())
}
