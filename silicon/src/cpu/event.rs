//! Delivery of interrupts and exceptions through the IDT (SDM 3A, "Interrupt and Exception
//! Handling"; SDM 3C, "Event Injection" for the kinds).
//!
//! This file decides *what* is delivered (double and triple faults, VM exits); [`gate`] is how.
//!
//! Invariant: `core.vectoring` names the event on its way while [`deliver`] works, and stays set
//! when delivery ends in an exception (for [`raise`], which takes it as the first of two) or in a
//! VM exit (for its IDT-vectoring information).

use crate::arch::exception::{Exception, vector};
use crate::arch::exit::{Exit, reason};
use crate::cpu::gate;
use crate::cpu::ring0;
use crate::cpu::state::{Activity, Core, Mode, Shadow};
use crate::cpu::step::BTF;
use crate::cpu::trap::{Exec, Trap, vm_exit};
use crate::vmx;

/// What is delivered; the numbers are the VMCS interruption types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// External interrupt.
    External = 0,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    Hardware = 3,
    /// INT n.
    Software = 4,
    /// INT1.
    PrivilegedSoftware = 5,
    /// INT3 or INTO.
    SoftwareException = 6,
}

/// An event on its way through the IDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// The vector.
    pub vector: u8,
    /// What sort it is.
    pub kind: Kind,
    /// The error code to push, if any.
    pub error: Option<u32>,
    /// Software events: the length of the instruction, added to RIP for the saved address.
    pub length: u8,
}

impl Event {
    /// The EXT bit of error codes met while this event is delivered ("Error Code").
    #[must_use]
    pub fn ext(&self) -> u32 {
        u32::from(!matches!(self.kind, Kind::Software | Kind::SoftwareException))
    }

    fn class(&self) -> Class {
        if self.kind == Kind::Hardware { class_of(self.vector) } else { Class::Benign }
    }
}

impl From<Exception> for Event {
    fn from(e: Exception) -> Self {
        Event { vector: e.vector, kind: Kind::Hardware, error: e.error, length: 0 }
    }
}

/// SDM 3A, "Interrupt and Exception Classes".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class_of(v: u8) -> Class {
    match v {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What a second exception makes of the first ("Conditions for Generating a Double Fault").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Serial,
    Double,
    Triple,
}

fn combine(first: Class, second: Class) -> Outcome {
    match (first, second) {
        (_, Class::Benign) | (Class::Benign, _) => Outcome::Serial,
        (Class::DoubleFault, _) => Outcome::Triple,
        (Class::Contributory, Class::PageFault) => Outcome::Serial,
        _ => Outcome::Double,
    }
}

/// Deliver an event through the IDT (IVT in real mode), pushing RIP as it is now (plus
/// `length` for software events).
///
/// # Errors
/// The exception, VM exit or stop that happened instead; nothing was changed then, except what
/// the manual says a failed task switch changes.
pub fn deliver(core: &mut Core, event: Event) -> Exec<()> {
    deliver_marking(core, event, false)
}

fn deliver_marking(core: &mut Core, event: Event, resume: bool) -> Exec<()> {
    ring0::take(core, &event, 0)?;
    (core.vectoring, core.vectoring_resumes) = (Some(event), resume);
    match gate::enter(core, &event, resume) {
        Ok(()) => {
            core.vectoring = None;
            core.counts.injected[usize::from(event.vector)] += 1;
            core.shadow = Shadow::None;
            core.activity = Activity::Active;
            core.attention = 1;
            core.refresh();
            Ok(())
        }
        Err(trap) => {
            if matches!(trap, Trap::Stop(_)) {
                core.vectoring = None;
            }
            Err(trap)
        }
    }
}

/// Whether RF is set in the pushed image: for faults, so that their handler's return does not meet
/// the instruction breakpoint again ("Instruction-Breakpoint Exception Condition").
fn sets_resume_flag(e: &Exception) -> bool {
    const BREAKPOINTS: u64 = 0xF;
    match e.vector {
        vector::DF | vector::MC => false,
        vector::DB => !e.is_trap && e.payload & BREAKPOINTS == 0,
        _ => !e.is_trap,
    }
}

/// The state that an exception leaves apart from its frame: CR2, DR6, DR7.GD, IA32_DEBUGCTL.BTF.
fn leave_marks(core: &mut Core, e: &Exception) {
    const BREAKPOINTS: u64 = 0xF;
    const GENERAL_DETECT: u64 = 1 << 13;
    match e.vector {
        vector::PF => core.cr2 = e.payload,
        vector::DB => {
            core.dr[6] = core.dr[6] & !BREAKPOINTS | e.payload & 0xE00F;
            core.dr[7] &= !GENERAL_DETECT;
            core.msr.debugctl &= !BTF;
        }
        _ => {}
    }
}

fn shutdown(core: &mut Core) -> Trap {
    core.vectoring = None;
    if core.vmx.non_root {
        return vm_exit(Exit::new(reason::TRIPLE_FAULT, 0));
    }
    core.activity = Activity::Shutdown;
    core.attention = 1;
    Trap::Stop(Box::new(Exit::new(reason::SHUTDOWN, 0)))
}

/// The bit of the interruption information "NMI unblocking due to IRET".
const NMI_UNBLOCKING: u32 = 12;

/// Raise an exception: in non-root operation it may cause a VM exit instead; else it goes through
/// the IDT, and an exception met on that way makes a double fault or a shutdown
/// (SDM 3A, "Interrupt 8: Double Fault Exception").
///
/// # Errors
/// The VM exit (exception bitmap, triple fault) or stop (shutdown in root operation).
pub fn raise(core: &mut Core, e: Exception) -> Exec<()> {
    let mut e = e;
    let mut is_unblocked = std::mem::take(&mut core.nmi_unblocked_by_fault);
    loop {
        if core.mode == Mode::Real && e.error.is_some() {
            // "exceptions do not return error codes in real-address mode"
            e.error = None;
        }
        if let Some(mut exit) = vmx::exit::of_exception(core, &e) {
            exit.intr_info |= u32::from(is_unblocked) << NMI_UNBLOCKING;
            return Err(vm_exit(exit));
        }
        is_unblocked = false;
        ring0::take(core, &e.into(), e.payload)?;
        let first = core.vectoring.take().map_or(Class::Benign, |event| event.class());
        match combine(first, class_of(e.vector)) {
            Outcome::Serial => {}
            Outcome::Triple => return Err(shutdown(core)),
            Outcome::Double => {
                leave_marks(core, &e);
                e = Exception::coded(vector::DF, 0);
                // Not "during delivery" any more: no IDT-vectoring information for its own exit.
                continue;
            }
        }
        leave_marks(core, &e);
        match deliver_marking(core, e.into(), sets_resume_flag(&e)) {
            Err(Trap::Exception(second)) => e = second,
            result => return result,
        }
    }
}

/// Deliver an event that is not an exception (an interrupt, an injected event); an exception met
/// on the way is raised in turn.
///
/// # Errors
/// As [`raise`].
pub fn deliver_or_raise(core: &mut Core, event: Event) -> Exec<()> {
    match deliver(core, event) {
        Err(Trap::Exception(e)) => raise(core, e),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_conditions_for_generating_a_double_fault() {
        use Class::{Benign, Contributory, DoubleFault, PageFault};
        let rows = [
            (Benign, [Outcome::Serial, Outcome::Serial, Outcome::Serial]),
            (Contributory, [Outcome::Serial, Outcome::Double, Outcome::Serial]),
            (PageFault, [Outcome::Serial, Outcome::Double, Outcome::Double]),
            (DoubleFault, [Outcome::Serial, Outcome::Triple, Outcome::Triple]),
        ];
        for (first, expected) in rows {
            let got = [Benign, Contributory, PageFault].map(|second| combine(first, second));
            assert_eq!(expected, got, "{first:?}");
        }
    }
}
