//! VMX operation (SDM 3C and 3D).
//!
//! Reading order: [`controls`] (the control words), [`instructions`] (VMXON … INVVPID for the
//! host software outside), [`execute`] (the same for code in the machine), [`entry`] with its
//! checks, [`intercept`] and [`events`] (why a guest leaves), [`exit`] (how).
//!
//! Invariants: the VMCS is in memory, always whole; [`Vmx::controls`] equals its control fields
//! since the last VM entry that checked them; only control bits that work are in
//! [`capabilities`].

use crate::cpu::state::Core;

pub mod apic;
pub mod capabilities;
mod checks;
mod checks_guest;
mod checks_segments;
pub mod controls;
pub mod entry;
pub mod events;
pub mod execute;
pub mod exit;
pub mod instructions;
pub mod intercept;
mod msr_list;
pub mod space;
pub mod virtual_interrupts;

use controls::Controls;

/// No VMCS is current.
pub const NO_VMCS: u64 = u64::MAX;

/// The state of VMX operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmx {
    /// VMXON was executed.
    pub is_on: bool,
    /// In VMX non-root operation.
    pub non_root: bool,
    /// VM exits go to the caller of `run` (the host software is outside), not to code at the
    /// host RIP.
    pub is_host_outside: bool,
    /// The VPID in use: 0 in root operation and without "enable VPID".
    pub vpid: u16,
    /// The EPT pointer in use; 0 when EPT is off.
    pub eptp: u64,
    /// The VMXON region.
    pub vmxon_region: u64,
    /// The current VMCS, or [`NO_VMCS`].
    pub current: u64,
    /// The control fields at the last VM entry.
    pub controls: Controls,
    /// A control or host field may differ from what the last VM entry checked.
    pub is_stale: bool,
    /// Whether the host was in IA-32e mode when its state passed the checks.
    pub checked_long: bool,
    /// TSC at which the preemption timer expires; `u64::MAX` when it is off.
    pub timer: u64,
    /// Physical blocking by NMI while the guest's own is virtual ("virtual NMIs").
    pub host_nmi_blocked: bool,
    /// "Monitor trap flag": (retired, RIP) when the instruction to watch began; an exit is due
    /// once either differs.  (`u64::MAX`, …) means due at once.
    pub mtf: Option<(u64, u64)>,
    /// A trap-like VM exit that waits for the end of the instruction: (reason, qualification).
    pub trap_exit: Option<(u32, u64)>,
    /// A pending virtual interrupt is recognized.
    pub is_recognized: bool,
    /// RFLAGS as the old TSS would get them from the task switch that is about to exit.
    pub task_flags: u64,
    /// PAUSE-loop exiting: TSC of the first and of the last PAUSE of the loop.
    pub pause_loop: (u64, u64),
    /// The rule that the last failed VM entry broke, in words.
    pub complaint: &'static str,
}

impl Default for Vmx {
    fn default() -> Self {
        Self {
            is_on: false,
            non_root: false,
            is_host_outside: false,
            vpid: 0,
            eptp: 0,
            vmxon_region: 0,
            current: NO_VMCS,
            controls: Controls::default(),
            is_stale: true,
            checked_long: false,
            timer: u64::MAX,
            host_nmi_blocked: false,
            mtf: None,
            task_flags: 0,
            trap_exit: None,
            is_recognized: false,
            pause_loop: (0, 0),
            complaint: "",
        }
    }
}

impl Vmx {
    /// All of it but the complaint and a task switch under way, as numbers, for saving a processor.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        let flags = [
            self.is_on,
            self.non_root,
            self.is_host_outside,
            self.is_stale,
            self.checked_long,
            self.host_nmi_blocked,
            self.is_recognized,
        ];
        let mut words: Vec<u64> = flags.iter().map(|&b| u64::from(b)).collect();
        let (retired, rip) = self.mtf.unwrap_or_default();
        let (reason, qualification) = self.trap_exit.unwrap_or_default();
        words.extend([
            u64::from(self.vpid),
            self.eptp,
            self.vmxon_region,
            self.current,
            self.timer,
            u64::from(self.mtf.is_some()),
            retired,
            rip,
            u64::from(self.trap_exit.is_some()),
            u64::from(reason),
            qualification,
            self.pause_loop.0,
            self.pause_loop.1,
        ]);
        words.extend(self.controls.to_words());
        words
    }

    /// The reverse of [`Vmx::to_words`]; `None` if there are too few words.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let [on, guest, outside, stale, long, nmi, recognized, vpid, eptp, region, current, timer, rest @ ..] =
            words
        else {
            return None;
        };
        let [mtf, retired, rip, trap, reason, qualification, first, last, rest @ ..] = rest else {
            return None;
        };
        Some(Self {
            is_on: *on != 0,
            non_root: *guest != 0,
            is_host_outside: *outside != 0,
            is_stale: *stale != 0,
            checked_long: *long != 0,
            host_nmi_blocked: *nmi != 0,
            is_recognized: *recognized != 0,
            vpid: *vpid as u16,
            eptp: *eptp,
            vmxon_region: *region,
            current: *current,
            timer: *timer,
            mtf: (*mtf != 0).then_some((*retired, *rip)),
            trap_exit: (*trap != 0).then_some((*reason as u32, *qualification)),
            task_flags: 0, // never kept: the exit follows at once
            pause_loop: (*first, *last),
            controls: Controls::from_words(rest)?,
            complaint: "",
        })
    }

    /// Whether IRET ends blocking by NMI (SDM 3C, "Changes to Instruction Behavior in VMX Non-Root
    /// Operation"): not in a guest with NMI exiting but without virtual NMIs.
    #[must_use]
    pub fn is_nmi_unblocked_by_iret(&self) -> bool {
        use controls::pin;
        !self.non_root || !self.controls.pin(pin::NMI_EXITING) || self.controls.pin(pin::VIRTUAL_NMIS)
    }

    /// Whether RDTSCP and RDPID exist here and now ("enable RDTSCP").
    #[must_use]
    pub fn has_rdtscp(&self) -> bool {
        !self.non_root || self.controls.secondary(controls::secondary::ENABLE_RDTSCP)
    }

    /// Whether XSAVES and XRSTORS exist here and now ("enable XSAVES/XRSTORS").
    #[must_use]
    pub fn has_xsaves(&self) -> bool {
        !self.non_root || self.controls.secondary(controls::secondary::ENABLE_XSAVES)
    }

    /// Whether CR0.PE and CR0.PG are free ("unrestricted guest").
    #[must_use]
    pub fn is_unrestricted(&self) -> bool {
        self.non_root && self.controls.secondary(controls::secondary::UNRESTRICTED_GUEST)
    }
}

impl Core {
    /// A field of the current VMCS, in its width whatever the memory holds.
    #[inline(always)]
    pub(crate) fn vmcs(&self, field: u32) -> u64 {
        let at = self.vmx.current.wrapping_add(crate::arch::vmcs::offset(field));
        self.mem.load(at, 8) & crate::arch::vmcs::mask_of(field)
    }

    /// Set a field of the current VMCS.
    #[inline(always)]
    pub(crate) fn set_vmcs(&self, field: u32, value: u64) {
        self.mem.store(self.vmx.current.wrapping_add(crate::arch::vmcs::offset(field)), 8, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_words_bring_everything_back() {
        let mut v = Vmx { is_on: true, vpid: 7, eptp: 0x1234_501E, current: 0x5000, ..Vmx::default() };
        v.mtf = Some((3, 4));
        v.trap_exit = Some((43, 9));
        v.is_recognized = true;
        v.controls.vpid = 5;
        v.controls.entry_load_count = 6;
        let words = v.to_words();
        assert_eq!(Some(v), Vmx::from_words(&words));
        assert_eq!(None, Vmx::from_words(&words[..words.len() - 1]));
    }
}
