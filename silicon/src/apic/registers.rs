//! The registers as software sees them: the xAPIC page and the x2APIC MSRs (SDM 3A, "Local APIC
//! Register Address Map", "Extended XAPIC (x2APIC)").

use super::{FIRST_VECTOR, LocalApic, SVR_ENABLE, Vectors, base, delivery, esr, lvt};
use crate::addr::PHYS_MASK;
use crate::arch::msr;

/// Bits of IA32_APIC_BASE that must be zero.
pub(super) const BASE_RESERVED: u64 = !PHYS_MASK | 0xFF | 1 << 9;
/// Version 14H, six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x14 | (lvt::COUNT as u32 - 1) << 16;
/// Bits of the ICR's low word that can be written (12, delivery status, cannot).
const ICR_LOW: u32 = 0x000C_CFFF;
/// Bits of SVR: vector, enable, focus checking.
const SVR_BITS: u32 = 0x3FF;
/// Bits that each LVT entry keeps.
const LVT_BITS: [u32; lvt::COUNT] = [0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF];

/// Page offsets; an x2APIC MSR is 800H + offset / 16.
mod at {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xA0;
    pub const EOI: u32 = 0xB0;
    pub const REMOTE_READ: u32 = 0xC0;
    pub const LDR: u32 = 0xD0;
    pub const DFR: u32 = 0xE0;
    pub const SVR: u32 = 0xF0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT: u32 = 0x320;
    pub const LVT_LAST: u32 = 0x370;
    pub const INITIAL: u32 = 0x380;
    pub const CURRENT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3E0;
    pub const SELF_IPI: u32 = 0x3F0;
}

impl LocalApic {
    /// A register by its offset in the page.  There is nothing behind the page of an APIC that is
    /// disabled or in x2APIC mode: all ones.
    pub fn read(&mut self, offset: u32, now: u64) -> u32 {
        if self.page().is_none() {
            return u32::MAX;
        }
        self.tick(now);
        if offset & 0xF != 0 {
            return 0; // "undefined": only the first four of sixteen bytes hold a register
        }
        let value = match offset {
            at::ID => Some(self.id << 24),
            at::APR => Some(u32::from(self.apr())),
            at::EOI | at::REMOTE_READ => Some(0),
            at::DFR => Some(self.dfr),
            at::ICR_HIGH => Some((self.icr >> 32) as u32),
            _ => self.common(offset, now),
        };
        value.unwrap_or_else(|| {
            self.note_error(esr::ILLEGAL_ADDRESS);
            0
        })
    }

    /// Registers that read alike in both modes.
    fn common(&self, offset: u32, now: u64) -> Option<u32> {
        let word = |set: &Vectors, from: u32| set.0[((offset - from) >> 4) as usize];
        Some(match offset {
            at::VERSION => VERSION,
            at::TPR => u32::from(self.tpr),
            at::PPR => u32::from(self.ppr()),
            at::LDR => self.logical_id(),
            at::SVR => self.svr,
            at::ISR..at::TMR => word(&self.isr, at::ISR),
            at::TMR..at::IRR => word(&self.tmr, at::TMR),
            at::IRR..at::ESR => word(&self.irr, at::IRR),
            at::ESR => self.esr,
            at::ICR => self.icr as u32,
            at::LVT..=at::LVT_LAST => self.lvt[((offset - at::LVT) >> 4) as usize],
            at::INITIAL => self.initial_count(),
            at::CURRENT => self.current_count(now),
            at::DIVIDE => self.divide(),
            _ => return None,
        })
    }

    /// The logical ID: software's in xAPIC mode, derived from the ID in x2APIC mode ("Logical
    /// x2APIC ID = [(x2APIC ID[19:4] << 16) | (1 << x2APIC ID[3:0])]").
    pub(super) fn logical_id(&self) -> u32 {
        if self.is_x2apic() { (self.id & 0xF_FFF0) << 12 | 1 << (self.id & 0xF) } else { self.ldr }
    }

    /// Write a register by its offset in the page.  Returns the ICR if an interrupt command
    /// leaves this APIC.
    pub fn write(&mut self, offset: u32, value: u32, now: u64) -> Option<u64> {
        self.page()?;
        self.tick(now);
        if offset & 0xF != 0 {
            return None;
        }
        match offset {
            at::ID | at::VERSION | at::APR | at::PPR | at::REMOTE_READ | at::CURRENT => {}
            at::ISR..at::ESR => {}
            at::LDR => self.ldr = value & 0xFF00_0000,
            at::DFR => self.dfr = value | 0x0FFF_FFFF,
            at::ICR => {
                self.icr = self.icr >> 32 << 32 | u64::from(value & ICR_LOW);
                return self.send();
            }
            at::ICR_HIGH => self.icr = self.icr & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32,
            _ if self.set_common(offset, value, now) => {}
            _ => self.note_error(esr::ILLEGAL_ADDRESS),
        }
        None
    }

    /// Registers that are written alike in both modes.  False: there is none.
    fn set_common(&mut self, offset: u32, value: u32, now: u64) -> bool {
        match offset {
            at::TPR => self.tpr = value as u8,
            at::EOI => self.end_of_interrupt(),
            at::SVR => self.set_svr(value & SVR_BITS),
            at::ESR => self.esr = std::mem::take(&mut self.errors),
            at::LVT..=at::LVT_LAST => self.set_entry(((offset - at::LVT) >> 4) as usize, value),
            at::INITIAL => self.set_initial_count(value, now),
            at::DIVIDE => self.set_divide(value, now),
            _ => return false,
        }
        true
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    fn set_entry(&mut self, index: usize, value: u32) {
        let old = self.lvt[index];
        let mut new = value & LVT_BITS[index] | old & lvt::REMOTE_IRR;
        if !self.is_software_enabled() {
            new |= lvt::MASKED;
        }
        if index == lvt::TIMER {
            return self.set_timer_entry(new);
        }
        if new & lvt::LEVEL == 0 {
            new &= !lvt::REMOTE_IRR;
        }
        self.lvt[index] = new;
        // A level that was there all along is seen when its entry is unmasked.
        if (lvt::LINT0..lvt::LINT0 + 2).contains(&index)
            && new & (lvt::LEVEL | lvt::MASKED) == lvt::LEVEL
            && new >> 8 & 7 == delivery::FIXED
        {
            self.sense(index - lvt::LINT0);
        }
    }

    /// IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC MSRs.  `None`: #GP(0).
    pub fn rdmsr(&mut self, index: u32, now: u64) -> Option<u64> {
        self.tick(now);
        match index {
            msr::IA32_APIC_BASE => Some(self.base),
            msr::IA32_TSC_DEADLINE => Some(self.tsc_deadline()),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() => {
                let offset = (index - msr::X2APIC_FIRST) << 4;
                match offset {
                    at::ID => Some(u64::from(self.id)),
                    at::ICR => Some(self.icr),
                    _ => self.common(offset, now).map(u64::from),
                }
            }
            _ => None,
        }
    }

    /// The reverse.  `None`: #GP(0); `Some(Some(icr))`: an interrupt command leaves this APIC.
    pub fn wrmsr(&mut self, index: u32, value: u64, now: u64) -> Option<Option<u64>> {
        self.tick(now);
        match index {
            msr::IA32_APIC_BASE => self.set_base(value).then_some(None),
            msr::IA32_TSC_DEADLINE => {
                self.set_tsc_deadline(value, now);
                Some(None)
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.is_x2apic() => {
                self.set_x2apic((index - msr::X2APIC_FIRST) << 4, value, now)
            }
            _ => None,
        }
    }

    /// "Reserved bits" of the x2APIC MSRs fault where those of the page are ignored.
    #[expect(clippy::option_option, reason = "refused, done, or done with a value to pass on")]
    fn set_x2apic(&mut self, offset: u32, value: u64, now: u64) -> Option<Option<u64>> {
        let allowed = match offset {
            at::TPR | at::SELF_IPI => 0xFF,
            at::EOI | at::ESR => 0,
            at::SVR => u64::from(SVR_BITS),
            at::ICR => u64::from(ICR_LOW) | 0xFFFF_FFFF << 32,
            at::LVT..=at::LVT_LAST => {
                let i = ((offset - at::LVT) >> 4) as usize;
                // The read-only bits, delivery status and remote IRR, may be written back.
                u64::from(LVT_BITS[i] | 1 << 12 | if LVT_BITS[i] & lvt::LEVEL != 0 { 1 << 14 } else { 0 })
            }
            at::INITIAL => 0xFFFF_FFFF,
            at::DIVIDE => 0xB,
            _ => return None,
        };
        if value & !allowed != 0 {
            return None;
        }
        match offset {
            at::ICR => {
                self.icr = value;
                return Some(self.send());
            }
            at::SELF_IPI => {
                let vector = value as u8;
                if vector < FIRST_VECTOR {
                    self.note_error(esr::SEND_ILLEGAL);
                } else {
                    self.raise_vector(vector, false);
                }
            }
            _ => {
                self.set_common(offset, value as u32, now);
            }
        }
        Some(None)
    }

    /// "x2APIC State Transitions": false (#GP) for reserved bits and illegal transitions.
    fn set_base(&mut self, value: u64) -> bool {
        const MODE: u64 = base::ENABLE | base::X2APIC;
        if value & BASE_RESERVED != 0 {
            return false;
        }
        let (old, new) = (self.base & MODE, value & MODE);
        let is_legal = match (old, new) {
            (_, base::X2APIC) => false,    // extended, but not enabled
            (MODE, base::ENABLE) => false, // x2APIC only ends by disabling
            (0, MODE) => false,            // x2APIC begins from xAPIC mode
            _ => true,
        };
        if !is_legal {
            return false;
        }
        if old != new && new == 0 {
            let pins = self.pins;
            *self = Self { pins, ..Self::new(self.id, false) };
        }
        if old == base::ENABLE && new == MODE {
            self.icr &= 0xFFFF_FFFF;
        }
        self.base = value;
        true
    }
}
