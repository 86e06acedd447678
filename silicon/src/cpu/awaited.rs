//! What the local APIC will answer, until its own file does: methods of the same names there take
//! precedence, and this file goes.

use crate::apic::LocalApic;

/// The APIC's registers: none yet.
pub(crate) trait AwaitedApic {
    fn rdmsr(&mut self, _msr: u32, _now: u64) -> Option<u64> {
        None
    }
    fn wrmsr(&mut self, _msr: u32, _value: u64, _now: u64) -> Option<Option<u64>> {
        None
    }
    fn tpr(&self) -> u8 {
        0
    }
    fn set_tpr(&mut self, _tpr: u8) {}
}
impl AwaitedApic for LocalApic {}
