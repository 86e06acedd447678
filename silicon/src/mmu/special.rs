//! Pages that are not plain memory: the local APIC's, the APIC-access page, and no memory at all.

use crate::addr::PAGE_OFFSET;
use crate::arch::exit::{Exit, reason};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap};

impl Core {
    /// Whether a host-physical address needs more than a load or store.
    #[must_use]
    pub(crate) fn is_special(&self, hpa: u64) -> bool {
        !self.mem.contains(hpa & !PAGE_OFFSET, PAGE_OFFSET + 1) || self.is_apic_page(hpa)
    }

    fn is_apic_page(&self, _hpa: u64) -> bool {
        false
    }

    /// Read where there is no plain memory.
    pub(crate) fn read_special(&mut self, hpa: u64, size: usize) -> Exec<u64> {
        if self.vmx.non_root {
            return Ok(u64::MAX >> (64 - 8 * size));
        }
        Err(Trap::Stop(Box::new(Exit { gpa: hpa, length: size as u32, ..Exit::new(reason::MMIO, 0) })))
    }

    /// Write where there is no plain memory.
    pub(crate) fn write_special(&mut self, hpa: u64, size: usize, value: u64) -> Exec<()> {
        if self.vmx.non_root {
            return Ok(());
        }
        let stop = Exit { gpa: hpa, gla: value, length: size as u32, ..Exit::new(reason::MMIO, 1) };
        Err(Trap::Stop(Box::new(stop)))
    }
}
