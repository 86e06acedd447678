//! The local APIC (SDM 3A, "Advanced Programmable Interrupt Controller").
//!
//! Here: its state and the way of an interrupt from request (IRR) over service (ISR) to its end
//! (EOI).  [`registers`] is what software sees of it, [`timer`] the timer, [`command`] interrupt
//! commands (IPIs).
//!
//! The APIC keeps no clock: times are TSC ticks, handed in.  The timer's input clock is the TSC,
//! at 1 GHz.
//!
//! Invariants: while the software-enable bit of SVR is clear, every LVT entry is masked; while
//! the APIC is disabled in IA32_APIC_BASE, its registers have their reset values.

mod command;
mod registers;
#[cfg(test)]
mod tests;
mod timer;

use timer::Timer;

/// IA32_APIC_BASE ("Local APIC Status and Location").
pub mod base {
    #![allow(missing_docs)]
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
    /// Where the page is after reset.
    pub const RESET: u64 = 0xFEE0_0000;
}

/// Entries of the local vector table, in the order of their registers.
mod lvt {
    pub const TIMER: usize = 0;
    pub const PERFORMANCE: usize = 2;
    pub const LINT0: usize = 3;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
    pub const REMOTE_IRR: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;
}

/// Bits of the error status register ("Error Handling").
mod esr {
    pub const SEND_ILLEGAL: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL: u32 = 1 << 6;
    pub const ILLEGAL_ADDRESS: u32 = 1 << 7;
}

/// Delivery modes.
mod delivery {
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1;
    pub const NMI: u32 = 4;
    pub const EXTINT: u32 = 7;
}

const SVR_ENABLE: u32 = 1 << 8;
const SVR_RESET: u32 = 0xFF;
/// Vectors below this one are illegal in interrupt messages.
const FIRST_VECTOR: u8 = 16;

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, v: u8, on: bool) {
        let (word, bit) = (&mut self.0[usize::from(v / 32)], 1 << (v % 32));
        if on {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }
    fn has(&self, v: u8) -> bool {
        self.0[usize::from(v / 32)] >> (v % 32) & 1 != 0
    }
    /// The highest vector whose bit is set.
    fn highest(&self) -> Option<u8> {
        (0..8).rev().find(|&i| self.0[i] != 0).map(|i| (i as u32 * 32 + self.0[i].ilog2()) as u8)
    }
}

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    id: u32,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    esr: u32,
    /// Errors since ESR was last written.
    errors: u32,
    icr: u64,
    lvt: [u32; lvt::COUNT],
    timer: Timer,
    /// Level-triggered vectors that ended since `take_eois`.
    eois: Vectors,
    /// Whether LINT0, LINT1 are asserted.
    pins: [bool; 2],
    /// A local NMI since `take_nmi`.
    nmi: bool,
}

impl LocalApic {
    /// After reset.  `bootstrap`: it belongs to the processor that starts first.
    #[must_use]
    pub fn new(id: u32, bootstrap: bool) -> Self {
        Self {
            id,
            base: base::RESET | base::ENABLE | if bootstrap { base::BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: SVR_RESET,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; lvt::COUNT],
            timer: Timer::default(),
            eois: Vectors::default(),
            pins: [false; 2],
            nmi: false,
        }
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Whether the register page is there, and where.
    #[must_use]
    pub fn page(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & !0xFFF)
    }

    /// Whether IA32_APIC_BASE enables it.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.base & base::ENABLE != 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    fn is_software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    /// The task-priority register, all eight bits.
    #[must_use]
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Set the task-priority register (MOV to CR8 sets bits 7:4).
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    /// The processor-priority register: the higher class of TPR and the interrupt in service.
    #[must_use]
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xF0;
        if self.tpr & 0xF0 >= in_service { self.tpr } else { in_service }
    }

    /// The arbitration-priority register, as its pseudocode has it.
    fn apr(&self) -> u8 {
        let class = |v: Option<u8>| v.unwrap_or(0) & 0xF0;
        let (request, service) = (class(self.irr.highest()), class(self.isr.highest()));
        if self.tpr & 0xF0 >= request && self.tpr & 0xF0 > service {
            self.tpr
        } else {
            (self.tpr & 0xF0 & service).max(request)
        }
    }

    /// The vector that would be delivered now.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        self.irr.highest().filter(|v| v & 0xF0 > self.ppr() & 0xF0)
    }

    /// Interrupt acknowledge: moves the pending vector from IRR to ISR.
    pub fn accept(&mut self) -> Option<u8> {
        let v = self.pending()?;
        self.irr.set(v, false);
        self.isr.set(v, true);
        Some(v)
    }

    /// The vector that an acknowledge yields when nothing is pending any more ("Spurious
    /// Interrupt").
    #[must_use]
    pub fn spurious(&self) -> u8 {
        self.svr as u8
    }

    /// An interrupt message with fixed delivery arrives.
    pub fn raise_vector(&mut self, vector: u8, level: bool) {
        if !self.is_enabled() || !self.is_software_enabled() {
            return;
        }
        if vector < FIRST_VECTOR {
            return self.note_error(esr::RECEIVE_ILLEGAL);
        }
        self.request(vector, level);
    }

    fn request(&mut self, vector: u8, level: bool) {
        self.irr.set(vector, true);
        self.tmr.set(vector, level);
    }

    /// An error: remembered for ESR, and the error interrupt if it is a new one.
    fn note_error(&mut self, bit: u32) {
        let is_new = self.errors & bit == 0;
        self.errors |= bit;
        let entry = self.lvt[lvt::ERROR];
        if is_new && entry & lvt::MASKED == 0 {
            let vector = entry as u8;
            if vector < FIRST_VECTOR {
                self.errors |= esr::RECEIVE_ILLEGAL;
            } else {
                self.request(vector, false);
            }
        }
    }

    /// The end of the interrupt with the highest priority in service.
    pub fn end_of_interrupt(&mut self) {
        let Some(v) = self.isr.highest() else { return };
        self.isr.set(v, false);
        if !self.tmr.has(v) {
            return;
        }
        self.eois.set(v, true);
        for pin in 0..2 {
            let entry = &mut self.lvt[lvt::LINT0 + pin];
            if *entry & lvt::REMOTE_IRR != 0 && *entry as u8 == v {
                *entry &= !lvt::REMOTE_IRR;
                self.sense(pin);
            }
        }
    }

    /// Whether the end of the interrupt in service brings nothing about but that it has ended:
    /// no other waits for it, and no I/O APIC is to be told.
    #[must_use]
    pub fn ends_quietly(&self) -> bool {
        self.irr == Vectors::default() && self.isr.highest().is_some_and(|v| !self.tmr.has(v))
    }

    /// Level-triggered vectors whose EOI is to be broadcast to I/O APICs, ascending, each once.
    pub fn take_eois(&mut self) -> Vec<u8> {
        let ended = std::mem::take(&mut self.eois);
        if ended == Vectors::default() {
            return Vec::new();
        }
        (0..=255).filter(|&v| ended.has(v)).collect()
    }

    /// LINT0 or LINT1 (`pin` 0 or 1) is driven.
    pub fn lint(&mut self, pin: usize, asserted: bool) {
        let Some(old) = self.pins.get_mut(pin) else { return };
        let is_edge = asserted && !*old;
        *old = asserted;
        if asserted && (is_edge || self.lvt[lvt::LINT0 + pin] & lvt::LEVEL != 0) {
            self.sense(pin);
        }
    }

    /// Act on a pin if it is asserted, as its entry says.
    fn sense(&mut self, pin: usize) {
        let entry = self.lvt[lvt::LINT0 + pin];
        if !self.pins[pin] || !self.is_enabled() || entry & lvt::MASKED != 0 {
            return;
        }
        match entry >> 8 & 7 {
            delivery::NMI => self.nmi = true,
            delivery::FIXED if entry & lvt::LEVEL == 0 => self.raise_vector(entry as u8, false),
            delivery::FIXED if entry & lvt::REMOTE_IRR == 0 => {
                self.lvt[lvt::LINT0 + pin] |= lvt::REMOTE_IRR;
                self.raise_vector(entry as u8, true);
            }
            _ => {}
        }
    }

    /// The performance counters interrupt: their entry is masked until software clears that.
    pub fn performance_interrupt(&mut self) {
        let entry = self.lvt[lvt::PERFORMANCE];
        if !self.is_enabled() || entry & lvt::MASKED != 0 {
            return;
        }
        self.lvt[lvt::PERFORMANCE] |= lvt::MASKED;
        match entry >> 8 & 7 {
            delivery::NMI => self.nmi = true,
            delivery::FIXED => self.raise_vector(entry as u8, false),
            _ => {}
        }
    }

    /// Whether a local NMI came since last asked (LINT1 on a PC, performance counters).
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether LVT LINT0 (or a disabled APIC) lets the 8259's interrupt through.
    #[must_use]
    pub fn is_extint_open(&self) -> bool {
        let entry = self.lvt[lvt::LINT0];
        !self.is_enabled() || (entry & lvt::MASKED == 0 && entry >> 8 & 7 == delivery::EXTINT)
    }

    /// All of it as numbers, for saving.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        let mut words = vec![
            u64::from(self.id),
            self.base,
            u64::from(self.tpr),
            u64::from(self.ldr),
            u64::from(self.dfr),
            u64::from(self.svr),
            u64::from(self.esr),
            u64::from(self.errors),
            self.icr,
            u64::from(self.pins[0]) | u64::from(self.pins[1]) << 1 | u64::from(self.nmi) << 2,
        ];
        words.extend(self.timer.to_words());
        for set in [&self.isr, &self.tmr, &self.irr, &self.eois] {
            words.extend(set.0.iter().map(|&w| u64::from(w)));
        }
        words.extend(self.lvt.iter().map(|&w| u64::from(w)));
        words
    }

    /// The reverse of [`LocalApic::to_words`]; `None` unless it is exactly that many words and
    /// they are a state that an APIC can have.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let [id, base, tpr, ldr, dfr, svr, esr, errors, icr, bits, rest @ ..] = words else {
            return None;
        };
        let (timer, rest) = rest.split_at_checked(timer::WORDS)?;
        let rest = <&[u64; 32 + lvt::COUNT]>::try_from(rest).ok()?;
        let mut numbers = [0_u32; 32 + lvt::COUNT];
        for (n, &w) in numbers.iter_mut().zip(rest) {
            *n = u32::try_from(w).ok()?;
        }
        let set = |i: usize| {
            let mut v = Vectors::default();
            v.0.copy_from_slice(&numbers[8 * i..8 * i + 8]);
            v
        };
        let modes = base & (base::ENABLE | base::X2APIC);
        if modes == base::X2APIC || base & registers::BASE_RESERVED != 0 || *bits > 7 {
            return None;
        }
        let mut lvt = [0; lvt::COUNT];
        lvt.copy_from_slice(&numbers[32..]);
        let small = |w: &u64| u32::try_from(*w).ok();
        Some(Self {
            id: small(id)?,
            base: *base,
            tpr: u8::try_from(*tpr).ok()?,
            ldr: small(ldr)?,
            dfr: small(dfr)?,
            svr: small(svr)?,
            isr: set(0),
            tmr: set(1),
            irr: set(2),
            esr: small(esr)?,
            errors: small(errors)?,
            icr: *icr,
            lvt,
            timer: Timer::from_words(timer)?,
            eois: set(3),
            pins: [bits & 1 != 0, bits & 2 != 0],
            nmi: bits & 4 != 0,
        })
    }
}
