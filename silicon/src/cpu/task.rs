//! Task switches (SDM 3A, "Task Management").
//!
//! Until the new TSS is read and the old one found writable nothing changes.  From "Commits to the
//! new task" on, faults belong to the new task and find its registers loaded.

use crate::addr::PAGE_OFFSET;
use crate::arch::bits::{cr0, cr4, rflags};
use crate::arch::exception::{Exception, vector};
use crate::arch::segment::{attr, seg};
use crate::cpu::cr;
use crate::cpu::event::Event;
use crate::cpu::frame::Cursor;
use crate::cpu::pmu;
use crate::cpu::segment::{
    Descriptor, is_null, mark_accessed, null_segment, read_data_segment, read_descriptor, read_stack_segment,
    selector_fault, system_type, table_address, v86_segment, write_rights,
};
use crate::cpu::state::{Activity, Core, Shadow};
use crate::cpu::trap::{Exec, gp};
use crate::mmu::access::Who;
use crate::vmx::intercept::Sensitive;

/// What causes a task switch; the numbers are those of the VM-exit qualification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// CALL.
    Call = 0,
    /// IRET with NT set.
    Iret = 1,
    /// JMP.
    Jump = 2,
    /// A task gate in the IDT.
    Gate = 3,
}

const BUSY: u32 = 2;
/// Debug register 6: the T flag of a TSS made this trap.
const DR6_BT: u64 = 1 << 15;

/// Where things are in a TSS of 16 or 32 bits.
struct Layout {
    /// Bytes of a field.
    width: usize,
    ip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    segment_count: usize,
    ldt: u64,
    last: u32,
}

static TSS16: Layout = Layout {
    width: 2,
    ip: 0x0E,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2A,
    last: 0x2B,
};
static TSS32: Layout = Layout {
    width: 4,
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    last: 0x67,
};

const TSS32_CR3: u64 = 0x1C;
const TSS32_TRAP: u64 = 0x64;

fn layout_of(kind: u32) -> &'static Layout {
    if kind & attr::CODE != 0 { &TSS32 } else { &TSS16 }
}

/// What the new TSS holds.
struct Image {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    traps: bool,
}

fn read_tss(core: &mut Core, base: u64, offset: u64, size: usize) -> Exec<u64> {
    core.read_lin(table_address(core, base, offset), size, Who::Processor)
}

fn read_image(core: &mut Core, base: u64, l: &Layout) -> Exec<Image> {
    let w = l.width as u64;
    let is_32 = l.width == 4;
    let mut image = Image {
        cr3: if is_32 { Some(read_tss(core, base, TSS32_CR3, 4)?) } else { None },
        ip: read_tss(core, base, l.ip, l.width)?,
        flags: read_tss(core, base, l.flags, l.width)?,
        registers: [0; 8],
        segments: [0; 6],
        ldt: read_tss(core, base, l.ldt, 2)? as u16,
        traps: is_32 && read_tss(core, base, TSS32_TRAP, 2)? & 1 != 0,
    };
    for i in 0..8 {
        let value = read_tss(core, base, l.registers + w * i as u64, l.width)?;
        image.registers[i] = if is_32 { value } else { value | 0xFFFF_0000 };
    }
    for i in 0..l.segment_count {
        image.segments[i] = read_tss(core, base, l.segments + w * i as u64, 2)? as u16;
    }
    Ok(image)
}

fn save_old(core: &mut Core, l: &Layout, ip: u64, flags: u64) -> Exec<()> {
    let (base, w) = (core.tr.base, l.width as u64);
    let mut fields = vec![(l.ip, ip, l.width), (l.flags, flags, l.width)];
    for i in 0..8 {
        fields.push((l.registers + w * i as u64, core.gpr[i], l.width));
    }
    for i in 0..l.segment_count {
        fields.push((l.segments + w * i as u64, u64::from(core.seg[i].selector), 2));
    }
    for is_real in [false, true] {
        for &(offset, value, size) in &fields {
            let place = table_address(core, base, offset);
            if is_real {
                core.write_lin(place, size, value, Who::Processor)?;
            } else {
                core.probe_write(place, size, Who::Processor)?;
            }
        }
    }
    Ok(())
}

/// The descriptor behind a task gate: an available TSS of the GDT.
fn read_gated_tss(core: &mut Core, selector: u16, ext: u32) -> Exec<Descriptor> {
    if selector & 4 != 0 {
        return Err(selector_fault(vector::GP, selector, ext));
    }
    let d = read_descriptor(core, selector, vector::GP, ext)?;
    if !matches!(d.system_type(), Some(system_type::TSS16 | system_type::TSS32)) {
        return Err(selector_fault(vector::GP, selector, ext));
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, ext));
    }
    Ok(d)
}

/// An event goes through a task gate of the IDT.
pub(crate) fn through_interrupt_gate(
    core: &mut Core,
    selector: u16,
    event: &Event,
    resume: bool,
) -> Exec<()> {
    let d = read_gated_tss(core, selector, event.ext())?;
    let ip = core.rip.wrapping_add(u64::from(event.length)) & 0xFFFF_FFFF;
    let flags = if resume { core.rflags | rflags::RF } else { core.rflags };
    let length = u32::from(event.length);
    switch(core, selector, d, Source::Gate, Return { ip, flags, length }, event.ext())?;
    if let Some(code) = event.error {
        let width = layout_of(d.attr()).width;
        let mut stack = Cursor::current(core).with_code(event.ext());
        stack.push(core, width, u64::from(code))?;
        stack.commit(core);
    }
    Ok(())
}

/// CALL or JMP through a task gate, whose own checks are done.
pub(crate) fn through_task_gate(core: &mut Core, selector: u16, source: Source, length: u32) -> Exec<()> {
    let d = read_gated_tss(core, selector, 0)?;
    to(core, selector, d, source, length)
}

/// CALL, JMP or IRET to a TSS whose descriptor passed its checks.
pub(crate) fn to(core: &mut Core, selector: u16, d: Descriptor, source: Source, length: u32) -> Exec<()> {
    let ip = core.rip.wrapping_add(u64::from(length)) & 0xFFFF_FFFF;
    let mut flags = core.rflags;
    if source == Source::Iret {
        flags &= !rflags::NT;
    }
    switch(core, selector, d, source, Return { ip, flags, length }, 0)
}

/// What the old task's TSS remembers.
struct Return {
    ip: u64,
    flags: u64,
    length: u32,
}

fn switch(core: &mut Core, selector: u16, d: Descriptor, source: Source, old: Return, ext: u32) -> Exec<()> {
    let l = layout_of(d.attr());
    if d.limit() < l.last {
        return Err(selector_fault(vector::TS, selector, ext));
    }
    core.vmx.task_flags = old.flags;
    core.intercept(Sensitive::TaskSwitch { selector, source: source as u8 }, old.length)?;
    let old_layout = layout_of(core.tr.attr);
    if core.tr.limit < old_layout.last {
        return Err(selector_fault(vector::TS, core.tr.selector, ext));
    }
    let image = read_image(core, d.base(), l)?;
    let is_nested = matches!(source, Source::Call | Source::Gate);
    if is_nested {
        core.probe_write(d.base(), 2, Who::Processor)?;
    }
    save_old(core, old_layout, old.ip, old.flags)?;
    if !is_nested {
        let rights = (core.tr.attr & !BUSY) as u8;
        write_rights(core, core.tr.selector, rights)?;
    }
    if is_nested {
        core.write_lin(d.base(), 2, u64::from(core.tr.selector), Who::Processor)?;
    }
    if source != Source::Iret {
        write_rights(core, selector, (d.attr() | BUSY) as u8)?;
    }
    core.tr = d.to_segment(selector);
    core.tr.attr |= BUSY;
    commit(core, &image, is_nested, ext)
}

/// "Commits to the new task": load its state, then qualify its selectors.
fn commit(core: &mut Core, image: &Image, is_nested: bool, ext: u32) -> Exec<()> {
    core.cr0 |= cr0::TS;
    core.shadow = Shadow::None;
    core.activity = Activity::Active;
    core.dr[7] &= !0x155; // L0 … L3 and LE
    core.attention = 1;
    core.rip = image.ip;
    core.gpr[..8].copy_from_slice(&image.registers);
    core.rflags = image.flags & rflags::KNOWN | rflags::FIXED1;
    if is_nested {
        core.rflags |= rflags::NT;
    }
    for (s, &selector) in core.seg.iter_mut().zip(&image.segments) {
        *s = null_segment(selector);
    }
    core.ldtr = null_segment(image.ldt);
    let is_v86 = core.flag(rflags::VM);
    pmu::set_level(core, if is_v86 { 3 } else { (image.segments[seg::CS] & 3) as u8 });
    core.refresh();
    if let Some(cr3) = image.cr3.filter(|_| core.is_paging()) {
        if core.cr4 & cr4::PAE != 0 {
            core.pdpte = cr::read_pdptes(core, cr3)?;
        }
        core.cr3 = if core.cr4 & cr4::PCIDE != 0 { cr3 & !PAGE_OFFSET } else { cr3 };
        core.flush_non_global();
    }
    load_ldtr(core, image.ldt, ext)?;
    if is_v86 {
        for (s, &selector) in core.seg.iter_mut().zip(&image.segments) {
            *s = v86_segment(selector);
        }
    } else {
        load_segments(core, image, ext)?;
    }
    core.refresh();
    if core.rip > u64::from(core.seg[seg::CS].limit) {
        return Err(gp(ext));
    }
    if image.traps {
        let trap = Exception { vector: vector::DB, error: None, payload: DR6_BT, is_trap: true };
        return Err(trap.into());
    }
    Ok(())
}

fn load_ldtr(core: &mut Core, selector: u16, ext: u32) -> Exec<()> {
    if is_null(selector) {
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(selector_fault(vector::TS, selector, ext));
    }
    let d = read_descriptor(core, selector, vector::TS, ext)?;
    if d.system_type() != Some(system_type::LDT) || !d.is_present() {
        return Err(selector_fault(vector::TS, selector, ext));
    }
    core.ldtr = d.to_segment(selector);
    Ok(())
}

fn load_segments(core: &mut Core, image: &Image, ext: u32) -> Exec<()> {
    let selector = image.segments[seg::CS];
    let bad = selector_fault(vector::TS, selector, ext);
    if is_null(selector) {
        return Err(bad);
    }
    let mut d = read_descriptor(core, selector, vector::TS, ext)?;
    let rpl = (selector & 3) as u8;
    let fits = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !d.is_code() || !fits {
        return Err(bad);
    }
    if !d.is_present() {
        return Err(selector_fault(vector::NP, selector, ext));
    }
    mark_accessed(core, selector, &mut d)?;
    core.seg[seg::CS] = d.to_segment(selector);
    core.seg[seg::SS] = read_stack_segment(core, image.segments[seg::SS], rpl, vector::TS, ext)?;
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        core.seg[index] = read_data_segment(core, image.segments[index], vector::TS)?;
    }
    Ok(())
}
