//! Segmentation (SDM 3A, "Protected-Mode Memory Management" and "Protection"): from a segment and
//! an offset to a linear address, and from a selector to the hidden part of a segment register.
//!
//! Every check that fails says so with the manual's vector and error code; nothing is changed then.

use crate::arch::bits::{cr0, rflags};
use crate::arch::exception::{Exception, vector};
use crate::arch::segment::{Segment, attr, seg};
use crate::cpu::state::{Core, Mode};
use crate::cpu::trap::{Exec, Trap, gp};
use crate::mmu::access::Who;

/// System-descriptor types (SDM 3A, "System Descriptor Types").
#[allow(missing_docs)]
pub mod system_type {
    pub const TSS16: u32 = 0x1;
    pub const LDT: u32 = 0x2;
    pub const TSS16_BUSY: u32 = 0x3;
    pub const CALL16: u32 = 0x4;
    pub const TASK_GATE: u32 = 0x5;
    pub const INT16: u32 = 0x6;
    pub const TRAP16: u32 = 0x7;
    pub const TSS32: u32 = 0x9;
    pub const TSS32_BUSY: u32 = 0xB;
    pub const CALL32: u32 = 0xC;
    pub const INT32: u32 = 0xE;
    pub const TRAP32: u32 = 0xF;
}

/// A segment or gate descriptor as it lies in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Descriptor {
    /// The eight bytes that every descriptor has.
    pub raw: u64,
    /// The next eight, of system descriptors in IA-32e mode.
    pub upper: u64,
}

impl Descriptor {
    /// Access rights in the VMX format.
    #[must_use]
    pub fn attr(self) -> u32 {
        (self.raw >> 40 & 0xF0FF) as u32
    }
    /// Whether all of the given access-rights bits are set.
    #[must_use]
    pub fn has(self, bits: u32) -> bool {
        self.attr() & bits == bits
    }
    /// The type of a system descriptor; `None` for code and data.
    #[must_use]
    pub fn system_type(self) -> Option<u32> {
        if self.has(attr::S) { None } else { Some(self.attr() & attr::TYPE) }
    }
    /// A code segment.
    #[must_use]
    pub fn is_code(self) -> bool {
        self.has(attr::S | attr::CODE)
    }
    /// A data segment that may be written.
    #[must_use]
    pub fn is_writable_data(self) -> bool {
        self.has(attr::S | attr::RW) && !self.has(attr::CODE)
    }
    /// A conforming code segment.
    #[must_use]
    pub fn is_conforming(self) -> bool {
        self.has(attr::S | attr::CODE | attr::EC)
    }
    /// The present bit.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.has(attr::P)
    }
    /// Privilege level.
    #[must_use]
    pub fn dpl(self) -> u8 {
        (self.attr() >> 5 & 3) as u8
    }
    /// The last valid offset.
    #[must_use]
    pub fn limit(self) -> u32 {
        let pages = (self.raw & 0xFFFF | self.raw >> 32 & 0xF_0000) as u32;
        if self.has(attr::G) { pages << 12 | 0xFFF } else { pages }
    }
    /// Where the segment begins (with the upper half of a 16-byte descriptor).
    #[must_use]
    pub fn base(self) -> u64 {
        self.raw >> 16 & 0xFF_FFFF | self.raw >> 32 & 0xFF00_0000 | self.upper << 32
    }
    /// Gates: the selector of the code segment or TSS.
    #[must_use]
    pub fn gate_selector(self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Gates: the entry point.
    #[must_use]
    pub fn gate_offset(self) -> u64 {
        self.raw & 0xFFFF | self.raw >> 32 & 0xFFFF_0000 | self.upper << 32
    }
    /// What a segment register holds after a load of this descriptor.
    #[must_use]
    pub fn to_segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector }
    }
}

/// A segment register that holds a null selector.
#[must_use]
pub fn null_segment(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, attr: attr::UNUSABLE, selector }
}

/// A segment register as virtual-8086 mode has it.
#[must_use]
pub fn v86_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xFFFF, attr: 0xF3, selector }
}

/// A fault whose error code names a selector (`ext`: 1 while an event from outside is delivered).
#[must_use]
pub fn selector_fault(vector: u8, selector: u16, ext: u32) -> Trap {
    Trap::Exception(Exception::coded(vector, u32::from(selector & 0xFFFC) | ext))
}

/// Whether a selector is null.
#[must_use]
pub fn is_null(selector: u16) -> bool {
    selector & 0xFFFC == 0
}

/// Whether a 64-bit address is canonical (48 bits, sign-extended).
#[inline]
#[must_use]
pub fn is_canonical(address: u64) -> bool {
    address.cast_signed() << 16 >> 16 == address.cast_signed()
}

/// Whether `size` bytes at `offset` are inside a segment ("Limit Checking").
#[must_use]
pub fn fits(s: &Segment, offset: u64, size: u64) -> bool {
    let last = offset.wrapping_add(size.wrapping_sub(1));
    if s.attr & (attr::S | attr::CODE | attr::EC) == attr::S | attr::EC {
        let top = if s.has(attr::DB) { 0xFFFF_FFFF } else { 0xFFFF };
        offset > u64::from(s.limit) && last <= top
    } else {
        last <= u64::from(s.limit) && last >= offset
    }
}

fn outside(is_stack: bool) -> Trap {
    Trap::Exception(Exception::coded(if is_stack { vector::SS } else { vector::GP }, 0))
}

/// The linear address of `size` bytes at `offset` of segment register `index`.
///
/// # Errors
/// #GP(0), or #SS(0) if the segment is SS or `is_stack`; #AC(0).
#[inline]
pub fn linear(core: &Core, index: usize, offset: u64, size: usize, write: bool, is_stack: bool) -> Exec<u64> {
    let address = linear_unaligned(core, index, offset, size, write, is_stack)?;
    if core.cpl == 3 && core.flag(rflags::AC) && core.cr0 & cr0::AM != 0 {
        check_alignment(address, size)?;
    }
    Ok(address)
}

/// As [`linear`], for accesses that make no #AC.
///
/// # Errors
/// As [`linear`], but for #AC(0).
#[inline]
pub fn linear_unaligned(
    core: &Core,
    index: usize,
    offset: u64,
    size: usize,
    write: bool,
    is_stack: bool,
) -> Exec<u64> {
    let is_stack = is_stack || index == seg::SS;
    if core.mode == Mode::Bits64 {
        let address = if index >= seg::FS { core.seg[index].base.wrapping_add(offset) } else { offset };
        let last = address.wrapping_add(size as u64).wrapping_sub(1);
        if !is_canonical(address) || !is_canonical(last) {
            return Err(outside(is_stack));
        }
        Ok(address)
    } else {
        legacy_linear(core, index, offset, size, write, is_stack)
    }
}

fn check_alignment(address: u64, size: usize) -> Exec<()> {
    let multiple = match size {
        2 | 4 | 8 | 16 => size as u64,
        10 => 8,
        32 => 16,            // the manual leaves it open; as this computer's processor
        14 | 94 => 2,        // FNSTENV, FNSAVE
        28 | 108 | 512 => 4, // the same with 32-bit operands; FXSAVE, before its own #GP
        _ => 1,
    };
    if address & (multiple - 1) != 0 {
        return Err(Exception::coded(vector::AC, 0).into());
    }
    Ok(())
}

fn legacy_linear(
    core: &Core,
    index: usize,
    offset: u64,
    size: usize,
    write: bool,
    is_stack: bool,
) -> Exec<u64> {
    let s = &core.seg[index];
    let is_flat = s.base == 0 && s.limit == u32::MAX && s.attr & 0x1009E == 0x92;
    if is_flat && offset <= (1 << 32) - size as u64 {
        return Ok(offset);
    }
    let may = if core.mode == Mode::Real || core.mode == Mode::V86 {
        true
    } else if s.is_unusable() {
        false
    } else if write {
        s.attr & (attr::CODE | attr::RW) == attr::RW
    } else {
        s.attr & (attr::CODE | attr::RW) != attr::CODE
    };
    if !may || !fits(s, offset, size as u64) {
        return Err(outside(is_stack));
    }
    Ok(s.base.wrapping_add(offset) & 0xFFFF_FFFF)
}

/// The linear address of the instruction at `rip` of the current code segment.
///
/// # Errors
/// #GP(0) beyond the limit, or if not canonical in 64-bit mode.
#[inline]
pub fn code_linear(core: &Core, rip: u64) -> Exec<u64> {
    if core.mode == Mode::Bits64 {
        return if is_canonical(rip) { Ok(rip) } else { Err(gp(0)) };
    }
    let cs = &core.seg[seg::CS];
    if rip > u64::from(cs.limit) {
        return Err(gp(0));
    }
    Ok(cs.base.wrapping_add(rip) & 0xFFFF_FFFF)
}

/// An address inside a table of the processor, wrapped as the mode wraps.
#[must_use]
pub fn table_address(core: &Core, base: u64, offset: u64) -> u64 {
    let sum = base.wrapping_add(offset);
    if core.is_long() { sum } else { sum & 0xFFFF_FFFF }
}

/// Where in memory the descriptor of a selector lies, if its table reaches that far.
fn place_of(core: &Core, selector: u16, bytes: u64) -> Option<u64> {
    let (base, limit) = if selector & 4 == 0 {
        (core.gdtr.base, u32::from(core.gdtr.limit))
    } else if core.ldtr.is_unusable() {
        return None;
    } else {
        (core.ldtr.base, core.ldtr.limit)
    };
    let offset = u64::from(selector & 0xFFF8);
    (offset + bytes - 1 <= u64::from(limit)).then(|| table_address(core, base, offset))
}

/// The descriptor that a (not null) selector names.
///
/// # Errors
/// `vector`(selector) if it is outside its table; page faults.
pub fn read_descriptor(core: &mut Core, selector: u16, bad: u8, ext: u32) -> Exec<Descriptor> {
    let place = place_of(core, selector, 8).ok_or_else(|| selector_fault(bad, selector, ext))?;
    Ok(Descriptor { raw: core.read_lin(place, 8, Who::Processor)?, upper: 0 })
}

/// As [`read_descriptor`], with the upper eight bytes that system descriptors have in IA-32e mode.
///
/// # Errors
/// `bad`(selector) if it is outside its table or its upper type field is not zero; page faults.
pub fn read_system_descriptor(core: &mut Core, selector: u16, bad: u8, ext: u32) -> Exec<Descriptor> {
    let mut d = read_descriptor(core, selector, bad, ext)?;
    if core.is_long() && !d.has(attr::S) {
        let place = place_of(core, selector, 16).ok_or_else(|| selector_fault(bad, selector, ext))?;
        d.upper = core.read_lin(core.linear_add(place, 8), 8, Who::Processor)?;
        if d.upper >> 40 & 0x1F != 0 {
            return Err(selector_fault(bad, selector, ext));
        }
    }
    Ok(d)
}

/// Replace the type-and-rights byte of a descriptor in its table (accessed and busy flags).
///
/// # Errors
/// Page faults.
pub fn write_rights(core: &mut Core, selector: u16, rights: u8) -> Exec<()> {
    match place_of(core, selector, 8) {
        Some(place) => core.write_lin(core.linear_add(place, 5), 1, u64::from(rights), Who::Processor),
        None => Ok(()),
    }
}

/// Set the accessed flag of a code or data descriptor, in the table and in `d`.
///
/// # Errors
/// Page faults.
pub fn mark_accessed(core: &mut Core, selector: u16, d: &mut Descriptor) -> Exec<()> {
    if !d.has(attr::ACCESSED) {
        write_rights(core, selector, (d.attr() | attr::ACCESSED) as u8)?;
        d.raw |= u64::from(attr::ACCESSED) << 40;
    }
    Ok(())
}

/// The checks of a load of SS for privilege level `cpl`, with the vector of a failed check
/// (#GP for MOV and far returns, #TS for stacks that come from a TSS).
///
/// # Errors
/// `bad`(selector), #SS(selector) if not present; page faults.
pub fn read_stack_segment(core: &mut Core, selector: u16, cpl: u8, bad: u8, ext: u32) -> Exec<Segment> {
    if is_null(selector) {
        return Err(selector_fault(bad, 0, ext));
    }
    let mut d = read_descriptor(core, selector, bad, ext)?;
    if (selector & 3) as u8 != cpl || d.dpl() != cpl || !d.is_writable_data() {
        return Err(selector_fault(bad, selector, ext));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::SS, selector, ext));
    }
    mark_accessed(core, selector, &mut d)?;
    Ok(d.to_segment(selector))
}

/// The checks of a load of DS, ES, FS or GS; the segment to put there.
///
/// # Errors
/// #GP(selector), #NP(selector) — or `bad` instead of #GP, for task switches; page faults.
pub fn read_data_segment(core: &mut Core, selector: u16, bad: u8) -> Exec<Segment> {
    if is_null(selector) {
        return Ok(null_segment(selector));
    }
    let mut d = read_descriptor(core, selector, bad, 0)?;
    let is_readable = d.has(attr::S) && (!d.has(attr::CODE) || d.has(attr::RW));
    let rpl = (selector & 3) as u8;
    if !is_readable || !d.is_conforming() && (rpl > d.dpl() || core.cpl > d.dpl()) {
        return Err(selector_fault(bad, selector, 0));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, 0));
    }
    mark_accessed(core, selector, &mut d)?;
    Ok(d.to_segment(selector))
}

/// What a segment register becomes in real-address mode: only base and selector change, so that
/// a limit set in protected mode stays.
#[must_use]
pub fn real_segment(old: &Segment, selector: u16) -> Segment {
    let granularity = if old.limit > 0xF_FFFF { 1 << 15 } else { 0 }; // a null one keeps its limit
    let rights = if old.is_unusable() { 0x93 | granularity } else { old.attr };
    Segment { base: u64::from(selector) << 4, selector, attr: rights, ..*old }
}

/// The segment that a load of `selector` into SS, DS, ES, FS or GS gives, all checks done.
///
/// # Errors
/// The manual's, under "MOV—Move".
pub fn read_segment(core: &mut Core, index: usize, selector: u16) -> Exec<Segment> {
    match core.mode {
        Mode::Real => return Ok(real_segment(&core.seg[index], selector)),
        Mode::V86 => return Ok(v86_segment(selector)),
        _ => {}
    }
    if index != seg::SS {
        return read_data_segment(core, selector, vector::GP);
    }
    if is_null(selector) && core.is_64() && core.cpl < 3 && (selector & 3) as u8 == core.cpl {
        return Ok(null_stack(selector));
    }
    let cpl = core.cpl;
    read_stack_segment(core, selector, cpl, vector::GP, 0)
}

/// SS with a null selector, as 64-bit mode allows it: unusable, its DPL kept.
#[must_use]
pub fn null_stack(selector: u16) -> Segment {
    let mut s = null_segment(selector);
    s.attr |= u32::from(selector & 3) << 5;
    s
}

/// Load DS, ES, FS, GS or SS.
///
/// # Errors
/// As [`read_segment`]; the register is unchanged then.
pub fn load_data_segment(core: &mut Core, index: usize, selector: u16) -> Exec<()> {
    core.seg[index] = read_segment(core, index, selector)?;
    Ok(())
}

/// A return to an outer level: data segments that it may not use get a null selector, and null
/// selectors lose their RPL.
///
/// Nothing is loaded: base and limit stay as they were, unlike after a load of a null selector (SDM
/// 2, "IRET/IRETD/IRETQ—Interrupt Return", "RET—Return From Procedure": SegmentSelector := NULL).  So
/// a base that an MSR has given to FS or GS, under whatever selector, survives.
pub fn drop_inner_segments(core: &mut Core) {
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = &mut core.seg[index];
        let is_conforming = s.attr & (attr::CODE | attr::EC) == attr::CODE | attr::EC;
        if is_null(s.selector) {
            s.selector = 0;
        } else if !is_conforming && s.dpl() < core.cpl {
            *s = Segment { selector: 0, attr: attr::UNUSABLE, ..*s };
        }
    }
}
