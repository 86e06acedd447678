//! Virtual interrupts (SDM 3C, "Evaluation and Delivery of Virtual Interrupts", "Virtualizing
//! Reads from the APIC-Access Page" and those beside it, "Posted-Interrupt Processing").
//!
//! Invariants: the guest interrupt status (RVI and SVI) lives in the VMCS.  Whether a virtual
//! interrupt is recognized is only decided by an evaluation, and forgotten by its delivery and by
//! VM exits.

use crate::arch::exit::{Exit, reason};
use crate::arch::vmcs as f;
use crate::cpu::event::{Event, Kind};
use crate::cpu::state::{Activity, Core};
use crate::vmx::apic::at;
use crate::vmx::controls::{primary, secondary};
use crate::vmx::events;

/// The outstanding-notification flag of a posted-interrupt descriptor: bit 256.
const NOTIFICATION: u64 = 32;

/// "Virtual-interrupt delivery" is on in the guest that runs.
pub(crate) fn has_delivery(core: &Core) -> bool {
    core.vmx.non_root && core.vmx.controls.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY)
}

/// The guest interrupt status: requesting and servicing virtual interrupt.
fn status(core: &Core) -> (u8, u8) {
    let status = core.vmcs(f::GUEST_INTERRUPT_STATUS);
    (status as u8, (status >> 8) as u8)
}

fn set_status(core: &Core, rvi: u8, svi: u8) {
    core.set_vmcs(f::GUEST_INTERRUPT_STATUS, u64::from(rvi) | u64::from(svi) << 8);
}

fn set_vector(core: &Core, registers: u64, vector: u8, on: bool) {
    let (at, bit) = (registers + u64::from(vector / 32) * 16, 1 << (vector % 32));
    let old = core.virtual_apic(at, 4);
    core.set_virtual_apic(at, 4, if on { old | bit } else { old & !bit });
}

/// The highest vector whose bit is set; 0 if there is none.
fn highest(core: &Core, registers: u64) -> u8 {
    let word = |n: u8| core.virtual_apic(registers + u64::from(n) * 16, 4);
    (0..8).rev().find(|&n| word(n) != 0).map_or(0, |n| n * 32 + word(n).ilog2() as u8)
}

/// "PPR Virtualization".
fn virtualize_ppr(core: &Core) {
    let (vtpr, (_, svi)) = (core.virtual_apic(at::TPR, 1) as u8, status(core));
    let vppr = if vtpr >> 4 >= svi >> 4 { vtpr } else { svi & 0xF0 };
    core.set_virtual_apic(at::PPR, 4, u64::from(vppr));
}

/// "Evaluation of Pending Virtual Interrupts".
fn evaluate(core: &mut Core) {
    let vppr = core.virtual_apic(at::PPR, 1) as u8;
    let has_window = core.vmx.controls.primary(primary::INTERRUPT_WINDOW_EXITING);
    core.vmx.is_recognized = !has_window && status(core).0 >> 4 > vppr >> 4;
    if core.vmx.is_recognized {
        core.attention = 1;
    }
}

/// "TPR Virtualization", and what VM entry does.
pub(crate) fn virtualize_tpr(core: &mut Core) {
    virtualize_ppr(core);
    evaluate(core);
}

/// VM entry: "Updating Non-Register State".
pub(crate) fn enter(core: &mut Core) {
    core.vmx.is_recognized = false;
    if has_delivery(core) {
        virtualize_tpr(core);
    }
}

/// "EOI Virtualization".
pub(crate) fn virtualize_eoi(core: &mut Core) {
    let (rvi, vector) = status(core);
    set_vector(core, at::ISR, vector, false);
    set_status(core, rvi, highest(core, at::ISR));
    virtualize_ppr(core);
    let c = &core.vmx.controls;
    let bitmap = [c.eoi_exit_0, c.eoi_exit_1, c.eoi_exit_2, c.eoi_exit_3];
    if bitmap[usize::from(vector / 64)] >> (vector % 64) & 1 != 0 {
        core.vmx.trap_exit = Some((reason::VIRTUALIZED_EOI, u64::from(vector)));
        core.attention = 1;
    } else {
        evaluate(core);
    }
}

/// "Self-IPI Virtualization".
pub(crate) fn virtualize_self_ipi(core: &mut Core, vector: u8) {
    let (rvi, svi) = status(core);
    set_vector(core, at::IRR, vector, true);
    set_status(core, rvi.max(vector), svi);
    evaluate(core);
}

/// "Virtual-Interrupt Delivery": of the interrupt that is recognized, now that nothing blocks it.
/// The VM exit that it ends in, if any.
pub(crate) fn deliver(core: &mut Core) -> Option<Exit> {
    let (vector, _) = status(core);
    set_vector(core, at::ISR, vector, true);
    core.set_virtual_apic(at::PPR, 4, u64::from(vector & 0xF0));
    set_vector(core, at::IRR, vector, false);
    set_status(core, highest(core, at::IRR), vector);
    core.vmx.is_recognized = false;
    core.activity = Activity::Active;
    events::deliver(core, Event { vector, kind: Kind::External, error: None, length: 0 })
}

/// Whether the vector of an external interrupt that was acknowledged is the notification vector.
pub(crate) fn is_notification(core: &Core, vector: u8) -> bool {
    u64::from(vector) == core.vmx.controls.notification_vector
}

/// "Posted-Interrupt Processing", after the acknowledgment.
pub(crate) fn take_posted(core: &mut Core) {
    let descriptor = core.vmx.controls.posted_descriptor;
    core.mem.update(descriptor.wrapping_add(NOTIFICATION), 8, |word| word & !1);
    core.apic.end_of_interrupt();
    let (mut rvi, svi) = status(core);
    for n in 0..4 {
        let requests = core.mem.update(descriptor.wrapping_add(8 * n), 8, |_| 0);
        for (half, word) in [(0, requests & 0xFFFF_FFFF), (1, requests >> 32)] {
            let at = at::IRR + (2 * n + half) * 16;
            core.set_virtual_apic(at, 4, core.virtual_apic(at, 4) | word);
        }
        if requests != 0 {
            rvi = rvi.max((64 * n) as u8 + requests.ilog2() as u8);
        }
    }
    core.mem.wrote(descriptor, 40);
    set_status(core, rvi, svi);
    evaluate(core);
}
