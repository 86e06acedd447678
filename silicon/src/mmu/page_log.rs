//! The page-modification log (SDM 3C, "Page-Modification Logging"): 512 guest-physical addresses,
//! filled from the last entry down.

use crate::addr::PAGE_OFFSET;
use crate::arch::vmcs as f;
use crate::cpu::state::Core;
use crate::mem::Memory;
use crate::vmx::controls::secondary;

const ENTRIES: u64 = 512;

/// Where the log of the guest that runs is.
#[derive(Clone, Copy, Debug)]
pub struct PageLog {
    /// Host-physical address of the log.
    address: u64,
    /// Host-physical address of the PML index: it lives in the VMCS.
    index: u64,
}

impl PageLog {
    /// Whether the index names no entry.
    pub(crate) fn is_full(self, mem: &Memory) -> bool {
        mem.load(self.index, 2) >= ENTRIES
    }

    /// Add the page of a guest-physical address to a log that is not full.
    pub(crate) fn note(self, mem: &Memory, gpa: u64) {
        let index = mem.load(self.index, 2);
        let at = self.address.wrapping_add(8 * index);
        mem.store(at, 8, gpa & !PAGE_OFFSET);
        mem.wrote(at, 8);
        mem.store(self.index, 2, index.wrapping_sub(1) & 0xFFFF);
    }
}

impl Core {
    /// The log that walks under EPT keep, if the controls ask for one.
    pub(crate) fn page_log(&self) -> Option<PageLog> {
        let c = &self.vmx.controls;
        (self.vmx.non_root && c.secondary(secondary::ENABLE_PML)).then(|| PageLog {
            address: c.pml_address,
            index: self.vmx.current.wrapping_add(f::offset(f::PML_INDEX)),
        })
    }
}
