//! APIC virtualization (SDM 3C, "APIC Virtualization and Virtual Interrupts"): what a guest's
//! accesses of its local APIC do, through CR8, the APIC-access page and the x2APIC MSRs.  What
//! they mean to virtual interrupts is in [`crate::vmx::virtual_interrupts`].
//!
//! Invariant: the virtual-APIC page is in memory, always whole.  A write is emulated when it is
//! made; the VM exit that it may cause waits for the end of the instruction.

use crate::addr::PAGE_OFFSET;
use crate::arch::exit::{Exit, reason};
use crate::arch::msr;
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, gp, vm_exit};
use crate::vmx::controls::{Controls, primary, secondary};
use crate::vmx::virtual_interrupts::{has_delivery, virtualize_eoi, virtualize_self_ipi};

/// Page offsets.
pub(crate) mod at {
    pub const TPR: u64 = 0x80;
    pub const PPR: u64 = 0xA0;
    pub const EOI: u64 = 0xB0;
    pub const ISR: u64 = 0x100;
    pub const IRR: u64 = 0x200;
    pub const ICR: u64 = 0x300;
    pub const ICR_HIGH: u64 = 0x310;
    pub const SELF_IPI: u64 = 0x3F0;
}

/// A set of registers, a bit each by page offset / 16.
const fn registers(ranges: &[(u32, u32)]) -> u64 {
    let (mut set, mut i) = (0, 0);
    while i < ranges.len() {
        let (first, last) = ranges[i];
        set |= (u64::MAX >> (63 - (last - first))) << first;
        i += 1;
    }
    set
}

/// Under "APIC-register virtualization" reads of these are virtualized: ID, version, TPR, EOI, LDR,
/// DFR, SVR, ISR to ESR, ICR, LVT, initial count, divide configuration.
const READABLE: u64 =
    registers(&[(2, 3), (8, 8), (0xB, 0xB), (0xD, 0xF), (0x10, 0x28), (0x30, 0x38), (0x3E, 0x3E)]);
/// And writes of these.
const WRITABLE: u64 =
    registers(&[(2, 2), (8, 8), (0xB, 0xB), (0xD, 0xF), (0x28, 0x28), (0x30, 0x38), (0x3E, 0x3E)]);
/// Both, under "virtual-interrupt delivery" alone: TPR, EOI, the low word of the ICR.
const OF_DELIVERY: u64 = registers(&[(8, 8), (0xB, 0xB), (0x30, 0x30)]);
const TPR_ALONE: u64 = registers(&[(8, 8)]);

/// Access types of the exit qualification ("Exit Qualification for APIC-Access VM Exits").
const READ: u64 = 0;
const WRITE: u64 = 1;
const FETCH: u64 = 2;
const DELIVERY: u64 = 3;

impl Core {
    /// Read the virtual-APIC page.
    pub(crate) fn virtual_apic(&self, offset: u64, size: usize) -> u64 {
        self.mem.load(self.vmx.controls.virtual_apic.wrapping_add(offset), size)
    }

    /// Write the virtual-APIC page.
    pub(crate) fn set_virtual_apic(&self, offset: u64, size: usize, value: u64) {
        self.mem.store(self.vmx.controls.virtual_apic.wrapping_add(offset), size, value);
    }
}

fn has_tpr_shadow(core: &Core) -> bool {
    core.vmx.non_root && core.vmx.controls.primary(primary::USE_TPR_SHADOW)
}

/// Whether a host-physical page is the APIC-access page of the guest that runs.
#[must_use]
pub fn is_access_page(core: &Core, hpa: u64) -> bool {
    let c = &core.vmx.controls;
    core.vmx.non_root
        && c.secondary(secondary::VIRTUALIZE_APIC_ACCESSES)
        && hpa & !PAGE_OFFSET == c.apic_access
}

/// Whether an access of the APIC-access page is virtualized: in the low four bytes of a register
/// that the controls name.
fn is_virtualized(core: &Core, offset: u64, size: usize, under_registers: u64) -> bool {
    let c: &Controls = &core.vmx.controls;
    let which = if c.secondary(secondary::APIC_REGISTER_VIRTUALIZATION) {
        under_registers
    } else if c.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
        OF_DELIVERY
    } else {
        TPR_ALONE
    };
    let is_inside = (offset & 0xF) + size as u64 <= 4;
    has_tpr_shadow(core) && is_inside && offset < 0x400 && which >> (offset >> 4) & 1 != 0
}

fn exit_for<T>(core: &Core, hpa: u64, kind: u64) -> Exec<T> {
    let kind = if core.vectoring.is_some() { DELIVERY } else { kind };
    Err(vm_exit(Exit::new(reason::APIC_ACCESS, hpa & PAGE_OFFSET | kind << 12)))
}

/// A read of the APIC-access page: from the virtual-APIC page, or a VM exit.
///
/// # Errors
/// The VM exit.
pub fn read_page(core: &mut Core, hpa: u64, size: usize) -> Exec<u64> {
    let offset = hpa & PAGE_OFFSET;
    if is_virtualized(core, offset, size, READABLE) {
        return Ok(core.virtual_apic(offset, size));
    }
    exit_for(core, hpa, READ)
}

/// An instruction fetch from the APIC-access page.
///
/// # Errors
/// The VM exit, always.
pub fn fetch_page(core: &Core, hpa: u64) -> Exec<u64> {
    exit_for(core, hpa, FETCH)
}

/// A write of the APIC-access page: to the virtual-APIC page and emulated, or a VM exit.
///
/// # Errors
/// The VM exit.
pub fn write_page(core: &mut Core, hpa: u64, size: usize, value: u64) -> Exec<()> {
    let offset = hpa & PAGE_OFFSET;
    if !is_virtualized(core, offset, size, WRITABLE) {
        return exit_for(core, hpa, WRITE);
    }
    core.set_virtual_apic(offset, size, value);
    emulate_write(core, offset);
    Ok(())
}

/// "APIC-Write Emulation".
fn emulate_write(core: &mut Core, offset: u64) {
    match offset & !0xF {
        at::TPR => {
            let vtpr = core.virtual_apic(at::TPR, 1);
            core.set_virtual_apic(at::TPR, 4, vtpr);
            virtualize_tpr(core);
        }
        at::EOI if has_delivery(core) => {
            core.set_virtual_apic(at::EOI, 4, 0);
            virtualize_eoi(core);
        }
        at::ICR if has_delivery(core) => {
            let icr = core.virtual_apic(at::ICR, 4);
            if is_self_ipi(icr) { virtualize_self_ipi(core, icr as u8) } else { exit_after(core, offset) }
        }
        at::ICR_HIGH => {
            let high = core.virtual_apic(at::ICR_HIGH, 4);
            core.set_virtual_apic(at::ICR_HIGH, 4, high & 0xFF00_0000);
        }
        _ => exit_after(core, offset),
    }
}

/// Whether an interrupt command is one that the processor carries out for the guest: to itself,
/// fixed, edge-triggered, with a legal vector.
fn is_self_ipi(icr: u64) -> bool {
    /// Bits 31:20, 17:16 and 13 are reserved; 12 is the delivery status, 15 the trigger mode,
    /// 10:8 the delivery mode.
    const ZERO: u64 = 0xFFF0_0000 | 3 << 16 | 1 << 13 | 1 << 12 | 1 << 15 | 7 << 8;
    icr & ZERO == 0 && icr >> 18 & 3 == 1 && icr & 0xF0 != 0
}

/// An APIC-write VM exit after the instruction.
fn exit_after(core: &mut Core, offset: u64) {
    core.vmx.trap_exit = Some((reason::APIC_WRITE, offset));
    core.attention = 1;
}

/// What MOV from CR8 reads under "use TPR shadow"; `None`: the processor's own TPR.
#[must_use]
pub fn cr8(core: &Core) -> Option<u64> {
    has_tpr_shadow(core).then(|| core.virtual_apic(at::TPR, 1) >> 4)
}

/// MOV to CR8 under "use TPR shadow".  False: it writes the processor's own TPR.
pub fn set_cr8(core: &mut Core, value: u64) -> bool {
    let shadows = has_tpr_shadow(core);
    if shadows {
        core.set_virtual_apic(at::TPR, 4, value << 4 & 0xF0);
        virtualize_tpr(core);
    }
    shadows
}

/// Which register an x2APIC MSR is under "virtualize x2APIC mode".
fn x2apic(core: &Core, index: u32) -> Option<u64> {
    let is_on = core.vmx.non_root && core.vmx.controls.secondary(secondary::VIRTUALIZE_X2APIC_MODE);
    let is_apic = (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&index);
    (is_on && is_apic).then(|| u64::from(index & 0xFF) << 4)
}

/// What RDMSR reads from the virtual-APIC page; `None`: the MSR itself.
#[must_use]
pub fn rdmsr(core: &Core, index: u32) -> Option<u64> {
    let offset = x2apic(core, index)?;
    let is_virtual = core.vmx.controls.secondary(secondary::APIC_REGISTER_VIRTUALIZATION);
    (is_virtual || offset == at::TPR).then(|| core.virtual_apic(offset, 8))
}

/// WRMSR to the virtual-APIC page.  False: it writes the MSR itself.
///
/// # Errors
/// #GP(0) for reserved bits.
pub fn wrmsr(core: &mut Core, index: u32, value: u64) -> Exec<bool> {
    let Some(offset) = x2apic(core, index) else { return Ok(false) };
    let allowed = match offset {
        at::TPR => 0xFF,
        at::EOI if has_delivery(core) => 0,
        at::SELF_IPI if has_delivery(core) => 0xFF,
        _ => return Ok(false),
    };
    if value & !allowed != 0 {
        return Err(gp(0));
    }
    core.set_virtual_apic(offset, 8, value);
    match offset {
        at::TPR => virtualize_tpr(core),
        at::EOI => virtualize_eoi(core),
        _ if value & 0xF0 == 0 => exit_after(core, offset),
        _ => virtualize_self_ipi(core, value as u8),
    }
    Ok(true)
}

/// "TPR Virtualization".
fn virtualize_tpr(core: &mut Core) {
    if has_delivery(core) {
        crate::vmx::virtual_interrupts::virtualize_tpr(core);
    } else {
        check_threshold(core);
    }
}

fn check_threshold(core: &mut Core) {
    if core.virtual_apic(at::TPR, 1) >> 4 < core.vmx.controls.tpr_threshold {
        core.vmx.trap_exit = Some((reason::TPR_BELOW_THRESHOLD, 0));
        core.attention = 1;
    }
}

/// "VM Exits Induced by the TPR Threshold": after VM entry.
pub(crate) fn check_threshold_at_entry(core: &mut Core) {
    let is_asked = core.vmx.controls.secondary(secondary::VIRTUALIZE_APIC_ACCESSES);
    if has_tpr_shadow(core) && is_asked && !has_delivery(core) {
        check_threshold(core);
    }
}
