//! APIC virtualization (SDM 3C, "APIC Virtualization and Virtual Interrupts"): the TPR shadow and
//! the APIC-access page.

use crate::addr::PAGE_OFFSET;
use crate::arch::exit::{Exit, reason};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, vm_exit};
use crate::vmx::controls::{primary, secondary};

/// Page offset of the TPR.
const TPR: u64 = 0x80;

/// Access types of the exit qualification ("Exit Qualification for APIC-Access VM Exits").
const READ: u64 = 0;
const WRITE: u64 = 1;
const DELIVERY: u64 = 3;

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

fn access(core: &Core, hpa: u64, kind: u64) -> Exit {
    let kind = if core.vectoring.is_some() { DELIVERY } else { kind };
    Exit::new(reason::APIC_ACCESS, hpa & PAGE_OFFSET | kind << 12)
}

/// A read of the APIC-access page: the TPR under "use TPR shadow", else a VM exit.
///
/// # Errors
/// The VM exit.
pub fn read_page(core: &mut Core, hpa: u64, size: usize) -> Exec<u64> {
    if has_tpr_shadow(core) && hpa & PAGE_OFFSET == TPR && size <= 4 {
        return Ok(core.mem.load(core.vmx.controls.virtual_apic.wrapping_add(TPR), size));
    }
    Err(vm_exit(access(core, hpa, READ)))
}

/// A write of the APIC-access page: the TPR under "use TPR shadow", else a VM exit.
///
/// # Errors
/// The VM exit.
pub fn write_page(core: &mut Core, hpa: u64, size: usize, value: u64) -> Exec<()> {
    if has_tpr_shadow(core) && hpa & PAGE_OFFSET == TPR && size <= 4 {
        write_vtpr(core, value as u8);
        return Ok(());
    }
    Err(vm_exit(access(core, hpa, WRITE)))
}

/// What MOV from CR8 reads under "use TPR shadow"; `None`: the processor's own TPR.
#[must_use]
pub fn cr8(core: &Core) -> Option<u64> {
    has_tpr_shadow(core).then(|| core.mem.load(core.vmx.controls.virtual_apic.wrapping_add(TPR), 1) >> 4)
}

/// MOV to CR8 under "use TPR shadow".  False: it writes the processor's own TPR.
pub fn set_cr8(core: &mut Core, value: u64) -> bool {
    let shadows = has_tpr_shadow(core);
    if shadows {
        write_vtpr(core, (value << 4) as u8);
    }
    shadows
}

/// "TPR Virtualization": the write, and the VM exit after it if VTPR is below the threshold.
fn write_vtpr(core: &mut Core, value: u8) {
    core.mem.store(core.vmx.controls.virtual_apic.wrapping_add(TPR), 4, u64::from(value));
    if u64::from(value >> 4) < core.vmx.controls.tpr_threshold {
        core.vmx.trap_exit = Some((reason::TPR_BELOW_THRESHOLD, 0));
        core.attention = 1;
    }
}

/// "VM Exits Induced by the TPR Threshold": after VM entry.
pub(crate) fn check_threshold_at_entry(core: &mut Core) {
    let c = &core.vmx.controls;
    if has_tpr_shadow(core) && c.secondary(secondary::VIRTUALIZE_APIC_ACCESSES) {
        let vtpr = core.mem.load(c.virtual_apic.wrapping_add(TPR), 1) >> 4;
        if vtpr < c.tpr_threshold {
            core.vmx.trap_exit = Some((reason::TPR_BELOW_THRESHOLD, 0));
        }
    }
}
