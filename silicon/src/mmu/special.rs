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

    /// Fetch a byte of code where there is no plain memory.
    pub(crate) fn fetch_special(&mut self, hpa: u64) -> Exec<u64> {
        if vmx::apic::is_access_page(self, hpa) {
            return vmx::apic::fetch_page(self, hpa);
        }
        self.read_special(hpa, 1)
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
            let icr = self.apic.write(offset as u32, value as u32, now);
            self.nmi_pending |= self.apic.take_nmi() | (icr.is_some() && self.apic.commands_own_nmi());
            self.attention = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::arch::exit::reason;
    use crate::cpu::msr;
    use crate::cpu::testbed::protected;
    use crate::cpu::trap::Trap;
    use crate::mmu::access::Who;

    const PAGE: u64 = 0xFEE0_0000;

    #[test]
    fn the_apics_page_is_where_the_base_register_says() {
        let mut core = protected(0);
        core.write_lin(PAGE + 0xF0, 4, 0x1FF, Who::Program).unwrap();
        assert_eq!(Ok(0x1FF), core.read_lin(PAGE + 0xF0, 4, Who::Program));
        assert_eq!(Ok(0x01), core.read_lin(PAGE + 0xF1, 1, Who::Program));
        assert_eq!(Ok(0x5_0014), core.read_lin(PAGE + 0x30, 4, Who::Program));
        // Over plain memory, too, and what was there before stays hidden.
        core.apic.wrmsr(0x1B, 0x20_0900, 0);
        core.flush_guest();
        core.mem.store(0x20_00F0, 4, 7);
        assert_eq!(Ok(0x1FF), core.read_lin(0x20_00F0, 4, Who::Program));
        assert!(
            matches!(core.read_lin(PAGE, 4, Who::Program), Err(Trap::Stop(e)) if e.reason == reason::MMIO)
        );
    }

    #[test]
    fn a_self_ipi_through_the_page_is_looked_at_before_the_next_instruction() {
        let mut core = protected(0);
        core.write_lin(PAGE + 0xF0, 4, 0x1FF, Who::Program).unwrap();
        core.attention = 0;
        core.write_lin(PAGE + 0x300, 4, 0x4_0041, Who::Program).unwrap();
        assert_eq!((Some(0x41), 1), (core.apic.pending(), core.attention));
    }

    #[test]
    fn an_nmi_that_a_processor_sends_itself_arrives() {
        // Itself, all, physically by its number; not: all others, another number.
        for (high, low, arrives) in [
            (0, 0x4_0400, true),
            (0, 0x8_0400, true),
            (0, 0x400, true),
            (0, 0xC_0400, false),
            (7, 0x400, false),
        ] {
            let mut core = protected(0);
            core.write_lin(PAGE + 0xF0, 4, 0x1FF, Who::Program).unwrap();
            core.write_lin(PAGE + 0x310, 4, high << 24, Who::Program).unwrap();
            assert!(!core.nmi_pending);
            core.write_lin(PAGE + 0x300, 4, low, Who::Program).unwrap();
            assert_eq!(arrives, core.nmi_pending, "{high:#x} {low:#x}");
            let mut core = protected(0);
            msr::write(&mut core, 0x1B, 0xFEE0_0D00).unwrap(); // x2APIC mode
            core.attention = 0;
            msr::write(&mut core, 0x830, high << 32 | low).unwrap();
            assert_eq!((arrives, 1), (core.nmi_pending, core.attention), "{high:#x} {low:#x}");
        }
    }

    #[test]
    fn narrow_writes_of_the_page_do_nothing() {
        let mut core = protected(0);
        core.write_lin(PAGE + 0x80, 1, 0x55, Who::Program).unwrap();
        assert_eq!(Ok(0), core.read_lin(PAGE + 0x80, 4, Who::Program));
    }

    #[test]
    fn no_memory_stops_a_bare_machine_with_what_it_wanted() {
        let mut core = protected(0);
        let Err(Trap::Stop(stop)) = core.write_lin(0xC000_0000, 2, 0xABCD, Who::Program) else {
            panic!("expected a stop");
        };
        assert_eq!(
            (reason::MMIO, 1, 0xC000_0000, 0xABCD, 2),
            (stop.reason, stop.qualification, stop.gpa, stop.gla, stop.length)
        );
    }
}
