//! IN, OUT, INS, OUTS (SDM 1, "Input/Output").
//!
//! On the bare machine the ports are outside: `run` stops with reason PIO, and everything is as
//! with exit reason 30: nothing has been done, RIP still names the instruction, `length`,
//! qualification and `instr_info` are filled in; `gla` is the linear address of the first element
//! (INS, OUTS) or the value (OUT).  Whoever completes the access sets RAX (IN) or moves the element
//! and the registers (INS, OUTS), and adds `length` to RIP.
//!
//! In non-root operation a port that does not exit reaches no device: it reads as ones.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::arch::bits::cr4;
use crate::arch::exit::{Exit, reason};
use crate::arch::segment::{attr, seg};
use crate::cpu::operand::{linear_at, read_op, set_gpr, set_reg, size_of_reg};
use crate::cpu::segment::table_address;
use crate::cpu::state::{Core, Mode};
use crate::cpu::trap::{Exec, Trap, gp};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx::intercept::Sensitive;

const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;

/// Elements of a repeated instruction before it gives way.
const TURN: u32 = 4096;

/// One access to a port.
#[derive(Clone, Copy)]
struct Port {
    number: u16,
    size: u8,
    is_in: bool,
    is_string: bool,
    is_rep: bool,
    is_imm: bool,
}

/// Execute an instruction of this group.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let (is_in, size) = match insn.mnemonic() {
        Mnemonic::In => return plain(core, insn, true),
        Mnemonic::Out => return plain(core, insn, false),
        Mnemonic::Insb => (true, 1),
        Mnemonic::Insw => (true, 2),
        Mnemonic::Insd => (true, 4),
        Mnemonic::Outsb => (false, 1),
        Mnemonic::Outsw => (false, 2),
        _ => (false, 4),
    };
    let is_rep = insn.has_rep_prefix() || insn.has_repne_prefix();
    let number = core.gpr[RDX] as u16;
    string(core, insn, Port { number, size, is_in, is_string: true, is_rep, is_imm: false })
}

fn plain(core: &mut Core, insn: &Instruction, is_in: bool) -> Exec<()> {
    let (data, port) = if is_in { (0, 1) } else { (1, 0) };
    let is_imm = insn.op_kind(port) != OpKind::Register;
    let number = if is_imm { u16::from(insn.immediate8()) } else { core.gpr[RDX] as u16 };
    let register = insn.op_register(data);
    let size = size_of_reg(register) as u8;
    let p = Port { number, size, is_in, is_string: false, is_rep: false, is_imm };
    check_permission(core, p)?;
    let value = if is_in { 0 } else { read_op(core, insn, data)? };
    access(core, insn, p, value, 0)?;
    if is_in {
        set_reg(core, register, u64::MAX);
    }
    Ok(())
}

/// IOPL, and the I/O permission bit map of the TSS ("I/O Permission Bit Map").
fn check_permission(core: &mut Core, p: Port) -> Exec<()> {
    const IO_MAP_BASE: u64 = 0x66;
    let is_free = core.mode == Mode::Real || core.mode != Mode::V86 && core.cpl <= core.iopl();
    if is_free {
        return Ok(());
    }
    let (tr, limit) = (core.tr, u64::from(core.tr.limit));
    let is_tss32 = tr.has(attr::CODE);
    if !is_tss32 || limit < IO_MAP_BASE + 1 {
        return Err(gp(0));
    }
    let map = core.read_lin(table_address(core, tr.base, IO_MAP_BASE), 2, Who::Processor)?;
    let at = map + u64::from(p.number / 8);
    if at + 1 > limit {
        return Err(gp(0));
    }
    let bits = core.read_lin(table_address(core, tr.base, at), 2, Who::Processor)?;
    let wanted = (1 << p.size) - 1;
    if bits >> (p.number % 8) & wanted == 0 { Ok(()) } else { Err(gp(0)) }
}

/// Note I/O breakpoints (DR7 type 2 under CR4.DE).
fn watch(core: &mut Core, p: Port) {
    if core.dr[7] & 0xFF == 0 || core.cr4 & cr4::DE == 0 {
        return;
    }
    let (first, last) = (u64::from(p.number), u64::from(p.number) + u64::from(p.size) - 1);
    for i in 0..4 {
        let control = core.dr[7] >> (16 + 4 * i);
        let span = control >> 2 & 3;
        let at = core.dr[i] & !span;
        let is_on = core.dr[7] >> (2 * i) & 3 != 0 && control & 3 == 2;
        if is_on && first <= at + span && at <= last {
            core.pending_db |= 1 << i;
        }
    }
}

/// The VM exit or stop that the access is; `Ok` if it reaches no device.
fn access(core: &mut Core, insn: &Instruction, p: Port, gla: u64, info: u32) -> Exec<()> {
    let (length, port, size) = (insn.len() as u32, p.number, p.size);
    let Port { is_in, is_string, is_rep, is_imm, .. } = p;
    let address = if is_string { gla } else { 0 };
    let what = Sensitive::Io { port, size, is_in, is_string, is_rep, is_imm, gla: address, info };
    core.intercept(what, length)?;
    watch(core, p);
    if core.vmx.non_root {
        return Ok(());
    }
    let flag = |on: bool, bit: u32| u64::from(on) << bit;
    let qualification = u64::from(size - 1)
        | flag(is_in, 3)
        | flag(is_string, 4)
        | flag(is_rep, 5)
        | flag(is_imm, 6)
        | u64::from(port) << 16;
    let stop = Exit { length, gla, instr_info: info, ..Exit::new(reason::PIO, qualification) };
    Err(Trap::Stop(Box::new(stop)))
}

/// Bytes of the address registers of INS and OUTS.
fn address_size(insn: &Instruction) -> usize {
    for i in 0..2 {
        match insn.op_kind(i) {
            OpKind::MemoryESDI | OpKind::MemorySegSI => return 2,
            OpKind::MemoryESEDI | OpKind::MemorySegESI => return 4,
            OpKind::MemoryESRDI | OpKind::MemorySegRSI => return 8,
            _ => {}
        }
    }
    8
}

fn string(core: &mut Core, insn: &Instruction, p: Port) -> Exec<()> {
    let width = address_size(insn);
    let mask = u64::MAX >> (64 - 8 * width);
    let (segment, index) = if p.is_in {
        (seg::ES, RDI)
    } else {
        let segment = match insn.memory_segment() {
            Register::None => seg::DS,
            r => r.number(),
        };
        (segment, RSI)
    };
    let address_code = width.trailing_zeros() - 1; // 0: 16 bits, 1: 32, 2: 64
    let info = address_code << 7 | (segment as u32) << 15;
    let size = usize::from(p.size);
    for _ in 0..TURN {
        if p.is_rep && core.gpr[RCX] & mask == 0 {
            return Ok(());
        }
        check_permission(core, p)?;
        let offset = core.gpr[index] & mask;
        let kind = if p.is_in { Access::Write } else { Access::Read };
        let gva = linear_at(core, segment, offset, size, kind)?;
        access(core, insn, p, gva, info)?;
        if p.is_in {
            core.write_lin(gva, size, u64::MAX >> (64 - 8 * size), Who::Program)?;
        } else {
            core.read_lin(gva, size, Who::Program)?;
        }
        let step =
            if core.flag(crate::arch::bits::rflags::DF) { (size as u64).wrapping_neg() } else { size as u64 };
        set_gpr(core, index, width, offset.wrapping_add(step) & mask);
        if !p.is_rep {
            return Ok(());
        }
        let left = core.gpr[RCX].wrapping_sub(1) & mask;
        set_gpr(core, RCX, width, left);
    }
    if core.gpr[RCX] & mask == 0 { Ok(()) } else { Err(Trap::Again) }
}
