//! Pages that are not plain memory: the local APIC's, the APIC-access page, and no memory at all.

use crate::addr::PAGE_OFFSET;
use crate::arch::exit::{Exit, reason};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap};
use crate::vmx;

impl Core {
    /// Whether a host-physical address needs more than a load or store.
    #[must_use]
    pub(crate) fn is_special(&self, hpa: u64) -> bool {
        !self.mem.contains(hpa & !PAGE_OFFSET, PAGE_OFFSET + 1)
            || self.is_apic_page(hpa)
            || vmx::apic::is_access_page(self, hpa)
    }

    /// Whether a host-physical address is on the register page of this processor's local APIC.
    /// A guest's accesses reach it, too, if the EPT maps it for them.
    fn is_apic_page(&self, hpa: u64) -> bool {
        self.apic.page() == Some(hpa & !PAGE_OFFSET)
    }

    /// Read where there is no plain memory.
    pub(crate) fn read_special(&mut self, hpa: u64, size: usize) -> Exec<u64> {
        if vmx::apic::is_access_page(self, hpa) {
            return vmx::apic::read_page(self, hpa, size);
        }
        if self.is_apic_page(hpa) {
            return Ok(self.read_apic(hpa & PAGE_OFFSET, size));
        }
        if self.vmx.non_root {
            return Ok(u64::MAX >> (64 - 8 * size));
        }
        Err(Trap::Stop(Box::new(Exit { gpa: hpa, length: size as u32, ..Exit::new(reason::MMIO, 0) })))
    }

    /// Write where there is no plain memory.
    pub(crate) fn write_special(&mut self, hpa: u64, size: usize, value: u64) -> Exec<()> {
        if vmx::apic::is_access_page(self, hpa) {
            return vmx::apic::write_page(self, hpa, size, value);
        }
        if self.is_apic_page(hpa) {
            self.write_apic(hpa & PAGE_OFFSET, size, value);
            return Ok(());
        }
        if self.vmx.non_root {
            return Ok(());
        }
        let stop = Exit { gpa: hpa, gla: value, length: size as u32, ..Exit::new(reason::MMIO, 1) };
        Err(Trap::Stop(Box::new(stop)))
    }

    /// A read inside the APIC's page.  Registers are read as aligned 32-bit words; of other
    /// accesses, which the manual leaves undefined, the bytes in that word count.
    fn read_apic(&mut self, offset: u64, size: usize) -> u64 {
        let now = self.tsc();
        let word = u64::from(self.apic.read(offset as u32 & !3, now));
        word >> (8 * (offset & 3)) & (u64::MAX >> (64 - 8 * size))
    }

    /// A write inside the APIC's page.  Only aligned 32-bit (or wider) writes do anything.  There
    /// is no other processor that an interrupt command could reach from here.
    fn write_apic(&mut self, offset: u64, size: usize, value: u64) {
        if offset & 3 == 0 && size >= 4 {
            let now = self.tsc();
            self.apic.write(offset as u32, value as u32, now);
            self.nmi_pending |= self.apic.take_nmi();
            self.attention = 1;
        }
    }
}
