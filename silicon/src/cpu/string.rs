//! String instructions.

use iced_x86::Instruction;

use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, ud};

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(_core: &mut Core, _insn: &Instruction) -> Exec<()> {
    Err(ud())
}
