//! The local APIC (SDM 3A, "Advanced Programmable Interrupt Controller").

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    id: u32,
}

impl LocalApic {
    /// After reset.
    #[must_use]
    pub fn new(id: u32, _bootstrap: bool) -> Self {
        Self { id }
    }

    /// The TSC at which [`LocalApic::tick`] must next be called; `u64::MAX` if never.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        u64::MAX
    }

    /// Let the timer act on the time that has passed.
    pub fn tick(&mut self, _now: u64) {}

    /// The vector that would be delivered now.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        None
    }

    /// Interrupt acknowledge: moves the pending vector from IRR to ISR.
    pub fn accept(&mut self) -> Option<u8> {
        None
    }
}
