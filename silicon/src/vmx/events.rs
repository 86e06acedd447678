//! What happens between instructions in non-root operation: timers and windows.

use crate::arch::bits::rflags;
use crate::arch::exception::{Exception, vector};
use crate::arch::exit::{Exit, reason};
use crate::cpu::event::{self, Event, Kind};
use crate::cpu::state::{Activity, Clock, Core, Shadow};
use crate::cpu::trap::Trap;
use crate::vmx::controls::{exit, pin, primary};
use crate::vmx::virtual_interrupts;

const VALID: u32 = 1 << 31;

/// The VM exit due now, between two instructions, in the manual's order of priority: exits of the
/// kind of traps, MTF, preemption timer, NMI window, NMI, interrupt window, external interrupt.
/// Interrupts that do not exit are delivered here.
#[must_use]
pub fn due(core: &mut Core) -> Option<Exit> {
    let now = core.tsc();
    before_interrupts(core, now).or_else(|| nmi(core)).or_else(|| interrupt(core, now))
}

/// What comes before interrupts of every kind (SDM 3C, "Other Causes of VM Exits").
fn before_interrupts(core: &mut Core, now: u64) -> Option<Exit> {
    if let Some((why, qualification)) = core.vmx.trap_exit.take() {
        return Some(Exit::new(why, qualification));
    }
    if core.vmx.mtf.is_some_and(|mark| mark != (core.retired(), core.rip)) {
        return Some(Exit::new(reason::MTF, 0));
    }
    (core.vmx.timer <= now).then(|| Exit::new(reason::PREEMPTION_TIMER, 0))
}

/// Whether a VM exit that is due after this instruction comes before the debug trap that it raised,
/// which stays pending (SDM 3C, "Monitor Trap Flag": such exits "take priority over debug-trap
/// exceptions").
#[must_use]
pub fn comes_before(core: &Core, e: &Exception) -> bool {
    let is_due = core.vmx.mtf.is_some() || core.vmx.trap_exit.is_some();
    core.vmx.non_root && is_due && e.is_trap && e.vector == vector::DB
}

/// A part of a repeated instruction, or a whole one, was done: the monitor trap flag exits "on the
/// instruction boundary following that iteration" (SDM 3C, "Monitor Trap Flag").
pub fn note_iteration(core: &mut Core) {
    if must_step(core) {
        core.vmx.mtf = Some((u64::MAX, 0));
    }
}

/// Whether nothing is due between these two instructions, and nothing but time changes that:
/// engines that were asked to stop for attention may then go on.
#[must_use]
pub fn is_quiet(core: &Core) -> bool {
    let has_window = core.vmx.controls.primary(primary::INTERRUPT_WINDOW_EXITING);
    core.shadow == Shadow::None && is_calm(core) && !(core.flag(rflags::IF) && has_window)
}

/// Whether nothing would be due, and nothing but time changed that, with RFLAGS.IF set and no
/// interrupt shadow.
#[must_use]
pub fn is_open(core: &Core) -> bool {
    is_calm(core) && !core.vmx.controls.primary(primary::INTERRUPT_WINDOW_EXITING)
}

fn is_calm(core: &Core) -> bool {
    let v = &core.vmx;
    v.non_root
        && is_in_time(core)
        && core.activity == Activity::Active
        && v.trap_exit.is_none()
        && v.mtf.is_none()
        && !v.is_recognized
        && !core.nmi_pending
        && !core.pmu.is_news
        && !v.controls.primary(primary::NMI_WINDOW_EXITING)
        && core.apic.pending().is_none()
}

/// Whether the countdown ends before anything is due by time.  A VM entry by code in the machine, or
/// a timer that it sets, may bring a time that the dispatcher does not know yet.
fn is_in_time(core: &Core) -> bool {
    let end = core.horizon.wrapping_add(core.tsc_skew);
    core.clock == Clock::Wall || core.vmx.timer.min(core.apic.deadline()) >= end
}

fn nmi(core: &mut Core) -> Option<Exit> {
    let c = &core.vmx.controls;
    let is_virtual = c.pin(pin::VIRTUAL_NMIS);
    if c.primary(primary::NMI_WINDOW_EXITING) && !core.nmi_blocked && core.shadow == Shadow::None {
        return Some(Exit::new(reason::NMI_WINDOW, 0));
    }
    let is_blocked = if is_virtual { core.vmx.host_nmi_blocked } else { core.nmi_blocked };
    if !core.nmi_pending || is_blocked {
        return None;
    }
    if core.vmx.controls.pin(pin::NMI_EXITING) {
        core.nmi_pending = false;
        let intr_info = VALID | (Kind::Nmi as u32) << 8 | 2;
        return Some(Exit { intr_info, ..Exit::new(reason::EXCEPTION_OR_NMI, 0) });
    }
    if core.shadow != Shadow::None {
        return None;
    }
    core.nmi_pending = false;
    core.nmi_blocked = true;
    deliver(core, Event { vector: 2, kind: Kind::Nmi, error: None, length: 0 })
}

fn interrupt(core: &mut Core, now: u64) -> Option<Exit> {
    let c = core.vmx.controls;
    let is_open = core.flag(rflags::IF) && core.shadow == Shadow::None;
    if is_open && c.primary(primary::INTERRUPT_WINDOW_EXITING) {
        return Some(Exit::new(reason::INTERRUPT_WINDOW, 0));
    }
    if is_open
        && core.vmx.is_recognized
        && let Some(exit) = virtual_interrupts::deliver(core)
    {
        return Some(exit);
    }
    if core.apic.deadline() <= now {
        core.apic.tick(now);
    }
    core.apic.pending()?;
    if c.pin(pin::EXTERNAL_INTERRUPT_EXITING) {
        let mut exit = Exit::new(reason::EXTERNAL_INTERRUPT, 0);
        if c.exit(exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT) {
            let vector = core.apic.accept()?;
            if c.pin(pin::PROCESS_POSTED_INTERRUPTS) && virtual_interrupts::is_notification(core, vector) {
                virtual_interrupts::take_posted(core);
                return interrupt(core, now);
            }
            exit.intr_info = VALID | u32::from(vector);
        }
        return Some(exit);
    }
    if !is_open {
        return None;
    }
    let vector = core.apic.accept()?;
    deliver(core, Event { vector, kind: Kind::External, error: None, length: 0 })
}

/// Deliver through the guest's IDT; what ends in a VM exit is due.  The monitor trap flag exits
/// before the handler's first instruction.
pub(crate) fn deliver(core: &mut Core, event: Event) -> Option<Exit> {
    match event::deliver_or_raise(core, event) {
        Err(Trap::Exit(exit) | Trap::Stop(exit)) => Some(*exit),
        Ok(()) if core.vmx.mtf.is_some() => Some(Exit::new(reason::MTF, 0)),
        Ok(()) | Err(Trap::Exception(_) | Trap::Again) => None,
    }
}

/// The TSC at which [`due`] must be asked again at the latest (preemption timer, the local APIC's
/// timer, the next instruction under MTF); `u64::MAX` if no such time.
#[must_use]
pub fn deadline(core: &Core) -> u64 {
    if must_step(core) {
        return core.tsc().saturating_add(1);
    }
    core.vmx.timer.min(core.apic.deadline())
}

/// Whether the dispatcher must look again after one instruction ("monitor trap flag").
#[must_use]
pub fn must_step(core: &Core) -> bool {
    core.vmx.non_root && core.vmx.mtf.is_some()
}

/// A kick arrived in non-root operation: the exit it makes under "external-interrupt exiting" if
/// the host software is outside.  (A hypervisor in the machine knows nothing of kicks: `run` stops.)
///
/// An exit that is due anyway, and comes first, is the one: kicks come at any time, and must not
/// change what is counted.
#[must_use]
pub fn on_kick(core: &mut Core) -> Option<Exit> {
    let exits = core.vmx.is_host_outside && core.vmx.controls.pin(pin::EXTERNAL_INTERRUPT_EXITING);
    let now = core.tsc();
    exits.then(|| before_interrupts(core, now).unwrap_or_else(|| Exit::new(reason::EXTERNAL_INTERRUPT, 0)))
}
