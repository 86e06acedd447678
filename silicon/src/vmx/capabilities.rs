//! What VMX this processor offers (SDM 3D, "VMX Capability Reporting Facility").
//!
//! A control that does not work is not advertised.  Not offered: IPI virtualization, VM functions,
//! #VE, the activity states shutdown and wait-for-SIPI.  The words here are also what the entry
//! checks hold control fields against.

use crate::arch::bits::cr4;
use crate::arch::vmcs::{self, REVISION};
use crate::vmx::controls::{entry, exit, pin, primary, secondary};

/// What settings of a control word are allowed: bits that must be 1, bits that may be 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// These must be 1 ("default1" without those that the TRUE MSRs free).
    pub must: u32,
    /// These must be 1 for software that does not read the TRUE MSRs.
    pub default1: u32,
    /// These work; the others may not be 1.
    pub may: u32,
}

impl Allowed {
    const fn new(default1: u32, free: u32, features: u32) -> Self {
        Self { must: default1 & !free, default1, may: default1 | features }
    }
    /// Whether a control word is allowed.
    #[must_use]
    pub fn permits(&self, word: u64) -> bool {
        word & u64::from(self.must) == u64::from(self.must) && word & !u64::from(self.may) == 0
    }
    fn msr(self) -> u64 {
        u64::from(self.may) << 32 | u64::from(self.default1)
    }
    fn true_msr(self) -> u64 {
        u64::from(self.may) << 32 | u64::from(self.must)
    }
}

/// Pin-based controls.
pub const PIN: Allowed = Allowed::new(
    0x16,
    0,
    pin::EXTERNAL_INTERRUPT_EXITING
        | pin::NMI_EXITING
        | pin::VIRTUAL_NMIS
        | pin::ACTIVATE_PREEMPTION_TIMER
        | pin::PROCESS_POSTED_INTERRUPTS,
);

/// Primary processor-based controls.
pub const PRIMARY: Allowed = Allowed::new(
    0x0401_E172,
    primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING,
    primary::INTERRUPT_WINDOW_EXITING
        | primary::USE_TSC_OFFSETTING
        | primary::HLT_EXITING
        | primary::INVLPG_EXITING
        | primary::MWAIT_EXITING
        | primary::RDPMC_EXITING
        | primary::RDTSC_EXITING
        | primary::CR8_LOAD_EXITING
        | primary::CR8_STORE_EXITING
        | primary::USE_TPR_SHADOW
        | primary::NMI_WINDOW_EXITING
        | primary::MOV_DR_EXITING
        | primary::UNCONDITIONAL_IO_EXITING
        | primary::USE_IO_BITMAPS
        | primary::MONITOR_TRAP_FLAG
        | primary::USE_MSR_BITMAPS
        | primary::MONITOR_EXITING
        | primary::PAUSE_EXITING
        | primary::ACTIVATE_SECONDARY_CONTROLS,
);

/// Secondary processor-based controls.
pub const SECONDARY: Allowed = Allowed::new(
    0,
    0,
    secondary::VIRTUALIZE_APIC_ACCESSES
        | secondary::ENABLE_EPT
        | secondary::DESCRIPTOR_TABLE_EXITING
        | secondary::ENABLE_RDTSCP
        | secondary::VIRTUALIZE_X2APIC_MODE
        | secondary::ENABLE_VPID
        | secondary::WBINVD_EXITING
        | secondary::UNRESTRICTED_GUEST
        | secondary::APIC_REGISTER_VIRTUALIZATION
        | secondary::VIRTUAL_INTERRUPT_DELIVERY
        | secondary::PAUSE_LOOP_EXITING
        | secondary::RDRAND_EXITING
        | secondary::ENABLE_INVPCID
        | secondary::VMCS_SHADOWING
        | secondary::RDSEED_EXITING
        | secondary::ENABLE_PML
        | secondary::MODE_BASED_EXECUTE
        | secondary::ENABLE_XSAVES
        | secondary::USE_TSC_SCALING,
);

/// VM-exit controls.
pub const EXIT: Allowed = Allowed::new(
    0x0003_6DFF,
    exit::SAVE_DEBUG_CONTROLS,
    exit::HOST_ADDRESS_SPACE_SIZE
        | exit::LOAD_PERF_GLOBAL_CTRL
        | exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT
        | exit::SAVE_PAT
        | exit::LOAD_PAT
        | exit::SAVE_EFER
        | exit::LOAD_EFER
        | exit::SAVE_PREEMPTION_TIMER
        | exit::LOAD_PKRS,
);

/// VM-entry controls.
pub const ENTRY: Allowed = Allowed::new(
    0x11FF,
    entry::LOAD_DEBUG_CONTROLS,
    entry::IA32E_MODE_GUEST
        | entry::LOAD_PERF_GLOBAL_CTRL
        | entry::LOAD_PAT
        | entry::LOAD_EFER
        | entry::LOAD_PKRS,
);

/// CR3-target values.
pub const CR3_TARGETS: u64 = 4;
/// CR0 bits that must be 1 in VMX operation: PE, NE, PG.
pub const CR0_FIXED0: u64 = 0x8000_0021;
/// CR0 bits that may be 1.
pub const CR0_FIXED1: u64 = 0xFFFF_FFFF;
/// CR4 bits that must be 1 in VMX operation.
pub const CR4_FIXED0: u64 = cr4::VMXE;
/// CR4 bits that may be 1.
pub const CR4_FIXED1: u64 = cr4::KNOWN;

const EXECUTE_ONLY: u64 = 1 << 0;
const WALK_4: u64 = 1 << 6;
const MEMTYPE_UC: u64 = 1 << 8;
const MEMTYPE_WB: u64 = 1 << 14;
const PAGE_2M: u64 = 1 << 16;
const PAGE_1G: u64 = 1 << 17;
const INVEPT: u64 = 1 << 20;
const ACCESSED_DIRTY: u64 = 1 << 21;
const INVEPT_TYPES: u64 = 3 << 25;
const INVVPID: u64 = 1 << 32;
const INVVPID_TYPES: u64 = 0xF << 40;

/// A VMX capability MSR; `None` if this processor has none with that index.
#[must_use]
pub fn read(index: u32) -> Option<u64> {
    let highest = vmcs::FIELDS.iter().map(|f| f.0 & 0x3FE).max().unwrap_or(0);
    Some(match index {
        // Region size 4096, memory type WB, instruction information of INS and OUTS, TRUE MSRs.
        0x480 => u64::from(REVISION) | 4096 << 32 | 6 << 50 | 1 << 54 | 1 << 55,
        0x481 => PIN.msr(),
        0x482 => PRIMARY.msr(),
        0x483 => EXIT.msr(),
        0x484 => ENTRY.msr(),
        // Timer rate 2^0, exits store EFER.LMA, activity state HLT, CR3 targets.
        0x485 => 1 << 5 | 1 << 6 | CR3_TARGETS << 16,
        0x486 => CR0_FIXED0,
        0x487 => CR0_FIXED1,
        0x488 => CR4_FIXED0,
        0x489 => CR4_FIXED1,
        0x48A => u64::from(highest),
        0x48B => SECONDARY.msr(),
        0x48C => {
            EXECUTE_ONLY
                | WALK_4
                | MEMTYPE_UC
                | MEMTYPE_WB
                | PAGE_2M
                | PAGE_1G
                | INVEPT
                | ACCESSED_DIRTY
                | INVEPT_TYPES
                | INVVPID
                | INVVPID_TYPES
        }
        0x48D => PIN.true_msr(),
        0x48E => PRIMARY.true_msr(),
        0x48F => EXIT.true_msr(),
        0x490 => ENTRY.true_msr(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plain_msrs_ask_for_default1_and_the_true_ones_free_exactly_four_controls() {
        let freed: Vec<u32> = [(0x481, 0x48D), (0x482, 0x48E), (0x483, 0x48F), (0x484, 0x490)]
            .map(|(plain, exact)| (read(plain).unwrap() ^ read(exact).unwrap()) as u32)
            .to_vec();
        assert_eq!(vec![0, 3 << 15, 1 << 2, 1 << 2], freed);
    }

    #[test]
    fn msrs_of_features_that_are_not_offered_do_not_exist() {
        assert!((0x480..=0x490).all(|i| read(i).is_some()));
        assert_eq!((None, None), (read(0x491), read(0x492)));
    }
}
