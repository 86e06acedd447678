//! Operands: registers, effective addresses, memory, immediates.
//!
//! An instruction that reads and writes the same memory operand translates it for writing first,
//! so that a page without write permission faults with W set and nothing was changed.

use iced_x86::{CodeSize, Instruction, OpKind, Register};

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::segment::seg;
use crate::cpu::flags::mask;
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const AL: usize = Register::AL as usize;
const AH: usize = Register::AH as usize;
const SPL: usize = Register::SPL as usize;
const AX: usize = Register::AX as usize;
const EAX: usize = Register::EAX as usize;
const RAX: usize = Register::RAX as usize;
const EIP: usize = Register::EIP as usize;
const ES: usize = Register::ES as usize;
const GS: usize = Register::GS as usize;

/// Bytes in a general-purpose or segment register.
#[inline]
#[must_use]
pub fn size_of_reg(r: Register) -> usize {
    match r as usize {
        0 => 0,
        AL..AX => 1,
        AX..EAX => 2,
        EAX..RAX => 4,
        RAX..EIP => 8,
        _ => r.size(),
    }
}

/// Bytes in operand `i`.
#[inline]
#[must_use]
pub fn size_of_op(insn: &Instruction, i: u32) -> usize {
    match insn.op_kind(i) {
        OpKind::Register => size_of_reg(insn.op_register(i)),
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 | OpKind::NearBranch16 | OpKind::FarBranch16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 | OpKind::NearBranch32 | OpKind::FarBranch32 => 4,
        OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::NearBranch64 => 8,
        _ => insn.memory_size().size(),
    }
}

/// The value of a general-purpose, instruction-pointer or segment register, zero-extended.
#[inline]
#[must_use]
pub fn get_reg(core: &Core, r: Register) -> u64 {
    let n = r as usize;
    match n {
        RAX..EIP => core.gpr[n - RAX],
        EAX..RAX => u64::from(core.gpr[n - EAX] as u32),
        AX..EAX => u64::from(core.gpr[n - AX] as u16),
        AL..AH => u64::from(core.gpr[n - AL] as u8),
        AH..SPL => u64::from((core.gpr[n - AH] >> 8) as u8),
        SPL..AX => u64::from(core.gpr[n - SPL + 4] as u8),
        ES..=GS => u64::from(core.seg[n - ES].selector),
        _ => 0,
    }
}

/// Write a general-purpose register; what lies above its size in `v` is ignored.  A 32-bit write
/// clears the upper half.
#[inline]
pub fn set_reg(core: &mut Core, r: Register, v: u64) {
    let n = r as usize;
    match n {
        RAX..EIP => core.gpr[n - RAX] = v,
        EAX..RAX => core.gpr[n - EAX] = u64::from(v as u32),
        AX..EAX => insert(&mut core.gpr[n - AX], 0xFFFF, v),
        AL..AH => insert(&mut core.gpr[n - AL], 0xFF, v),
        AH..SPL => insert(&mut core.gpr[n - AH], 0xFF00, v << 8),
        SPL..AX => insert(&mut core.gpr[n - SPL + 4], 0xFF, v),
        _ => debug_assert!(false, "{r:?} is no general-purpose register"),
    }
}

#[inline]
fn insert(place: &mut u64, which: u64, v: u64) {
    *place = *place & !which | v & which;
}

/// Write the general-purpose register number `n` with a width of `size` bytes (2, 4 or 8).
#[inline]
pub fn set_gpr(core: &mut Core, n: usize, size: usize, v: u64) {
    match size {
        2 => insert(&mut core.gpr[n], 0xFFFF, v),
        4 => core.gpr[n] = u64::from(v as u32),
        _ => core.gpr[n] = v,
    }
}

/// The segment register that the memory operand uses, as an index.  64-bit mode knows no override
/// but FS and GS.
#[inline]
#[must_use]
pub fn segment_of(insn: &Instruction) -> usize {
    let named = (insn.memory_segment() as usize).wrapping_sub(ES).min(seg::GS);
    if named < seg::FS && insn.segment_prefix() != Register::None && insn.code_size() == CodeSize::Code64 {
        let is_stack =
            matches!(insn.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        return if is_stack { seg::SS } else { seg::DS };
    }
    named
}

/// All ones in an address of the memory operand's address size.
#[inline]
#[must_use]
pub fn address_mask(insn: &Instruction) -> u64 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let size = match (base, index) {
        (Register::None, Register::None) => insn.memory_displ_size() as usize,
        (Register::None, r) | (r, _) => size_of_reg(r),
    };
    match size {
        2 => 0xFFFF,
        8 => u64::MAX,
        _ => 0xFFFF_FFFF,
    }
}

/// The effective address of the memory operand: masked to the address size, no segment base.
#[inline]
#[must_use]
pub fn ea(core: &Core, insn: &Instruction) -> u64 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    // Of an operand relative to RIP the displacement already is the address.
    let mut a = insn.memory_displacement64();
    a = a.wrapping_add(get_reg(core, base));
    if index != Register::None {
        a = a.wrapping_add(get_reg(core, index).wrapping_mul(u64::from(insn.memory_index_scale())));
    }
    a & address_mask(insn)
}

/// Whether the linear address of the memory operand is no multiple of 16 (where that is a #GP, it
/// comes before the segment's checks and before #AC).
#[must_use]
pub fn is_misaligned(core: &Core, insn: &Instruction) -> bool {
    is_no_multiple(core, insn, 16)
}

/// As [`is_misaligned`].
#[must_use]
pub fn is_no_multiple(core: &Core, insn: &Instruction, multiple: u64) -> bool {
    let index = segment_of(insn);
    let has_base = !core.is_64() || index >= seg::FS;
    let base = if has_base { core.seg[index].base } else { 0 };
    base.wrapping_add(ea(core, insn)) & (multiple - 1) != 0
}

/// The linear address of the memory operand, with the segment's checks made for `size` bytes.
///
/// # Errors
/// #GP(0), #SS(0) or #AC(0) of the segment.
#[inline]
pub fn mem_linear(core: &mut Core, insn: &Instruction, size: usize, access: Access) -> Exec<u64> {
    linear_at(core, segment_of(insn), ea(core, insn), size, access)
}

/// As [`mem_linear`], for an offset already computed.
///
/// # Errors
/// As [`mem_linear`].
#[inline]
pub fn linear_at(core: &mut Core, segment: usize, offset: u64, size: usize, access: Access) -> Exec<u64> {
    let write = access == Access::Write;
    let gva = segment::linear(core, segment, offset, size, write, segment == seg::SS)?;
    watch(core, gva, size, write);
    Ok(gva)
}

/// Note data breakpoints that an access meets.
#[inline]
pub fn watch(core: &mut Core, gva: u64, size: usize, write: bool) {
    if core.dr[7] & 0xFF != 0 {
        watch_armed(core, gva, size, write);
    }
}

#[cold]
fn watch_armed(core: &mut Core, gva: u64, size: usize, write: bool) {
    for i in 0..4 {
        let control = core.dr[7] >> (16 + 4 * i);
        let is_on = core.dr[7] >> (2 * i) & 3 != 0;
        let kind = control & 3; // 0 instruction, 1 write, 2 I/O, 3 read or write
        let len = match control >> 2 & 3 {
            2 => 8,
            n => n + 1,
        };
        let at = core.dr[i] & !(len - 1);
        let meets = gva < at.wrapping_add(len) && at < gva.wrapping_add(size as u64);
        if is_on && meets && (kind == 3 || kind == 1 && write) {
            core.pending_db |= 1 << i;
        }
    }
}

/// The value of operand `i`, zero-extended (immediates: sign-extended to 64 bits).
///
/// # Errors
/// What the memory access raises.
#[inline]
pub fn read_op(core: &mut Core, insn: &Instruction, i: u32) -> Exec<u64> {
    match insn.op_kind(i) {
        OpKind::Register => Ok(get_reg(core, insn.op_register(i))),
        OpKind::Memory => read_mem(core, insn, insn.memory_size().size()),
        _ => Ok(insn.immediate(i)),
    }
}

/// Read the memory operand with a given size.
///
/// # Errors
/// What the memory access raises.
#[inline]
pub fn read_mem(core: &mut Core, insn: &Instruction, size: usize) -> Exec<u64> {
    let gva = mem_linear(core, insn, size, Access::Read)?;
    core.read_lin(gva, size, Who::Program)
}

/// Write operand `i`.
///
/// # Errors
/// What the memory access raises; nothing was written then.
#[inline]
pub fn write_op(core: &mut Core, insn: &Instruction, i: u32, v: u64) -> Exec<()> {
    match insn.op_kind(i) {
        OpKind::Register => {
            set_reg(core, insn.op_register(i), v);
            Ok(())
        }
        _ => {
            let size = insn.memory_size().size();
            let gva = mem_linear(core, insn, size, Access::Write)?;
            core.write_lin(gva, size, v & mask(size), Who::Program)
        }
    }
}

/// Replace operand 0 by what `f` makes of it; `f` returns the new value and the arithmetic flags.
/// With LOCK this is atomic (and `f` may be called more than once).
///
/// # Errors
/// What the memory access raises; operand and flags are unchanged then.
#[inline]
pub fn modify_op0(
    core: &mut Core,
    insn: &Instruction,
    size: usize,
    f: impl Fn(u64) -> (u64, u64),
) -> Exec<()> {
    let flags = if insn.op0_kind() == OpKind::Register {
        let r = insn.op0_register();
        let (new, after) = f(get_reg(core, r));
        set_reg(core, r, new);
        after
    } else {
        let gva = mem_linear(core, insn, size, Access::Write)?;
        modify_mem(core, insn, gva, size, f)?
    };
    core.set_arith(flags);
    Ok(())
}

/// Replace the word at a linear address by what `f` makes of it, atomically if the instruction
/// has LOCK.  Returns the second part of `f`'s answer.
///
/// # Errors
/// What the memory access raises.
#[inline]
pub fn modify_mem(
    core: &mut Core,
    insn: &Instruction,
    gva: u64,
    size: usize,
    f: impl Fn(u64) -> (u64, u64),
) -> Exec<u64> {
    let mut beside = 0;
    let mut g = |old| {
        let (new, b) = f(old);
        beside = b;
        new
    };
    if insn.has_lock_prefix() {
        core.update_lin(gva, size, g)?;
        return Ok(beside);
    }
    if (gva & PAGE_OFFSET) + size as u64 <= FRAME_BYTES {
        let (hpa, special) = core.translate(gva, Access::Write)?;
        if !special {
            let new = g(core.mem.load(hpa, size));
            core.mem.store(hpa, size, new);
            core.note_write(hpa, size as u64);
            return Ok(beside);
        }
    } else {
        core.probe_write(gva, size, Who::Program)?;
    }
    let new = g(core.read_lin(gva, size, Who::Program)?);
    core.write_lin(gva, size, new & mask(size), Who::Program)?;
    Ok(beside)
}
