//! The control words of the VMCS (SDM 3C, "VM-Execution Control Fields", "VM-Exit Control
//! Fields", "VM-Entry Control Fields"), and their cached copy.

use crate::arch::vmcs as f;
use crate::cpu::state::Core;

/// Pin-based VM-execution controls.
pub mod pin {
    #![allow(missing_docs)]
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    pub const NMI_EXITING: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const ACTIVATE_PREEMPTION_TIMER: u32 = 1 << 6;
    pub const PROCESS_POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls.
pub mod primary {
    #![allow(missing_docs)]
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    pub const USE_TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT_EXITING: u32 = 1 << 7;
    pub const INVLPG_EXITING: u32 = 1 << 9;
    pub const MWAIT_EXITING: u32 = 1 << 10;
    pub const RDPMC_EXITING: u32 = 1 << 11;
    pub const RDTSC_EXITING: u32 = 1 << 12;
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    pub const USE_TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    pub const USE_IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP_FLAG: u32 = 1 << 27;
    pub const USE_MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR_EXITING: u32 = 1 << 29;
    pub const PAUSE_EXITING: u32 = 1 << 30;
    pub const ACTIVATE_SECONDARY_CONTROLS: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
pub mod secondary {
    #![allow(missing_docs)]
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    pub const ENABLE_EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    pub const ENABLE_RDTSCP: u32 = 1 << 3;
    pub const VIRTUALIZE_X2APIC_MODE: u32 = 1 << 4;
    pub const ENABLE_VPID: u32 = 1 << 5;
    pub const WBINVD_EXITING: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const APIC_REGISTER_VIRTUALIZATION: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    pub const RDRAND_EXITING: u32 = 1 << 11;
    pub const ENABLE_INVPCID: u32 = 1 << 12;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const RDSEED_EXITING: u32 = 1 << 16;
    pub const ENABLE_PML: u32 = 1 << 17;
    pub const ENABLE_XSAVES: u32 = 1 << 20;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const USE_TSC_SCALING: u32 = 1 << 25;
}

/// VM-exit controls.
pub mod exit {
    #![allow(missing_docs)]
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    pub const ACKNOWLEDGE_INTERRUPT_ON_EXIT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION_TIMER: u32 = 1 << 22;
    pub const LOAD_PKRS: u32 = 1 << 29;
}

/// VM-entry controls.
pub mod entry {
    #![allow(missing_docs)]
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
    pub const LOAD_PKRS: u32 = 1 << 22;
}

macro_rules! controls {
    ($($(#[$doc:meta])* $name:ident: $field:ident,)*) => {
        /// The control fields as read at the last VM entry: what the interpreter's checks look at.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Controls {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Controls {
            /// How many words a saved copy has.
            pub const WORDS: usize = [$(stringify!($name)),*].len();

            /// Read them from the current VMCS.
            pub(crate) fn read(core: &Core) -> Self {
                let mut c = Self { $($name: core.vmcs(f::$field),)* };
                if c.primary & u64::from(primary::ACTIVATE_SECONDARY_CONTROLS) == 0 {
                    c.secondary = 0;
                }
                c
            }

            /// For saving a processor.
            #[must_use]
            pub fn to_words(&self) -> Vec<u64> {
                vec![$(self.$name),*]
            }

            /// The reverse of [`Controls::to_words`]; `None` if there are too few.
            #[must_use]
            pub fn from_words(words: &[u64]) -> Option<Self> {
                let mut words = words.iter().copied();
                Some(Self { $($name: words.next()?,)* })
            }
        }
    };
}

controls! {
    /// Pin-based controls.
    pin: PIN_CONTROLS,
    /// Primary processor-based controls.
    primary: PRIMARY_CONTROLS,
    /// Secondary processor-based controls; 0 if they are not activated.
    secondary: SECONDARY_CONTROLS,
    /// VM-exit controls.
    exit: EXIT_CONTROLS,
    /// VM-entry controls.
    entry: ENTRY_CONTROLS,
    /// Exception bitmap.
    exception_bitmap: EXCEPTION_BITMAP,
    /// Page-fault error-code mask.
    pf_mask: PAGE_FAULT_ERROR_CODE_MASK,
    /// Page-fault error-code match.
    pf_match: PAGE_FAULT_ERROR_CODE_MATCH,
    /// Guest/host mask of CR0.
    cr0_mask: CR0_GUEST_HOST_MASK,
    /// Read shadow of CR0.
    cr0_shadow: CR0_READ_SHADOW,
    /// Guest/host mask of CR4.
    cr4_mask: CR4_GUEST_HOST_MASK,
    /// Read shadow of CR4.
    cr4_shadow: CR4_READ_SHADOW,
    /// CR3-target count.
    cr3_targets: CR3_TARGET_COUNT,
    /// CR3-target value 0.
    cr3_target0: CR3_TARGET_VALUE_0,
    /// CR3-target value 1.
    cr3_target1: CR3_TARGET_VALUE_1,
    /// CR3-target value 2.
    cr3_target2: CR3_TARGET_VALUE_2,
    /// CR3-target value 3.
    cr3_target3: CR3_TARGET_VALUE_3,
    /// I/O bitmap A.
    io_bitmap_a: IO_BITMAP_A,
    /// I/O bitmap B.
    io_bitmap_b: IO_BITMAP_B,
    /// MSR bitmaps.
    msr_bitmaps: MSR_BITMAPS,
    /// PML address.
    pml_address: PML_ADDRESS,
    /// TSC offset.
    tsc_offset: TSC_OFFSET,
    /// XSS-exiting bitmap.
    xss_exiting: XSS_EXITING_BITMAP,
    /// TSC multiplier.
    tsc_multiplier: TSC_MULTIPLIER,
    /// Virtual-APIC address.
    virtual_apic: VIRTUAL_APIC_ADDRESS,
    /// APIC-access address.
    apic_access: APIC_ACCESS_ADDRESS,
    /// EOI-exit bitmap, vectors 0 to 63.
    eoi_exit_0: EOI_EXIT_BITMAP_0,
    /// EOI-exit bitmap, vectors 64 to 127.
    eoi_exit_1: EOI_EXIT_BITMAP_1,
    /// EOI-exit bitmap, vectors 128 to 191.
    eoi_exit_2: EOI_EXIT_BITMAP_2,
    /// EOI-exit bitmap, vectors 192 to 255.
    eoi_exit_3: EOI_EXIT_BITMAP_3,
    /// Posted-interrupt notification vector.
    notification_vector: POSTED_INTERRUPT_NOTIFICATION_VECTOR,
    /// Posted-interrupt descriptor address.
    posted_descriptor: POSTED_INTERRUPT_DESCRIPTOR,
    /// VMREAD bitmap.
    vmread_bitmap: VMREAD_BITMAP,
    /// VMWRITE bitmap.
    vmwrite_bitmap: VMWRITE_BITMAP,
    /// TPR threshold.
    tpr_threshold: TPR_THRESHOLD,
    /// PLE gap.
    ple_gap: PLE_GAP,
    /// PLE window.
    ple_window: PLE_WINDOW,
    /// EPT pointer.
    eptp: EPT_POINTER,
    /// Virtual-processor identifier.
    vpid: VPID,
    /// VM-exit MSR-store count.
    exit_store_count: EXIT_MSR_STORE_COUNT,
    /// VM-exit MSR-load count.
    exit_load_count: EXIT_MSR_LOAD_COUNT,
    /// VM-entry MSR-load count.
    entry_load_count: ENTRY_MSR_LOAD_COUNT,
}

impl Controls {
    /// Whether a pin-based control is 1.
    #[inline]
    #[must_use]
    pub fn pin(&self, bit: u32) -> bool {
        self.pin & u64::from(bit) != 0
    }
    /// Whether a primary control is 1.
    #[inline]
    #[must_use]
    pub fn primary(&self, bit: u32) -> bool {
        self.primary & u64::from(bit) != 0
    }
    /// Whether a secondary control is 1.
    #[inline]
    #[must_use]
    pub fn secondary(&self, bit: u32) -> bool {
        self.secondary & u64::from(bit) != 0
    }
    /// Whether a VM-exit control is 1.
    #[inline]
    #[must_use]
    pub fn exit(&self, bit: u32) -> bool {
        self.exit & u64::from(bit) != 0
    }
    /// Whether a VM-entry control is 1.
    #[inline]
    #[must_use]
    pub fn entry(&self, bit: u32) -> bool {
        self.entry & u64::from(bit) != 0
    }
}
