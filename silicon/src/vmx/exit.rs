//! VM exits (SDM 3C, "VM Exits").

use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::exception::{Exception, vector};
use crate::arch::exit::{Exit, reason};
use crate::arch::segment::{Segment, TableRegister, attr, seg};
use crate::arch::vmcs as f;
use crate::cpu::event::{Event, Kind};
use crate::cpu::pmu;
use crate::cpu::state::{Activity, Core, Shadow};
use crate::vmx::checks_guest::{are_pdptes, pdptes_at};
use crate::vmx::controls::{Controls, entry, exit, pin, secondary};
use crate::vmx::entry::GuestArea;
use crate::vmx::msr_list;

/// VMX-abort indicators ("VMX Aborts").
mod abort {
    pub const SAVING_MSRS: u64 = 1;
    pub const HOST_PDPTES: u64 = 2;
    pub const LOADING_MSRS: u64 = 4;
}

const VALID: u32 = 1 << 31;
const ERROR_CODE: u32 = 1 << 11;

/// Perform a VM exit: record information, save guest state, load host state.  Returns the exit
/// with every information field filled in (IDT-vectoring from `core.vectoring`).
pub fn perform(core: &mut Core, mut exit: Exit) -> Exit {
    if !core.vmx.non_root {
        return exit;
    }
    if let Some(event) = core.vectoring.take() {
        let is_own = exit.reason == reason::TRIPLE_FAULT
            || exit.reason == reason::EXCEPTION_OR_NMI && exit.intr_info as u8 == vector::DF;
        if !is_own {
            (exit.idt_info, exit.idt_error) = interruption(&event);
            if event.length != 0 {
                exit.length = u32::from(event.length);
            }
        }
    }
    record(core, &exit);
    save(core, &exit);
    // MSRs are stored as software in root operation would read them.
    core.vmx.non_root = false;
    let c = core.vmx.controls;
    if !msr_list::store(core, c.exit_store_count) {
        return abort(core, abort::SAVING_MSRS);
    }
    let is_nmi = exit.reason == reason::EXCEPTION_OR_NMI && exit.intr_info >> 8 & 7 == Kind::Nmi as u32;
    if c.pin(pin::VIRTUAL_NMIS) {
        core.nmi_blocked = core.vmx.host_nmi_blocked;
    }
    core.nmi_blocked |= is_nmi;
    finish(core, exit)
}

/// A VM entry failed after the checks of controls and host: only reason and qualification are
/// recorded, no guest state is saved.
pub(crate) fn of_failed_entry(core: &mut Core, exit: Exit) -> Exit {
    core.set_vmcs(f::EXIT_REASON, u64::from(exit.reason | 1 << 31));
    core.set_vmcs(f::EXIT_QUALIFICATION, exit.qualification);
    if core.vmx.controls.pin(pin::VIRTUAL_NMIS) && exit.reason == reason::ENTRY_MSR_LOAD {
        core.nmi_blocked = core.vmx.host_nmi_blocked;
    }
    finish(core, exit)
}

fn finish(core: &mut Core, exit: Exit) -> Exit {
    if let Some(n) = core.counts.exits.get_mut(exit.reason as usize) {
        *n += 1;
    }
    let c = core.vmx.controls;
    if !load_host(core, &c) {
        return abort(core, abort::HOST_PDPTES);
    }
    if msr_list::load(core, f::EXIT_MSR_LOAD_ADDRESS, c.exit_load_count).is_err() {
        return abort(core, abort::LOADING_MSRS);
    }
    exit
}

/// "VMX Aborts": the indicator is written, and the processor shuts down.
fn abort(core: &mut Core, indicator: u64) -> Exit {
    core.mem.store(core.vmx.current.wrapping_add(f::ABORT_INDICATOR), 4, indicator);
    core.vmx.non_root = false;
    core.vmx.vpid = 0;
    core.vmx.eptp = 0;
    core.activity = Activity::Shutdown;
    core.attention = 1;
    core.refresh();
    Exit::new(reason::SHUTDOWN, indicator)
}

/// Interruption information and error code of an event.
pub(crate) fn interruption(event: &Event) -> (u32, u32) {
    let code = if event.error.is_some() { ERROR_CODE } else { 0 };
    let info = VALID | code | (event.kind as u32) << 8 | u32::from(event.vector);
    (info, event.error.unwrap_or(0))
}

/// "Recording VM-Exit Information and Updating VM-Entry Control Fields".
fn record(core: &Core, e: &Exit) {
    for (field, value) in [
        (f::EXIT_REASON, u64::from(e.reason)),
        (f::EXIT_QUALIFICATION, e.qualification),
        (f::GUEST_LINEAR_ADDRESS, e.gla),
        (f::GUEST_PHYSICAL_ADDRESS, e.gpa),
        (f::EXIT_INTERRUPTION_INFORMATION, u64::from(e.intr_info)),
        (f::EXIT_INTERRUPTION_ERROR_CODE, u64::from(e.intr_error)),
        (f::IDT_VECTORING_INFORMATION, u64::from(e.idt_info)),
        (f::IDT_VECTORING_ERROR_CODE, u64::from(e.idt_error)),
        (f::EXIT_INSTRUCTION_LENGTH, u64::from(e.length)),
        (f::EXIT_INSTRUCTION_INFORMATION, u64::from(e.instr_info)),
    ] {
        core.set_vmcs(field, value);
    }
    let info = core.vmcs(f::ENTRY_INTERRUPTION_INFORMATION);
    core.set_vmcs(f::ENTRY_INTERRUPTION_INFORMATION, info & 0x7FFF_FFFF);
}

/// "Saving Guest State".
fn save(core: &mut Core, e: &Exit) {
    let c = core.vmx.controls;
    let mut a = GuestArea::read(core);
    for (n, s) in core.seg.iter().chain([&core.ldtr, &core.tr]).enumerate() {
        a.set_segment(n as u64, s);
    }
    // The privilege level is SS.DPL, whatever a real-mode or null selector left there.
    let ss = core.seg[seg::SS].attr & !(3 << 5) | u32::from(core.cpl) << 5;
    a.set(f::GUEST_SS_ACCESS_RIGHTS, u64::from(ss));
    a.set(f::GUEST_CR0, core.cr0);
    a.set(f::GUEST_CR3, core.cr3);
    a.set(f::GUEST_CR4, core.cr4);
    if c.exit(exit::SAVE_DEBUG_CONTROLS) {
        a.set(f::GUEST_DR7, core.dr[7]);
        a.set(f::GUEST_DEBUGCTL, core.msr.debugctl);
    }
    a.set(f::GUEST_SYSENTER_CS, core.msr.sysenter_cs);
    a.set(f::GUEST_SYSENTER_ESP, core.msr.sysenter_esp);
    a.set(f::GUEST_SYSENTER_EIP, core.msr.sysenter_eip);
    if c.exit(exit::SAVE_PAT) {
        a.set(f::GUEST_PAT, core.msr.pat);
    }
    if c.exit(exit::SAVE_EFER) {
        a.set(f::GUEST_EFER, core.efer);
    }
    a.set(f::GUEST_PKRS, core.msr.pkrs);
    a.set(f::GUEST_GDTR_BASE, core.gdtr.base);
    a.set(f::GUEST_GDTR_LIMIT, u64::from(core.gdtr.limit));
    a.set(f::GUEST_IDTR_BASE, core.idtr.base);
    a.set(f::GUEST_IDTR_LIMIT, u64::from(core.idtr.limit));
    a.set(f::GUEST_RSP, core.gpr[4]);
    a.set(f::GUEST_RIP, core.rip);
    a.set(f::GUEST_RFLAGS, saved_flags(core, e));
    let shadow = match core.shadow {
        Shadow::None => 0,
        Shadow::Sti => 1,
        Shadow::MovSs => 2,
    };
    let by_nmi = u64::from(core.nmi_blocked) << 3;
    a.set(f::GUEST_INTERRUPTIBILITY_STATE, shadow | by_nmi);
    let is_halted = core.activity == Activity::Hlt;
    a.set(f::GUEST_ACTIVITY_STATE, u64::from(is_halted));
    a.set(f::GUEST_PENDING_DEBUG_EXCEPTIONS, pending_debug(core, e.reason, shadow != 0 || is_halted));
    if core.is_paging() && core.cr4 & cr4::PAE != 0 && !core.is_long() {
        for (i, &entry) in core.pdpte.iter().enumerate() {
            a.set(f::GUEST_PDPTE0 + 2 * i as u32, entry);
        }
    }
    if c.exit(exit::SAVE_PREEMPTION_TIMER) {
        let left = core.vmx.timer.saturating_sub(core.tsc());
        a.set(f::PREEMPTION_TIMER_VALUE, left.min(0xFFFF_FFFF));
    }
    a.write(core);
    save_mode(core);
}

/// "IA-32e mode guest" of the VM-entry controls follows IA32_EFER.LMA.
fn save_mode(core: &mut Core) {
    let bit = u64::from(entry::IA32E_MODE_GUEST);
    let old = core.vmx.controls.entry;
    let new = if core.is_long() { old | bit } else { old & !bit };
    if new != old {
        core.vmx.controls.entry = new;
        core.set_vmcs(f::ENTRY_CONTROLS, new);
    }
}

/// RFLAGS as saved: RF is what the event's image would have, or the old task's TSS, and nothing of
/// it is left behind by an instruction that exits ("Saving RIP, RSP, RFLAGS, and SSP").
fn saved_flags(core: &Core, e: &Exit) -> u64 {
    let flags = core.rflags & !rflags::RF;
    let before = core.rflags & rflags::RF;
    let rf = match e.reason {
        reason::EXCEPTION_OR_NMI if is_general_detect(e) => rflags::RF,
        reason::EXCEPTION_OR_NMI => image_rf(e.intr_info, before),
        reason::TASK_SWITCH => core.vmx.task_flags & rflags::RF,
        reason::APIC_ACCESS | reason::EPT_VIOLATION | reason::EPT_MISCONFIG | reason::PML_FULL => {
            if e.idt_info & VALID == 0 || core.vectoring_resumes {
                rflags::RF
            } else {
                image_rf(e.idt_info, before)
            }
        }
        reason::EXTERNAL_INTERRUPT
        | reason::TRIPLE_FAULT
        | reason::INIT
        | reason::SIPI
        | reason::INTERRUPT_WINDOW
        | reason::NMI_WINDOW
        | reason::MTF
        | reason::TPR_BELOW_THRESHOLD
        | reason::VIRTUALIZED_EOI
        | reason::PREEMPTION_TIMER
        | reason::APIC_WRITE => before,
        _ => 0,
    };
    flags | rf
}

/// Whether this is a #DB that is a fault, and no instruction breakpoint: the exit says why it came.
fn is_general_detect(e: &Exit) -> bool {
    const BD: u64 = 1 << 13;
    e.intr_info as u8 == vector::DB && e.qualification & BD != 0
}

/// RF in the image that the event with this interruption information pushes.
fn image_rf(info: u32, before: u64) -> u64 {
    let is_fault = info as u8 != vector::DB && info as u8 != vector::DF;
    match info >> 8 & 7 {
        kind if kind == Kind::Hardware as u32 => {
            if is_fault {
                rflags::RF
            } else {
                before
            }
        }
        kind if kind == Kind::External as u32 || kind == Kind::Nmi as u32 => before,
        _ => 0,
    }
}

fn pending_debug(core: &Core, why: u32, is_held: bool) -> u64 {
    let mut pending = 0;
    let comes_before_traps = matches!(
        why,
        reason::MTF | reason::TPR_BELOW_THRESHOLD | reason::VIRTUALIZED_EOI | reason::APIC_WRITE
    );
    if core.shadow == Shadow::MovSs || comes_before_traps {
        pending |= core.pending_db & 0x400F;
        if pending & 0xF != 0 {
            pending |= 1 << 12;
        }
    }
    if is_held && core.flag(rflags::TF) && core.msr.debugctl & 2 == 0 {
        pending |= 1 << 14;
    }
    pending
}

/// "Loading Host State".  False if the host's PDPTEs are invalid.
fn load_host(core: &mut Core, c: &Controls) -> bool {
    const KEPT: u64 = cr0::ET | cr0::NW | cr0::CD | 0x1FFA_FFD0;
    let h = |core: &Core, field| core.vmcs(field);
    let has64 = c.exit(exit::HOST_ADDRESS_SPACE_SIZE);
    core.cr0 = core.cr0 & KEPT | h(core, f::HOST_CR0) & !KEPT;
    core.cr3 = h(core, f::HOST_CR3);
    core.cr4 = h(core, f::HOST_CR4);
    if has64 {
        core.cr4 |= cr4::PAE;
    } else {
        core.cr4 &= !cr4::PCIDE;
    }
    core.dr[7] = 0x400;
    core.msr.debugctl = 0;
    core.msr.sysenter_cs = h(core, f::HOST_SYSENTER_CS);
    core.msr.sysenter_esp = h(core, f::HOST_SYSENTER_ESP);
    core.msr.sysenter_eip = h(core, f::HOST_SYSENTER_EIP);
    let mode = efer::LMA | efer::LME;
    core.efer = if c.exit(exit::LOAD_EFER) {
        h(core, f::HOST_EFER)
    } else {
        core.efer & !mode | if has64 { mode } else { 0 }
    };
    if c.exit(exit::LOAD_PAT) {
        core.msr.pat = h(core, f::HOST_PAT);
    }
    if c.exit(exit::LOAD_PERF_GLOBAL_CTRL) {
        let value = h(core, f::HOST_PERF_GLOBAL_CTRL);
        pmu::load_global(core, value);
    }
    if c.exit(exit::LOAD_PKRS) {
        let value = h(core, f::HOST_PKRS);
        core.set_pkrs(value);
    }
    let first = core.vmx.current.wrapping_add(f::offset(f::HOST_ES));
    for (i, s) in core.seg.iter_mut().enumerate() {
        let selector = core.mem.load(first + 8 * i as u64, 2) as u16;
        let unusable = if selector == 0 { attr::UNUSABLE } else { 0 };
        *s = Segment { base: 0, limit: u32::MAX, attr: 0xC093 | unusable, selector };
    }
    core.seg[seg::CS].attr = if has64 { 0xA09B } else { 0xC09B };
    core.seg[seg::FS].base = h(core, f::HOST_FS_BASE);
    core.seg[seg::GS].base = h(core, f::HOST_GS_BASE);
    let base = h(core, f::HOST_TR_BASE);
    core.tr = Segment { base, limit: 0x67, attr: 0x8B, selector: h(core, f::HOST_TR) as u16 };
    core.ldtr = Segment { base: 0, limit: 0, attr: attr::UNUSABLE, selector: 0 };
    core.gdtr = TableRegister { base: h(core, f::HOST_GDTR_BASE), limit: 0xFFFF };
    core.idtr = TableRegister { base: h(core, f::HOST_IDTR_BASE), limit: 0xFFFF };
    core.rip = h(core, f::HOST_RIP);
    core.gpr[4] = h(core, f::HOST_RSP);
    core.rflags = rflags::FIXED1;
    pmu::set_level(core, 0);
    core.shadow = Shadow::None;
    core.activity = Activity::Active;
    core.pending_db = 0;
    core.vectoring = None;
    core.vmx.trap_exit = None;
    core.vmx.is_recognized = false;
    core.vmx.mtf = None;
    core.vmx.timer = u64::MAX;
    core.vmx.non_root = false;
    core.vmx.eptp = 0;
    core.vmx.vpid = 0;
    if !c.secondary(secondary::ENABLE_VPID) {
        core.tlb.drop_spaces(|v, _, _| v == 0, |v, _| v == 0);
    }
    core.refresh();
    core.attention = 1;
    if core.is_paging() && core.cr4 & cr4::PAE != 0 && !core.is_long() {
        core.pdpte = pdptes_at(core, core.cr3);
        return are_pdptes(&core.pdpte);
    }
    true
}

/// In non-root operation: the VM exit that this exception causes under the exception bitmap and
/// the page-fault mask and match; `None` if it is the guest's own.
#[must_use]
pub fn of_exception(core: &Core, e: &Exception) -> Option<Exit> {
    of_event(core, &Event::from(*e), e.payload)
}

/// The same for any event, in particular INT3, INTO (length and kind matter) and INT1.
///
/// `payload`: the address of a page fault, the DR6 bits of a debug exception.
#[must_use]
pub fn of_event(core: &Core, event: &Event, payload: u64) -> Option<Exit> {
    let c = &core.vmx.controls;
    let is_exception =
        matches!(event.kind, Kind::Hardware | Kind::SoftwareException | Kind::PrivilegedSoftware);
    if !core.vmx.non_root || !is_exception || event.vector > 31 {
        return None;
    }
    let mut exits = c.exception_bitmap >> event.vector & 1 != 0;
    if event.vector == vector::PF {
        let code = u64::from(event.error.unwrap_or(0));
        exits = exits == (code & c.pf_mask == c.pf_match);
    }
    if !exits {
        return None;
    }
    let mut event = *event;
    if event.kind == Kind::Hardware && matches!(event.vector, vector::BP | vector::OF) {
        event.kind = Kind::SoftwareException;
    }
    let (intr_info, intr_error) = interruption(&event);
    let qualification = match event.vector {
        vector::PF | vector::DB => payload,
        _ => 0,
    };
    let length = u32::from(event.length);
    Some(Exit { length, intr_info, intr_error, ..Exit::new(reason::EXCEPTION_OR_NMI, qualification) })
}
