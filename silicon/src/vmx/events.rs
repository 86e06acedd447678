//! What happens between instructions in non-root operation: timers and windows.

use crate::arch::exit::Exit;
use crate::cpu::state::Core;

/// The VM exit due now, between two instructions, in the manual's order of priority: MTF,
/// TPR below threshold, preemption timer, NMI window, interrupt window, external interrupt (a
/// kick), virtual-interrupt delivery performed here too.
#[must_use]
pub fn due(_core: &mut Core) -> Option<Exit> {
    None
}

/// The TSC at which [`due`] must be asked again at the latest (preemption timer); `u64::MAX` if
/// no such time.
#[must_use]
pub fn deadline(_core: &Core) -> u64 {
    u64::MAX
}

/// A kick arrived in non-root operation: the exit it makes under "external-interrupt exiting".
#[must_use]
pub fn on_kick(_core: &Core) -> Option<Exit> {
    None
}
