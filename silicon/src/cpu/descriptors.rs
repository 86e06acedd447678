//! Instructions that load, store and ask about segment registers and descriptor tables.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::arch::bits::rflags;
use crate::arch::exception::vector;
use crate::arch::segment::{TableRegister, attr, seg};
use crate::cpu::cr::require_umip;
use crate::cpu::far::far_pointer;
use crate::cpu::operand::{
    address_mask, ea, get_reg, linear_at, read_op, segment_of, set_reg, size_of_op, write_op,
};
use crate::cpu::segment::{
    Descriptor, is_canonical, is_null, load_data_segment, null_segment, read_descriptor,
    read_system_descriptor, selector_fault, system_type, write_rights,
};
use crate::cpu::stack;
use crate::cpu::state::{Core, Mode, Shadow};
use crate::cpu::system::require_level_0;
use crate::cpu::trap::{Exec, Trap, gp, ud};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx::execute::{displacement, information};
use crate::vmx::intercept::Sensitive;

/// Execute an instruction of this group.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    match insn.mnemonic() {
        Mnemonic::Push => {
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let selector = get_reg(core, insn.op0_register());
            stack::push(core, size, selector)
        }
        Mnemonic::Pop => {
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let selector = stack::pop_peek(core, size, 0)? as u16;
            let moved = stack::moved(core, size as i64);
            load(core, insn.op0_register(), selector)?;
            core.gpr[4] = moved;
            Ok(())
        }
        Mnemonic::Lds => load_pointer(core, insn, seg::DS),
        Mnemonic::Les => load_pointer(core, insn, seg::ES),
        Mnemonic::Lfs => load_pointer(core, insn, seg::FS),
        Mnemonic::Lgs => load_pointer(core, insn, seg::GS),
        Mnemonic::Lss => load_pointer(core, insn, seg::SS),
        Mnemonic::Lgdt | Mnemonic::Lidt => load_table(core, insn),
        Mnemonic::Sgdt | Mnemonic::Sidt => store_table(core, insn),
        _ if matches!(core.mode, Mode::Real | Mode::V86) => Err(ud()),
        Mnemonic::Lldt => load_ldtr(core, insn),
        Mnemonic::Ltr => load_tr(core, insn),
        Mnemonic::Sldt | Mnemonic::Str => store_selector(core, insn),
        Mnemonic::Arpl => arpl(core, insn),
        _ => ask(core, insn),
    }
}

/// MOV with a segment register as the destination or the source.
pub(crate) fn moves(core: &mut Core, insn: &Instruction, to_segment: bool) -> Exec<()> {
    if to_segment {
        let selector = read_op(core, insn, 1)? as u16;
        return load(core, insn.op0_register(), selector);
    }
    let selector = get_reg(core, insn.op1_register());
    if insn.op0_kind() == OpKind::Register {
        set_reg(core, insn.op0_register(), selector);
        return Ok(());
    }
    write_op(core, insn, 0, selector)
}

fn load(core: &mut Core, register: Register, selector: u16) -> Exec<()> {
    let index = register.number();
    if index == seg::CS {
        return Err(ud());
    }
    load_data_segment(core, index, selector)?;
    if index == seg::SS {
        core.shadow = Shadow::MovSs;
        core.attention = 1;
    }
    Ok(())
}

fn load_pointer(core: &mut Core, insn: &Instruction, index: usize) -> Exec<()> {
    let size = size_of_op(insn, 0);
    let (offset, selector) = far_pointer(core, insn, size)?;
    load_data_segment(core, index, selector)?;
    set_reg(core, insn.op0_register(), offset);
    Ok(())
}

fn intercept_table(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let what = Sensitive::GdtrIdtr { displacement: displacement(insn), info: information(insn) };
    core.intercept(what, insn.len() as u32)
}

fn is_word_table(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
    )
}

/// The linear address of a part of the memory operand.
fn part(core: &mut Core, insn: &Instruction, distance: u64, size: usize, access: Access) -> Exec<u64> {
    let offset = ea(core, insn).wrapping_add(distance) & address_mask(insn);
    linear_at(core, segment_of(insn), offset, size, access)
}

fn load_table(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_level_0(core)?;
    intercept_table(core, insn)?;
    let size = if core.is_64() { 8 } else { 4 };
    let place = part(core, insn, 0, 2, Access::Read)?;
    let limit = core.read_lin(place, 2, Who::Program)? as u16;
    let place = part(core, insn, 2, size, Access::Read)?;
    let mut base = core.read_lin(place, size, Who::Program)?;
    if is_word_table(insn) {
        base &= 0xFF_FFFF;
    }
    if !is_canonical(base) {
        return Err(gp(0));
    }
    let table = TableRegister { base, limit };
    if insn.mnemonic() == Mnemonic::Lgdt {
        core.gdtr = table;
    } else {
        core.idtr = table;
    }
    Ok(())
}

fn store_table(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_umip(core)?;
    intercept_table(core, insn)?;
    let table = if insn.mnemonic() == Mnemonic::Sgdt { core.gdtr } else { core.idtr };
    let size = if core.is_64() { 8 } else { 4 };
    let second = part(core, insn, 2, size, Access::Write)?;
    core.probe_write(second, size, Who::Program)?;
    let first = part(core, insn, 0, 2, Access::Write)?;
    core.write_lin(first, 2, u64::from(table.limit), Who::Program)?;
    core.write_lin(second, size, table.base, Who::Program)
}

fn intercept_selector(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let what = Sensitive::LdtrTr { displacement: displacement(insn), info: information(insn) };
    core.intercept(what, insn.len() as u32)
}

fn store_selector(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_umip(core)?;
    intercept_selector(core, insn)?;
    let register = if insn.mnemonic() == Mnemonic::Sldt { &core.ldtr } else { &core.tr };
    let selector = u64::from(register.selector);
    write_op(core, insn, 0, selector)
}

fn load_ldtr(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_level_0(core)?;
    intercept_selector(core, insn)?;
    let selector = read_op(core, insn, 0)? as u16;
    if is_null(selector) {
        core.ldtr = null_segment(selector);
        return Ok(());
    }
    let d = read_table_descriptor(core, selector)?;
    if d.system_type() != Some(system_type::LDT) {
        return Err(selector_fault(vector::GP, selector, 0));
    }
    check_presence(d, selector)?;
    core.ldtr = d.to_segment(selector);
    Ok(())
}

fn read_table_descriptor(core: &mut Core, selector: u16) -> Exec<Descriptor> {
    if selector & 4 != 0 {
        return Err(selector_fault(vector::GP, selector, 0));
    }
    let d = read_system_descriptor(core, selector, vector::GP, 0)?;
    if is_canonical(d.base()) { Ok(d) } else { Err(selector_fault(vector::GP, selector, 0)) }
}

fn check_presence(d: Descriptor, selector: u16) -> Exec<()> {
    if d.is_present() { Ok(()) } else { Err(selector_fault(vector::NP, selector, 0)) }
}

fn load_tr(core: &mut Core, insn: &Instruction) -> Exec<()> {
    const BUSY: u32 = 2;
    require_level_0(core)?;
    intercept_selector(core, insn)?;
    let selector = read_op(core, insn, 0)? as u16;
    if is_null(selector) {
        return Err(gp(0));
    }
    let d = read_table_descriptor(core, selector)?;
    let is_available = match d.system_type() {
        Some(system_type::TSS32) => true,
        Some(system_type::TSS16) => !core.is_long(),
        _ => false,
    };
    if !is_available {
        return Err(selector_fault(vector::GP, selector, 0));
    }
    check_presence(d, selector)?;
    write_rights(core, selector, (d.attr() | BUSY) as u8)?;
    core.tr = d.to_segment(selector);
    core.tr.attr |= BUSY;
    Ok(())
}

fn arpl(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let wanted = get_reg(core, insn.op1_register()) & 3;
    let old = read_op(core, insn, 0)?;
    let raises = old & 3 < wanted;
    if raises {
        write_op(core, insn, 0, old & !3 | wanted)?;
    }
    set_zf(core, raises);
    Ok(())
}

fn set_zf(core: &mut Core, on: bool) {
    core.rflags = core.rflags & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

/// LAR, LSL, VERR, VERW: what a selector's descriptor says, in ZF and the destination.
fn ask(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let asks_for_value = matches!(insn.mnemonic(), Mnemonic::Lar | Mnemonic::Lsl);
    let selector = read_op(core, insn, u32::from(asks_for_value))? as u16;
    let visible = match visible_descriptor(core, selector) {
        Ok(d) => d.filter(|d| is_for(core, insn.mnemonic(), *d, selector)),
        Err(trap) => return Err(trap),
    };
    if let Some(d) = visible {
        match insn.mnemonic() {
            Mnemonic::Lar => set_reg(core, insn.op0_register(), d.raw >> 32 & 0x00F0_FF00),
            Mnemonic::Lsl => set_reg(core, insn.op0_register(), u64::from(d.limit())),
            _ => {}
        }
    }
    set_zf(core, visible.is_some());
    Ok(())
}

fn visible_descriptor(core: &mut Core, selector: u16) -> Exec<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    match read_descriptor(core, selector, vector::GP, 0) {
        Ok(d) => Ok(Some(d)),
        Err(Trap::Exception(e)) if e.vector == vector::GP => Ok(None),
        Err(trap) => Err(trap),
    }
}

fn is_for(core: &Core, mnemonic: Mnemonic, d: Descriptor, selector: u16) -> bool {
    use system_type as t;
    let rpl = (selector & 3) as u8;
    if !d.is_conforming() && (d.dpl() < core.cpl || d.dpl() < rpl) {
        return false;
    }
    let is_long = core.is_long();
    match (mnemonic, d.system_type()) {
        (Mnemonic::Verr, kind) => kind.is_none() && (!d.is_code() || d.has(attr::RW)),
        (Mnemonic::Verw, _) => d.is_writable_data(),
        (_, None | Some(t::LDT | t::TSS32 | t::TSS32_BUSY)) => true,
        (_, Some(t::TSS16 | t::TSS16_BUSY)) => !is_long,
        (Mnemonic::Lar, Some(t::CALL32)) => true,
        (Mnemonic::Lar, Some(t::CALL16 | t::TASK_GATE)) => !is_long,
        _ => false,
    }
}
