//! Interrupt commands: inter-processor interrupts (SDM 3A, "Issuing Interprocessor Interrupts").

use super::{FIRST_VECTOR, LocalApic, delivery, esr};

/// Shorthands, bits 19:18 of the ICR.
mod shorthand {
    pub const SELF: u32 = 1;
    pub const ALL: u32 = 2;
    pub const OTHERS: u32 = 3;
}

const LOGICAL: u32 = 1 << 11;
const LEVEL_ASSERT: u32 = 1 << 14;
const LEVEL_TRIGGER: u32 = 1 << 15;
const INIT: u32 = 5;
const START_UP: u32 = 6;

/// Who of the addressed is this APIC.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Only this one.
    Me,
    /// This one and perhaps others.
    MeToo,
    /// Not this one.
    NotMe,
}

impl LocalApic {
    /// The ICR was written.  Fixed and lowest-priority interrupts for this APIC are delivered
    /// here; the command is returned if it may concern *others* too, and always for NMI, INIT
    /// and the like, which concern processors and not APICs.
    pub(super) fn send(&mut self) -> Option<u64> {
        let low = self.icr as u32;
        let (vector, how) = (low as u8, low >> 8 & 7);
        let is_fixed = matches!(how, delivery::FIXED | delivery::LOWEST);
        if is_fixed && vector < FIRST_VECTOR {
            self.note_error(esr::SEND_ILLEGAL);
            return None;
        }
        let is_deassert = how == INIT && low & LEVEL_TRIGGER != 0 && low & LEVEL_ASSERT == 0;
        if is_deassert
            || !matches!(how, delivery::FIXED | delivery::LOWEST | 2 | delivery::NMI | INIT | START_UP)
        {
            return None; // the de-assert message does nothing on present-day processors
        }
        let reach = self.reach();
        if is_fixed && reach != Reach::NotMe {
            self.raise_vector(vector, false);
            // Of several candidates for lowest priority this APIC is as good as any.
            if reach == Reach::Me || how == delivery::LOWEST {
                return None;
            }
        }
        Some(self.icr)
    }

    /// Whether the interrupt command is an NMI for the processor of this APIC, too.
    #[must_use]
    pub fn commands_own_nmi(&self) -> bool {
        self.icr as u32 >> 8 & 7 == delivery::NMI && self.reach() != Reach::NotMe
    }

    fn reach(&self) -> Reach {
        let low = self.icr as u32;
        match low >> 18 & 3 {
            shorthand::SELF => return Reach::Me,
            shorthand::ALL => return Reach::MeToo,
            shorthand::OTHERS => return Reach::NotMe,
            _ => {}
        }
        let destination = (self.icr >> 32) as u32;
        let (destination, everyone) =
            if self.is_x2apic() { (destination, u32::MAX) } else { (destination >> 24, 0xFF) };
        if destination == everyone {
            return Reach::MeToo;
        }
        if low & LOGICAL == 0 {
            let is_me = destination == if self.is_x2apic() { self.id } else { self.id & 0xFF };
            return if is_me { Reach::Me } else { Reach::NotMe };
        }
        if self.is_named(destination) { Reach::MeToo } else { Reach::NotMe }
    }

    /// Whether a logical destination names this APIC ("Logical Destination Mode").
    fn is_named(&self, destination: u32) -> bool {
        if self.is_x2apic() {
            let own = self.logical_id();
            return destination >> 16 == own >> 16 && destination & own & 0xFFFF != 0;
        }
        let own = self.ldr >> 24;
        match self.dfr >> 28 {
            0xF => destination & own != 0,
            0 => (destination >> 4 == own >> 4 || destination >> 4 == 0xF) && destination & own & 0xF != 0,
            _ => false,
        }
    }
}
