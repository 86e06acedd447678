//! Through the interrupt descriptor table (SDM 2, "INT n/INTO/INT3/INT1—Call to Interrupt
//! Procedure"; SDM 3A, "Interrupt and Exception Handling").
//!
//! The checks come in the manual's order.  Registers change only after the last check and the
//! last push; what a failed delivery pushed below the stack pointer may stay.

use crate::arch::bits::rflags;
use crate::arch::exception::vector;
use crate::arch::segment::{Segment, attr, seg};
use crate::cpu::event::{Event, Kind};
use crate::cpu::frame::Cursor;
use crate::cpu::pmu;
use crate::cpu::segment::{
    Descriptor, is_canonical, is_null, mark_accessed, null_segment, null_stack, read_descriptor,
    read_stack_segment, selector_fault, system_type, table_address, v86_segment,
};
use crate::cpu::state::{Core, Mode};
use crate::cpu::task;
use crate::cpu::trap::{Exec, gp};
use crate::mmu::access::Who;

/// Deliver an event; `resume`: set RF in the pushed flags.
pub(crate) fn enter(core: &mut Core, event: &Event, resume: bool) -> Exec<()> {
    let is_v86_int = core.mode == Mode::V86 && event.kind == Kind::Software;
    if core.mode == Mode::Real {
        real(core, event)
    } else if is_v86_int && is_redirected(core, event.vector)? {
        redirected(core, event)
    } else {
        protected(core, event, resume)
    }
}

/// The return address.
fn saved_rip(core: &Core, event: &Event) -> u64 {
    let rip = core.rip.wrapping_add(u64::from(event.length));
    match core.mode {
        Mode::Bits64 => rip,
        Mode::Bits32 => rip & 0xFFFF_FFFF,
        _ => rip & 0xFFFF,
    }
}

fn idt_fault(v: u8, event: &Event) -> crate::cpu::trap::Trap {
    let code = u32::from(event.vector) << 3 | 2 | event.ext();
    crate::arch::exception::Exception::coded(v, code).into()
}

/// Real-address mode (SDM 3B, "Interrupt and Exception Handling" under "Real-Address Mode").
fn real(core: &mut Core, event: &Event) -> Exec<()> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(core.idtr.limit) {
        return Err(idt_fault(vector::GP, event));
    }
    let place = table_address(core, core.idtr.base, offset);
    let entry = core.read_lin(place, 4, Who::Processor)?;
    let (ip, cs) = (entry & 0xFFFF, (entry >> 16) as u16);
    let mut stack = Cursor::current(core);
    stack.push(core, 2, core.rflags & 0xFFFF)?;
    stack.push(core, 2, u64::from(core.seg[seg::CS].selector))?;
    stack.push(core, 2, saved_rip(core, event))?;
    if ip > u64::from(core.seg[seg::CS].limit) {
        return Err(gp(event.ext()));
    }
    stack.commit(core);
    core.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    core.seg[seg::CS].selector = cs;
    core.seg[seg::CS].base = u64::from(cs) << 4;
    core.rip = ip;
    Ok(())
}

/// Whether the software-interrupt redirection bitmap sends INT n of a virtual-8086 program to the
/// program's own vector table (SDM 3B, "Virtual-8086 Mode Extensions").
pub(crate) fn is_redirected(core: &mut Core, v: u8) -> Exec<bool> {
    if core.cr4 & crate::arch::bits::cr4::VME == 0 {
        return Ok(false);
    }
    const IO_MAP_BASE: u64 = 0x66;
    let (base, limit) = (core.tr.base, u64::from(core.tr.limit));
    if limit < IO_MAP_BASE + 1 {
        return Err(gp(0));
    }
    let io_map = core.read_lin(table_address(core, base, IO_MAP_BASE), 2, Who::Processor)?;
    let offset = io_map.wrapping_sub(32).wrapping_add(u64::from(v / 8));
    if offset > limit {
        return Err(gp(0));
    }
    let byte = core.read_lin(table_address(core, base, offset), 1, Who::Processor)?;
    Ok(byte >> (v % 8) & 1 == 0)
}

/// INT n of a virtual-8086 program through its own vector table at linear address 0.
fn redirected(core: &mut Core, event: &Event) -> Exec<()> {
    let entry = core.read_lin(u64::from(event.vector) * 4, 4, Who::Program)?;
    let iopl_is_3 = core.rflags & rflags::IOPL == rflags::IOPL;
    let mut image = core.rflags & 0xFFFF;
    if !iopl_is_3 {
        image = image & !rflags::IF | rflags::IOPL;
        if core.flag(rflags::VIF) {
            image |= rflags::IF;
        }
    }
    let mut stack = Cursor::current(core);
    stack.push(core, 2, image)?;
    stack.push(core, 2, u64::from(core.seg[seg::CS].selector))?;
    stack.push(core, 2, saved_rip(core, event))?;
    stack.commit(core);
    let masked = if iopl_is_3 { rflags::IF } else { rflags::VIF };
    core.rflags &= !(masked | rflags::TF | rflags::NT | rflags::RF);
    core.seg[seg::CS] = v86_segment((entry >> 16) as u16);
    core.rip = entry & 0xFFFF;
    Ok(())
}

fn read_gate(core: &mut Core, event: &Event) -> Exec<Descriptor> {
    let size = if core.is_long() { 16 } else { 8 };
    let offset = u64::from(event.vector) * size;
    if offset + size - 1 > u64::from(core.idtr.limit) {
        return Err(idt_fault(vector::GP, event));
    }
    let place = table_address(core, core.idtr.base, offset);
    let raw = core.read_lin(place, 8, Who::Processor)?;
    let upper = if core.is_long() {
        core.read_lin(core.linear_add(place, 8), 8, Who::Processor)? & 0xFFFF_FFFF
    } else {
        0
    };
    Ok(Descriptor { raw, upper })
}

/// Protected, virtual-8086, compatibility and 64-bit mode.
fn protected(core: &mut Core, event: &Event, resume: bool) -> Exec<()> {
    let gate = read_gate(core, event)?;
    let kind = gate.system_type().unwrap_or(0);
    let is_legal = match kind {
        system_type::INT32 | system_type::TRAP32 => true,
        system_type::TASK_GATE | system_type::INT16 | system_type::TRAP16 => !core.is_long(),
        _ => false,
    };
    if !is_legal {
        return Err(idt_fault(vector::GP, event));
    }
    let is_software = matches!(event.kind, Kind::Software | Kind::SoftwareException);
    if is_software && gate.dpl() < core.cpl {
        return Err(idt_fault(vector::GP, event));
    }
    if !gate.is_present() {
        return Err(idt_fault(vector::NP, event));
    }
    if kind == system_type::TASK_GATE {
        return task::through_interrupt_gate(core, gate.gate_selector(), event, resume);
    }
    through_gate(core, event, gate, kind, resume)
}

/// What an interrupt or trap gate leads to.
struct Entry {
    cs: Segment,
    /// Bytes of a push.
    width: usize,
    cpl: u8,
}

fn through_gate(core: &mut Core, event: &Event, gate: Descriptor, kind: u32, resume: bool) -> Exec<()> {
    let ext = event.ext();
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(gp(ext));
    }
    let mut d = read_descriptor(core, selector, vector::GP, ext)?;
    let bad = selector_fault(vector::GP, selector, ext);
    if !d.is_code() || d.dpl() > core.cpl {
        return Err(bad);
    }
    if core.is_long() && d.attr() & (attr::L | attr::DB) != attr::L {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, ext));
    }
    let is_inner = !d.is_conforming() && d.dpl() < core.cpl;
    let from_v86 = core.mode == Mode::V86;
    if from_v86 && (!is_inner || d.dpl() != 0) {
        return Err(bad);
    }
    let cpl = if is_inner { d.dpl() } else { core.cpl };
    let width = if core.is_long() {
        8
    } else if kind >= system_type::INT32 {
        4
    } else {
        2
    };
    mark_accessed(core, selector, &mut d)?;
    let cs = d.to_segment(selector & !3 | u16::from(cpl));
    let rip = if width == 2 { gate.gate_offset() & 0xFFFF } else { gate.gate_offset() };
    let entry = Entry { cs, width, cpl };

    let mut flags = core.rflags & !rflags::RF;
    if resume || core.flag(rflags::RF) {
        flags |= rflags::RF;
    }
    let (ss, stack) = if core.is_long() {
        long_stack(core, event, gate, &entry, is_inner)?
    } else {
        legacy_stack(core, ext, &entry, is_inner)?
    };
    if core.is_long() && !is_canonical(rip) || !core.is_long() && rip > u64::from(entry.cs.limit) {
        return Err(gp(ext));
    }
    let old_cpl = core.cpl;
    pmu::set_level(core, cpl);
    let has_stack = is_inner || core.is_long();
    let stack = match push_frame(core, event, &entry, stack, flags, has_stack, from_v86) {
        Ok(stack) => stack,
        Err(trap) => {
            pmu::set_level(core, old_cpl);
            return Err(trap);
        }
    };
    if let Some(ss) = ss {
        core.seg[seg::SS] = ss;
    }
    core.seg[seg::CS] = entry.cs;
    if core.is_long() {
        core.gpr[4] = stack.sp();
    } else {
        stack.commit(core);
    }
    if from_v86 {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            core.seg[index] = null_segment(0);
        }
    }
    core.rip = rip;
    core.rflags &= !(rflags::TF | rflags::VM | rflags::RF | rflags::NT);
    if matches!(kind, system_type::INT16 | system_type::INT32) {
        core.rflags &= !rflags::IF;
    }
    Ok(())
}

/// The stack in IA-32e mode: from the IST, for an inner level from the TSS, else the current
/// one; aligned to 16 bytes.
fn long_stack(
    core: &mut Core,
    event: &Event,
    gate: Descriptor,
    entry: &Entry,
    is_inner: bool,
) -> Exec<(Option<Segment>, Cursor)> {
    let ext = event.ext();
    let ist = gate.raw >> 32 & 7;
    let rsp = if ist != 0 {
        read_tss_stack(core, 28 + 8 * ist, ext)?
    } else if is_inner {
        read_tss_stack(core, 4 + 8 * u64::from(entry.cpl), ext)?
    } else {
        core.gpr[4]
    };
    let ss = is_inner.then(|| null_stack(u16::from(entry.cpl)));
    Ok((ss, Cursor::long(rsp & !0xF, ext)))
}

fn read_tss_stack(core: &mut Core, offset: u64, ext: u32) -> Exec<u64> {
    if offset + 7 > u64::from(core.tr.limit) {
        return Err(selector_fault(vector::TS, core.tr.selector, ext));
    }
    core.read_lin(table_address(core, core.tr.base, offset), 8, Who::Processor)
}

fn legacy_stack(core: &mut Core, ext: u32, entry: &Entry, is_inner: bool) -> Exec<(Option<Segment>, Cursor)> {
    if !is_inner {
        return Ok((None, Cursor::current(core).with_code(ext)));
    }
    let (ss, sp) = inner_stack(core, entry.cpl, ext)?;
    Ok((Some(ss), Cursor::legacy(ss, sp, ext)))
}

/// The stack for privilege level `cpl` from a 16- or 32-bit TSS, all checks done.
///
/// # Errors
/// #TS, #SS; page faults.
pub(crate) fn inner_stack(core: &mut Core, cpl: u8, ext: u32) -> Exec<(Segment, u64)> {
    let level = u64::from(cpl);
    let is_32 = core.tr.attr & attr::CODE != 0; // types 9 and B
    let (offset, width, end) = if is_32 { (level * 8 + 4, 4, 5) } else { (level * 4 + 2, 2, 3) };
    if offset + end > u64::from(core.tr.limit) {
        return Err(selector_fault(vector::TS, core.tr.selector, ext));
    }
    let base = core.tr.base;
    let sp = core.read_lin(table_address(core, base, offset), width, Who::Processor)?;
    let place = table_address(core, base, offset + width as u64);
    let selector = core.read_lin(place, 2, Who::Processor)? as u16;
    Ok((read_stack_segment(core, selector, cpl, vector::TS, ext)?, sp))
}

fn push_frame(
    core: &mut Core,
    event: &Event,
    entry: &Entry,
    mut stack: Cursor,
    flags: u64,
    has_stack: bool,
    from_v86: bool,
) -> Exec<Cursor> {
    let width = entry.width;
    if from_v86 {
        for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
            stack.push(core, width, u64::from(core.seg[index].selector))?;
        }
    }
    if has_stack {
        stack.push(core, width, u64::from(core.seg[seg::SS].selector))?;
        stack.push(core, width, core.gpr[4])?;
    }
    stack.push(core, width, flags)?;
    stack.push(core, width, u64::from(core.seg[seg::CS].selector))?;
    stack.push(core, width, saved_rip(core, event))?;
    if let Some(code) = event.error {
        stack.push(core, width, u64::from(code))?;
    }
    Ok(stack)
}
