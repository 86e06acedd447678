//! VM exits (SDM 3C, "VM Exits").

use crate::arch::exception::Exception;
use crate::arch::exit::Exit;
use crate::cpu::state::Core;

/// Perform a VM exit: record information, save guest state, load host state.  Returns the exit
/// with every information field filled in (IDT-vectoring from `core.vectoring`).
pub fn perform(_core: &mut Core, _exit: Exit) -> Exit {
    unimplemented!()
}

/// In non-root operation: the VM exit that this exception causes under the exception bitmap and
/// the page-fault mask and match; `None` if it is the guest's own.
#[must_use]
pub fn of_exception(_core: &Core, _e: &Exception) -> Option<Exit> {
    None
}
