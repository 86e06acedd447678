//! VM entries (SDM 3C, "VM Entries").

use crate::arch::bits::{cr0, cr4, efer};
use crate::arch::exception::{Exception, vector};
use crate::arch::exit::{Exit, reason};
use crate::arch::segment::{Segment, TableRegister, seg};
use crate::arch::vmcs as f;
use crate::cpu::debug;
use crate::cpu::event::{self, Event, Kind};
use crate::cpu::pmu;
use crate::cpu::state::{Activity, Core, Shadow};
use crate::cpu::trap::{Exec, Trap};
use crate::vmx::checks::{self, Broken};
use crate::vmx::checks_guest::{self, Failure, pdptes_at};
use crate::vmx::controls::{Controls, entry, pin, primary, secondary};
use crate::vmx::instructions::{VmFail, error};
use crate::vmx::{NO_VMCS, exit, msr_list};

/// The guest-state area, read once.
pub(crate) struct GuestState {
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub link_pointer: u64,
    pub debugctl: u64,
    pub pat: u64,
    pub efer: u64,
    pub perf_global_ctrl: u64,
    pub pkrs: u64,
    pub pdpte: [u64; 4],
    pub gdtr_limit: u64,
    pub idtr_limit: u64,
    pub interruptibility: u64,
    pub activity: u64,
    pub sysenter_cs: u64,
    pub timer: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub gdtr_base: u64,
    pub idtr_base: u64,
    pub dr7: u64,
    pub rsp: u64,
    pub rip: u64,
    pub rflags: u64,
    pub pending_debug: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
}

/// The bytes of a VMCS's guest-state area.
pub(crate) struct GuestArea(pub [u8; f::GUEST_BYTES]);

impl GuestArea {
    /// Copy it out of the current VMCS.
    pub fn read(core: &Core) -> Self {
        let mut area = Self([0; f::GUEST_BYTES]);
        core.mem.read_bytes(core.vmx.current.wrapping_add(f::GUEST_AREA), &mut area.0);
        area
    }

    /// Copy it back.
    pub fn write(&self, core: &Core) {
        core.mem.write_bytes(core.vmx.current.wrapping_add(f::GUEST_AREA), &self.0);
    }

    #[inline]
    pub fn get(&self, field: u32) -> u64 {
        self.at(f::offset(field) - f::GUEST_AREA) & f::mask_of(field)
    }

    #[inline]
    fn at(&self, offset: u64) -> u64 {
        let at = offset as usize;
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(word)
    }

    #[inline]
    pub fn set(&mut self, field: u32, value: u64) {
        self.put(f::offset(field) - f::GUEST_AREA, value);
    }

    #[inline]
    fn put(&mut self, offset: u64, value: u64) {
        let at = offset as usize;
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// ES CS SS DS FS GS LDTR TR are fields with successive indices.
    #[inline]
    fn segment(&self, n: u64, s: &mut Segment) {
        s.base = self.at(BASE + 8 * n);
        s.limit = self.at(LIMIT + 8 * n) as u32;
        s.attr = self.at(ATTR + 8 * n) as u32;
        s.selector = self.at(SELECTOR + 8 * n) as u16;
    }

    #[inline]
    pub fn set_segment(&mut self, n: u64, s: &Segment) {
        self.put(BASE + 8 * n, s.base);
        self.put(LIMIT + 8 * n, u64::from(s.limit));
        self.put(ATTR + 8 * n, u64::from(s.attr));
        self.put(SELECTOR + 8 * n, u64::from(s.selector));
    }
}

const BASE: u64 = f::offset(f::GUEST_ES_BASE) - f::GUEST_AREA;
const LIMIT: u64 = f::offset(f::GUEST_ES_LIMIT) - f::GUEST_AREA;
const ATTR: u64 = f::offset(f::GUEST_ES_ACCESS_RIGHTS) - f::GUEST_AREA;
const SELECTOR: u64 = f::offset(f::GUEST_ES) - f::GUEST_AREA;

impl GuestState {
    fn read(core: &Core) -> Self {
        let a = GuestArea::read(core);
        let get = |field| a.get(field);
        let mut state = Self {
            seg: Default::default(),
            ldtr: Segment::default(),
            tr: Segment::default(),
            link_pointer: get(f::VMCS_LINK_POINTER),
            debugctl: get(f::GUEST_DEBUGCTL),
            pat: get(f::GUEST_PAT),
            efer: get(f::GUEST_EFER),
            perf_global_ctrl: get(f::GUEST_PERF_GLOBAL_CTRL),
            pkrs: get(f::GUEST_PKRS),
            pdpte: [0, 2, 4, 6].map(|i| get(f::GUEST_PDPTE0 + i)),
            gdtr_limit: get(f::GUEST_GDTR_LIMIT),
            idtr_limit: get(f::GUEST_IDTR_LIMIT),
            interruptibility: get(f::GUEST_INTERRUPTIBILITY_STATE),
            activity: get(f::GUEST_ACTIVITY_STATE),
            sysenter_cs: get(f::GUEST_SYSENTER_CS),
            timer: get(f::PREEMPTION_TIMER_VALUE),
            cr0: get(f::GUEST_CR0),
            cr3: get(f::GUEST_CR3),
            cr4: get(f::GUEST_CR4),
            gdtr_base: get(f::GUEST_GDTR_BASE),
            idtr_base: get(f::GUEST_IDTR_BASE),
            dr7: get(f::GUEST_DR7),
            rsp: get(f::GUEST_RSP),
            rip: get(f::GUEST_RIP),
            rflags: get(f::GUEST_RFLAGS),
            pending_debug: get(f::GUEST_PENDING_DEBUG_EXCEPTIONS),
            sysenter_esp: get(f::GUEST_SYSENTER_ESP),
            sysenter_eip: get(f::GUEST_SYSENTER_EIP),
        };
        // Filled in place: a copy of what was just written in pieces stalls the computer.
        for (n, s) in state.seg.iter_mut().chain([&mut state.ldtr, &mut state.tr]).enumerate() {
            a.segment(n as u64, s);
        }
        state
    }

    /// Whether the guest will use PAE paging.
    pub fn uses_pdptes(&self, c: &Controls) -> bool {
        self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !c.entry(entry::IA32E_MODE_GUEST)
    }
}

/// VMLAUNCH (`launch`) or VMRESUME, for host software outside or in the machine.
///
/// `Ok(None)`: in the guest.  `Ok(Some(exit))`: the entry failed on guest state, or injecting its
/// event ended in a VM exit; the exit was performed.
pub(crate) fn enter(core: &mut Core, launch: bool, outside: bool) -> Result<Option<Exit>, VmFail> {
    if !core.vmx.is_on || core.vmx.non_root || core.vmx.current == NO_VMCS {
        return Err(VmFail(0));
    }
    if core.mem.load(core.vmx.current, 4) & u64::from(f::SHADOW) != 0 {
        return Err(VmFail(0));
    }
    // (For an instruction of the machine's own, its shadow is over when it executes.)
    if (if outside { core.shadow } else { core.shadowed }) == Shadow::MovSs {
        return Err(core.vm_fail(error::ENTRY_UNDER_MOV_SS));
    }
    let is_launched = core.mem.load(core.vmx.current.wrapping_add(f::LAUNCH_STATE), 4) == 1;
    if launch && is_launched {
        return Err(core.vm_fail(error::VMLAUNCH_NOT_CLEAR));
    }
    if !launch && !is_launched {
        return Err(core.vm_fail(error::VMRESUME_NOT_LAUNCHED));
    }
    let info = core.vmcs(f::ENTRY_INTERRUPTION_INFORMATION);
    check_controls_and_host(core, info)?;
    core.vmx.is_host_outside = outside;
    let c = core.vmx.controls;
    let guest = GuestState::read(core);
    if let Err((qualification, words)) = checks_guest::check(core, &c, &guest, info) {
        return Ok(Some(failed(core, reason::ENTRY_GUEST_STATE, (qualification, words))));
    }
    load(core, &c, &guest);
    if let Err((index, words)) = msr_list::load(core, f::ENTRY_MSR_LOAD_ADDRESS, c.entry_load_count) {
        return Ok(Some(failed(core, reason::ENTRY_MSR_LOAD, (index, words))));
    }
    if launch {
        core.mem.store(core.vmx.current.wrapping_add(f::LAUNCH_STATE), 4, 1);
    }
    core.counts.entries += 1;
    begin(core, &c, &guest, outside);
    match deliver(core, &guest, info) {
        Ok(()) => Ok(None),
        Err(Trap::Exit(e) | Trap::Stop(e)) => Ok(Some(exit::perform(core, *e))),
        Err(Trap::Exception(_) | Trap::Again) => unreachable!("raise resolves exceptions"),
    }
}

/// Controls and host state: again only if one of their fields, or the host's mode, may have
/// changed since they passed.
fn check_controls_and_host(core: &mut Core, info: u64) -> Result<(), VmFail> {
    let is_known = !core.vmx.is_stale && core.vmx.checked_long == core.is_long();
    let c = if is_known { core.vmx.controls } else { Controls::read(core) };
    let controls = |core: &Core| -> Result<(), Broken> {
        if !is_known || c.primary(primary::USE_TPR_SHADOW) {
            checks::execution_controls(core, &c)?;
        }
        if !is_known {
            checks::exit_controls(core, &c)?;
            checks::entry_controls(core, &c)?;
        }
        checks::injection(core, &c, info)
    };
    if let Err(words) = controls(core) {
        core.vmx.complaint = words;
        return Err(core.vm_fail(error::INVALID_CONTROL_FIELD));
    }
    if !is_known {
        if let Err(words) = checks::host_state(core, &c) {
            core.vmx.complaint = words;
            return Err(core.vm_fail(error::INVALID_HOST_STATE));
        }
        core.vmx.controls = c;
        core.vmx.is_stale = false;
        core.vmx.checked_long = core.is_long();
    }
    Ok(())
}

/// "VM-Entry Failures During or After Loading Guest State".
fn failed(core: &mut Core, why: u32, (qualification, words): Failure) -> Exit {
    core.vmx.complaint = words;
    let exit = Exit { entry_failure: true, ..Exit::new(why, qualification) };
    exit::of_failed_entry(core, exit)
}

/// "Loading Guest State".
fn load(core: &mut Core, c: &Controls, g: &GuestState) {
    /// ET, NW, CD and the reserved bits keep their values.
    const KEPT: u64 = cr0::ET | cr0::NW | cr0::CD | 0x1FFA_FFD0;
    let long = c.entry(entry::IA32E_MODE_GUEST);
    let with_ept = c.secondary(secondary::ENABLE_EPT);
    core.cr0 = core.cr0 & KEPT | g.cr0 & !KEPT;
    core.cr3 = g.cr3;
    core.cr4 = g.cr4;
    if c.entry(entry::LOAD_DEBUG_CONTROLS) {
        debug::write(core, 7, g.dr7);
        core.msr.debugctl = g.debugctl;
    }
    core.msr.sysenter_cs = g.sysenter_cs;
    core.msr.sysenter_esp = g.sysenter_esp;
    core.msr.sysenter_eip = g.sysenter_eip;
    if c.entry(entry::LOAD_PAT) {
        core.msr.pat = g.pat;
    }
    if c.entry(entry::LOAD_PERF_GLOBAL_CTRL) {
        pmu::load_global(core, g.perf_global_ctrl);
    }
    if c.entry(entry::LOAD_PKRS) {
        core.set_pkrs(g.pkrs);
    }
    if c.entry(entry::LOAD_EFER) {
        core.efer = g.efer;
    } else {
        let set = |value: u64, bit: u64, on: bool| if on { value | bit } else { value & !bit };
        core.efer = set(core.efer, efer::LMA, long);
        if g.cr0 & cr0::PG != 0 {
            core.efer = set(core.efer, efer::LME, long);
        }
    }
    core.seg = g.seg;
    core.ldtr = g.ldtr;
    core.tr = g.tr;
    core.gdtr = TableRegister { base: g.gdtr_base, limit: g.gdtr_limit as u16 };
    core.idtr = TableRegister { base: g.idtr_base, limit: g.idtr_limit as u16 };
    core.gpr[4] = g.rsp;
    core.rip = g.rip;
    core.rflags = g.rflags;
    if g.uses_pdptes(c) {
        core.pdpte = if with_ept { g.pdpte } else { pdptes_at(core, g.cr3) };
    }
    pmu::set_level(core, g.seg[seg::SS].dpl());
    core.shadow = match g.interruptibility & 3 {
        1 => Shadow::Sti,
        2 => Shadow::MovSs,
        _ => Shadow::None,
    };
    core.activity = if g.activity == 1 { Activity::Hlt } else { Activity::Active };
    let blocked = g.interruptibility & 8 != 0;
    if c.pin(pin::VIRTUAL_NMIS) {
        core.vmx.host_nmi_blocked = core.nmi_blocked;
    }
    core.nmi_blocked = blocked;
    core.pending_db = 0;
    core.vectoring = None;
}

/// Non-root operation begins: translations, timers, windows.
fn begin(core: &mut Core, c: &Controls, g: &GuestState, outside: bool) {
    core.vmx.non_root = true;
    core.vmx.eptp = if c.secondary(secondary::ENABLE_EPT) { c.eptp } else { 0 };
    if c.secondary(secondary::ENABLE_VPID) {
        core.vmx.vpid = c.vpid as u16;
    } else {
        core.vmx.vpid = 0;
        core.tlb.drop_spaces(|v, _, _| v == 0, |v, _| v == 0);
    }
    core.refresh();
    core.vmx.timer =
        if c.pin(pin::ACTIVATE_PREEMPTION_TIMER) { core.tsc().saturating_add(g.timer) } else { u64::MAX };
    core.vmx.pause_loop = (0, 0);
    core.vmx.trap_exit = None;
    // A VMLAUNCH in the machine retires once it is done.
    let retired = core.retired() + u64::from(!outside);
    core.vmx.mtf = c.primary(primary::MONITOR_TRAP_FLAG).then_some((retired, core.rip));
    super::apic::check_threshold_at_entry(core);
    super::virtual_interrupts::enter(core);
    core.attention = 1;
}

/// What the VM-entry interruption information injects; none if the field is not valid or asks for
/// a pending MTF VM exit (type 7).
pub(crate) fn injected(core: &Core, info: u64) -> Option<Event> {
    let kind = match info >> 8 & 7 {
        0 => Kind::External,
        2 => Kind::Nmi,
        3 => Kind::Hardware,
        4 => Kind::Software,
        5 => Kind::PrivilegedSoftware,
        6 => Kind::SoftwareException,
        _ => return None,
    };
    let is_software = matches!(kind, Kind::Software | Kind::PrivilegedSoftware | Kind::SoftwareException);
    let length = if is_software { core.vmcs(f::ENTRY_INSTRUCTION_LENGTH) as u8 } else { 0 };
    let error = (info >> 11 & 1 != 0).then(|| core.vmcs(f::ENTRY_EXCEPTION_ERROR_CODE) as u32);
    Some(Event { vector: info as u8, kind, error, length })
}

/// "Event Injection", and "Delivery of Pending Debug Exceptions after VM Entry".
fn deliver(core: &mut Core, g: &GuestState, info: u64) -> Exec<()> {
    const BREAKPOINTS: u64 = 0xF;
    const ENABLED: u64 = 1 << 12;
    const BS: u64 = 1 << 14;
    if info >> 31 & 1 != 0 {
        let Some(event) = injected(core, info) else {
            core.vmx.mtf = Some((u64::MAX, 0));
            return Ok(());
        };
        core.activity = Activity::Active;
        if event.kind == Kind::Nmi {
            core.nmi_blocked = true;
        }
        if core.vmx.mtf.is_some() {
            core.vmx.mtf = Some((u64::MAX, 0));
        }
        return event::deliver_or_raise(core, event);
    }
    let pending = g.pending_debug & (BREAKPOINTS | BS);
    if g.pending_debug & (ENABLED | BS) == 0 {
        return Ok(());
    }
    if core.shadow == Shadow::MovSs {
        core.pending_db |= pending;
        return Ok(());
    }
    core.activity = Activity::Active;
    let trap = Exception { vector: vector::DB, error: None, payload: pending, is_trap: true };
    event::raise(core, trap)
}
