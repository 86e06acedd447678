//! Delivery of interrupts and exceptions through the IDT (SDM 3A, "Interrupt and Exception
//! Handling"; SDM 3C, "Event Injection" for the kinds).

use crate::arch::exception::Exception;
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;

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

impl From<Exception> for Event {
    fn from(e: Exception) -> Self {
        Event { vector: e.vector, kind: Kind::Hardware, error: e.error, length: 0 }
    }
}

/// Deliver an event through the IDT (IVT in real mode), pushing RIP as it is now (plus
/// `length` for software events).
///
/// # Errors
/// The exception, VM exit or stop that happened instead; nothing was changed then, except what
/// the manual says a failed task switch changes.
pub fn deliver(_core: &mut Core, _event: Event) -> Exec<()> {
    unimplemented!()
}

/// Raise an exception: in non-root operation it may cause a VM exit instead; else it goes through
/// the IDT, and an exception met on that way makes a double fault or a shutdown
/// (SDM 3A, "Interrupt 8: Double Fault Exception").
///
/// # Errors
/// The VM exit (exception bitmap, triple fault) or stop (shutdown in root operation).
pub fn raise(_core: &mut Core, _e: Exception) -> Exec<()> {
    unimplemented!()
}

/// Deliver an event that is not an exception (an interrupt, an injected event); an exception met
/// on the way is raised in turn.
///
/// # Errors
/// As [`raise`].
pub fn deliver_or_raise(_core: &mut Core, _event: Event) -> Exec<()> {
    unimplemented!()
}
