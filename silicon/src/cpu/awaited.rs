//! What the local APIC and VMX will answer, until their own files do: methods and modules of the
//! same names there take precedence, and this file goes.

use crate::apic::LocalApic;
use crate::cpu::state::Core;
use crate::vmx::Vmx;

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

/// VMX controls: none yet.
pub(crate) trait AwaitedVmx {
    fn is_unrestricted(&self) -> bool {
        false
    }
    fn has_rdtscp(&self) -> bool {
        true
    }
    fn is_nmi_unblocked_by_iret(&self) -> bool {
        true
    }
}
impl AwaitedVmx for Vmx {}

pub(crate) mod apic {
    use super::Core;
    pub(crate) fn cr8(_core: &Core) -> Option<u64> {
        None
    }
    pub(crate) fn set_cr8(_core: &mut Core, _value: u64) -> bool {
        false
    }
}

pub(crate) mod capabilities {
    pub(crate) fn read(_msr: u32) -> Option<u64> {
        None
    }
}
