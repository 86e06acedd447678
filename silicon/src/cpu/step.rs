//! One instruction.

use crate::cpu::state::Core;
use crate::cpu::trap::Exec;

/// Fetch, decode and execute one instruction; on success RIP names the next one and
/// `countdown` went down by one.
///
/// # Errors
/// The trap that stopped it.
pub fn step(_core: &mut Core) -> Exec<()> {
    unimplemented!()
}
