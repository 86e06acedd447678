//! Far transfers (SDM 2, "CALL—Call Procedure", "JMP—Jump", "RET—Return from Procedure"), and the
//! way of INT n, INT3, INTO and INT1 to event delivery.  IRET is in [`crate::cpu::iret`].
//!
//! On entry RIP names the next instruction; registers change after the last check only.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::arch::bits::{cr4, rflags};
use crate::arch::exception::vector;
use crate::arch::segment::{Segment, attr, seg};
use crate::cpu::event::{self, Event, Kind};
use crate::cpu::frame::Cursor;
use crate::cpu::operand::{address_mask, ea, linear_at, segment_of};
use crate::cpu::segment::{
    Descriptor, drop_inner_segments, is_canonical, is_null, mark_accessed, null_stack, read_descriptor,
    read_stack_segment, read_system_descriptor, real_segment, selector_fault, system_type, table_address,
    v86_segment,
};
use crate::cpu::state::{Core, Mode};
use crate::cpu::task::{self, Source};
use crate::cpu::trap::{Exec, Trap, gp, ud, vm_exit};
use crate::cpu::{gate, iret, pmu};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx;

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Call | Mnemonic::Jmp => {
            let (selector, offset, size) = target(core, insn)?;
            let is_call = insn.mnemonic() == Mnemonic::Call;
            transfer(core, insn, selector, offset, size, is_call)
        }
        Mnemonic::Retf => {
            let size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let extra = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
            far_return(core, size, extra)
        }
        Mnemonic::Iret => iret::execute(core, insn, 2),
        Mnemonic::Iretd => iret::execute(core, insn, 4),
        Mnemonic::Iretq => iret::execute(core, insn, 8),
        Mnemonic::Int => {
            check_v86_int(core, insn.immediate8())?;
            interrupt(core, insn, insn.immediate8(), Kind::Software)
        }
        Mnemonic::Int3 => interrupt(core, insn, vector::BP, Kind::SoftwareException),
        Mnemonic::Int1 => interrupt(core, insn, vector::DB, Kind::PrivilegedSoftware),
        Mnemonic::Into if core.flag(rflags::OF) => interrupt(core, insn, vector::OF, Kind::SoftwareException),
        Mnemonic::Into => Ok(()),
        _ => Err(ud()),
    }
}

/// INT n in virtual-8086 mode needs IOPL 3, or a redirection by CR4.VME.
fn check_v86_int(core: &mut Core, v: u8) -> Exec<()> {
    if core.mode != Mode::V86 || core.iopl() == 3 {
        return Ok(());
    }
    if core.cr4 & cr4::VME != 0 && gate::is_redirected(core, v)? { Ok(()) } else { Err(gp(0)) }
}

fn interrupt(core: &mut Core, insn: &Instruction, vector: u8, kind: Kind) -> Exec<()> {
    let event = Event { vector, kind, error: None, length: insn.len() as u8 };
    if let Some(exit) = vmx::exit::of_event(core, &event, 0) {
        return Err(vm_exit(exit));
    }
    core.rip = insn.ip();
    let result = event::deliver(core, event);
    in_new_task(core, insn.ip(), result)
}

/// A fault that came after a task switch was committed belongs to the new task: raise it here,
/// where RIP is the new task's.
pub(crate) fn in_new_task(core: &mut Core, old_rip: u64, result: Exec<()>) -> Exec<()> {
    match result {
        Err(Trap::Exception(e)) if !e.is_trap && core.rip != old_rip => event::raise(core, e),
        result => result,
    }
}

/// A task switch by instruction.
fn switch_task(core: &mut Core, insn: &Instruction, go: impl FnOnce(&mut Core, u32) -> Exec<()>) -> Exec<()> {
    core.rip = insn.ip();
    let result = go(core, insn.len() as u32);
    in_new_task(core, insn.ip(), result)
}

/// Selector, offset and operand size of a far CALL or JMP.
fn target(core: &mut Core, insn: &Instruction) -> Exec<(u16, u64, usize)> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => Ok((insn.far_branch_selector(), u64::from(insn.far_branch16()), 2)),
        OpKind::FarBranch32 => Ok((insn.far_branch_selector(), u64::from(insn.far_branch32()), 4)),
        _ => {
            let size = match insn.code() {
                Code::Call_m1616 | Code::Jmp_m1616 => 2,
                Code::Call_m1632 | Code::Jmp_m1632 => 4,
                _ => 8,
            };
            let (offset, selector) = far_pointer(core, insn, size)?;
            Ok((selector, offset, size))
        }
    }
}

/// The far pointer that the memory operand is: offset of `size` bytes, then a selector.
pub(crate) fn far_pointer(core: &mut Core, insn: &Instruction, size: usize) -> Exec<(u64, u16)> {
    let (segment, place) = (segment_of(insn), ea(core, insn));
    let at = linear_at(core, segment, place, size, Access::Read)?;
    let offset = core.read_lin(at, size, Who::Program)?;
    let place = place.wrapping_add(size as u64) & address_mask(insn);
    let at = linear_at(core, segment, place, 2, Access::Read)?;
    Ok((offset, core.read_lin(at, 2, Who::Program)? as u16))
}

/// Whether `rip` is a place in code segment `cs`.
pub(crate) fn check_target(core: &Core, cs: &Segment, rip: u64) -> Exec<()> {
    let is_64 = core.is_long() && cs.has(attr::L);
    let fits = if is_64 { is_canonical(rip) } else { rip <= u64::from(cs.limit) };
    if fits { Ok(()) } else { Err(gp(0)) }
}

/// Let `cs` at level `cpl` be the code that runs.
pub(crate) fn enter_code(core: &mut Core, cs: Segment, rip: u64, cpl: u8) {
    core.seg[seg::CS] = cs;
    pmu::set_level(core, cpl);
    core.rip = rip;
    core.refresh();
}

fn transfer(
    core: &mut Core,
    insn: &Instruction,
    selector: u16,
    offset: u64,
    size: usize,
    is_call: bool,
) -> Exec<()> {
    if matches!(core.mode, Mode::Real | Mode::V86) {
        let old = core.seg[seg::CS];
        let cs = if core.mode == Mode::Real { real_segment(&old, selector) } else { v86_segment(selector) };
        check_target(core, &cs, offset)?;
        if is_call {
            push_return(core, Cursor::current(core), size)?;
        }
        let cpl = core.cpl;
        enter_code(core, cs, offset, cpl);
        return Ok(());
    }
    if is_null(selector) {
        return Err(gp(0));
    }
    let d = read_system_descriptor(core, selector, vector::GP, 0)?;
    let bad = selector_fault(vector::GP, selector, 0);
    let source = if is_call { Source::Call } else { Source::Jump };
    let rpl = (selector & 3) as u8;
    let reaches = d.dpl() >= core.cpl && d.dpl() >= rpl;
    match d.system_type() {
        None => direct(core, selector, d, offset, size, is_call),
        Some(system_type::CALL32) if reaches => through_call_gate(core, selector, d, is_call),
        Some(system_type::CALL16) if reaches && !core.is_long() => {
            through_call_gate(core, selector, d, is_call)
        }
        Some(system_type::TASK_GATE) if reaches && !core.is_long() => {
            if !d.is_present() {
                return Err(selector_fault(vector::NP, selector, 0));
            }
            switch_task(core, insn, |core, length| {
                task::through_task_gate(core, d.gate_selector(), source, length)
            })
        }
        Some(system_type::TSS16 | system_type::TSS32) if reaches && !core.is_long() => {
            if selector & 4 != 0 {
                return Err(bad);
            }
            if !d.is_present() {
                return Err(selector_fault(vector::NP, selector, 0));
            }
            switch_task(core, insn, |core, length| task::to(core, selector, d, source, length))
        }
        Some(_) => Err(bad),
    }
}

/// Push CS and the address of the next instruction on `stack`, and make it the current one.
fn push_return(core: &mut Core, mut stack: Cursor, size: usize) -> Exec<()> {
    let (cs, rip) = (u64::from(core.seg[seg::CS].selector), core.rip);
    stack.push(core, size, cs)?;
    stack.push(core, size, rip)?;
    stack.commit(core);
    Ok(())
}

/// To a code segment, without a gate.
fn direct(
    core: &mut Core,
    selector: u16,
    mut d: Descriptor,
    offset: u64,
    size: usize,
    is_call: bool,
) -> Exec<()> {
    let bad = selector_fault(vector::GP, selector, 0);
    let rpl = (selector & 3) as u8;
    let is_mixed = core.is_long() && d.has(attr::L | attr::DB);
    let may = if d.is_conforming() { d.dpl() <= core.cpl } else { rpl <= core.cpl && d.dpl() == core.cpl };
    if !d.is_code() || is_mixed || !may {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, 0));
    }
    let selector_now = selector & !3 | u16::from(core.cpl);
    check_target(core, &d.to_segment(selector_now), offset)?;
    mark_accessed(core, selector, &mut d)?;
    if is_call {
        push_return(core, Cursor::current(core), size)?;
    }
    let cpl = core.cpl;
    enter_code(core, d.to_segment(selector_now), offset, cpl);
    Ok(())
}

fn through_call_gate(core: &mut Core, selector: u16, g: Descriptor, is_call: bool) -> Exec<()> {
    if !g.is_present() {
        return Err(selector_fault(vector::NP, selector, 0));
    }
    let is_long = core.is_long();
    let size = if is_long {
        8
    } else if g.system_type() == Some(system_type::CALL32) {
        4
    } else {
        2
    };
    let code = g.gate_selector();
    if is_null(code) {
        return Err(gp(0));
    }
    let mut d = read_descriptor(core, code, vector::GP, 0)?;
    let is_inner = is_call && !d.is_conforming() && d.dpl() < core.cpl;
    let may = if is_inner || d.is_conforming() { d.dpl() <= core.cpl } else { d.dpl() == core.cpl };
    let is_wrong_size = is_long && d.attr() & (attr::L | attr::DB) != attr::L;
    if !d.is_code() || !may || is_wrong_size {
        return Err(selector_fault(vector::GP, code, 0));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, code, 0));
    }
    let offset = if size == 2 { g.gate_offset() & 0xFFFF } else { g.gate_offset() };
    let cpl = if is_inner { d.dpl() } else { core.cpl };
    mark_accessed(core, code, &mut d)?;
    let cs = d.to_segment(code & !3 | u16::from(cpl));
    if !is_inner {
        check_target(core, &cs, offset)?;
        if is_call {
            push_return(core, Cursor::current(core), size)?;
        }
        enter_code(core, cs, offset, cpl);
        return Ok(());
    }
    let count = if is_long { 0 } else { g.raw >> 32 & 0x1F };
    let (ss, stack) = if is_long {
        let at = 4 + 8 * u64::from(cpl);
        if at + 7 > u64::from(core.tr.limit) {
            return Err(selector_fault(vector::TS, core.tr.selector, 0));
        }
        let rsp = core.read_lin(table_address(core, core.tr.base, at), 8, Who::Processor)?;
        (null_stack(u16::from(cpl)), Cursor::long(rsp, 0))
    } else {
        let (ss, sp) = gate::inner_stack(core, cpl, 0)?;
        (ss, Cursor::legacy(ss, sp, 0))
    };
    check_target(core, &cs, offset)?;
    let stack = push_inner_call(core, stack, cpl, size, count)?;
    core.seg[seg::SS] = ss;
    enter_code(core, cs, offset, cpl);
    core.gpr[4] = stack.sp();
    Ok(())
}

/// SS:SP, the copied parameters, CS:IP on the inner stack.
fn push_inner_call(core: &mut Core, mut stack: Cursor, cpl: u8, size: usize, count: u64) -> Exec<Cursor> {
    let outer = Cursor::current(core);
    let mut parameters = Vec::new();
    for i in 0..count {
        parameters.push(outer.peek(core, i * size as u64, size)?);
    }
    let mut values = vec![u64::from(core.seg[seg::SS].selector), core.gpr[4]];
    values.extend(parameters.iter().rev());
    values.extend([u64::from(core.seg[seg::CS].selector), core.rip]);
    let old_cpl = core.cpl;
    pmu::set_level(core, cpl);
    for value in values {
        if let Err(trap) = stack.push(core, size, value) {
            pmu::set_level(core, old_cpl);
            return Err(trap);
        }
    }
    Ok(stack)
}

/// The code segment to which a far return or IRET goes, its checks done.
pub(crate) fn read_return_code(core: &mut Core, selector: u16) -> Exec<Segment> {
    if is_null(selector) {
        return Err(gp(0));
    }
    let mut d = read_descriptor(core, selector, vector::GP, 0)?;
    let rpl = (selector & 3) as u8;
    let level_fits = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    let is_mixed = core.is_long() && d.has(attr::L | attr::DB);
    if !d.is_code() || rpl < core.cpl || !level_fits || is_mixed {
        return Err(selector_fault(vector::GP, selector, 0));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, 0));
    }
    mark_accessed(core, selector, &mut d)?;
    Ok(d.to_segment(selector))
}

/// The stack segment to which a far return or IRET to `cs` goes.
pub(crate) fn read_return_stack(core: &mut Core, selector: u16, cs: &Segment) -> Exec<Segment> {
    let rpl = cs.rpl();
    if is_null(selector) {
        let may = core.is_long() && cs.has(attr::L) && rpl != 3 && (selector & 3) as u8 == rpl;
        return if may { Ok(null_stack(selector)) } else { Err(gp(0)) };
    }
    read_stack_segment(core, selector, rpl, vector::GP, 0)
}

/// Load SS:RSP for the code that now runs.
pub(crate) fn enter_stack(core: &mut Core, ss: Segment, sp: u64) {
    core.seg[seg::SS] = ss;
    core.gpr[4] = match core.stack_mask() {
        0xFFFF => core.gpr[4] & !0xFFFF | sp & 0xFFFF,
        mask => sp & mask,
    };
}

fn far_return(core: &mut Core, size: usize, extra: u64) -> Exec<()> {
    let mut stack = Cursor::current(core);
    let rip = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    if matches!(core.mode, Mode::Real | Mode::V86) {
        let old = core.seg[seg::CS];
        let cs = if core.mode == Mode::Real { real_segment(&old, selector) } else { v86_segment(selector) };
        check_target(core, &cs, rip)?;
        stack.skip(extra);
        stack.commit(core);
        let cpl = core.cpl;
        enter_code(core, cs, rip, cpl);
        return Ok(());
    }
    let cs = read_return_code(core, selector)?;
    check_target(core, &cs, rip)?;
    stack.skip(extra);
    if cs.rpl() == core.cpl {
        stack.commit(core);
        let cpl = core.cpl;
        enter_code(core, cs, rip, cpl);
        return Ok(());
    }
    let sp = stack.pop(core, size)?;
    let ss = stack.pop(core, size)? as u16;
    let ss = read_return_stack(core, ss, &cs)?;
    enter_code(core, cs, rip, cs.rpl());
    enter_stack(core, ss, sp.wrapping_add(extra));
    drop_inner_segments(core);
    Ok(())
}
