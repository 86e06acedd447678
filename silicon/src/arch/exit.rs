//! Why execution stopped: VM exits by the SDM's basic exit reasons, and the machine's own stops.

/// Basic exit reasons (SDM 3D, "VMX Basic Exit Reasons").
pub mod reason {
    #![allow(missing_docs)]
    pub const EXCEPTION_OR_NMI: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const SIPI: u32 = 4;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const TASK_SWITCH: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const INVLPG: u32 = 14;
    pub const RDPMC: u32 = 15;
    pub const RDTSC: u32 = 16;
    pub const RSM: u32 = 17;
    pub const VMCALL: u32 = 18;
    pub const VMCLEAR: u32 = 19;
    pub const VMLAUNCH: u32 = 20;
    pub const VMPTRLD: u32 = 21;
    pub const VMPTRST: u32 = 22;
    pub const VMREAD: u32 = 23;
    pub const VMRESUME: u32 = 24;
    pub const VMWRITE: u32 = 25;
    pub const VMXOFF: u32 = 26;
    pub const VMXON: u32 = 27;
    pub const CR_ACCESS: u32 = 28;
    pub const MOV_DR: u32 = 29;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const ENTRY_GUEST_STATE: u32 = 33;
    pub const ENTRY_MSR_LOAD: u32 = 34;
    pub const MWAIT: u32 = 36;
    pub const MTF: u32 = 37;
    pub const MONITOR: u32 = 39;
    pub const PAUSE: u32 = 40;
    pub const TPR_BELOW_THRESHOLD: u32 = 43;
    pub const APIC_ACCESS: u32 = 44;
    pub const VIRTUALIZED_EOI: u32 = 45;
    pub const GDTR_IDTR: u32 = 46;
    pub const LDTR_TR: u32 = 47;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIG: u32 = 49;
    pub const INVEPT: u32 = 50;
    pub const RDTSCP: u32 = 51;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const INVVPID: u32 = 53;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
    pub const APIC_WRITE: u32 = 56;
    pub const RDRAND: u32 = 57;
    pub const INVPCID: u32 = 58;
    pub const VMFUNC: u32 = 59;
    pub const RDSEED: u32 = 61;
    pub const PML_FULL: u32 = 62;
    pub const XSAVES: u32 = 63;
    pub const XRSTORS: u32 = 64;
    /// Our own stops, beyond every architectural reason.
    pub const BUDGET: u32 = 0x1_0000;
    pub const KICK: u32 = 0x1_0001;
    pub const HALT: u32 = 0x1_0002;
    pub const SHUTDOWN: u32 = 0x1_0003;
    pub const MMIO: u32 = 0x1_0004;
    pub const PIO: u32 = 0x1_0005;
    /// An event that leads to CPL 0, where software outside is.
    pub const EVENT: u32 = 0x1_0006;
    /// A defect: generated code faulted at the host address in the qualification.
    pub const LOST: u32 = 0x1_0007;
    /// A sensitive instruction above CPL 0, before it is executed.
    pub const SENSITIVE: u32 = 0x1_0008;
}

/// A stop, with the VM-exit information fields that go with it (zero where none).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exit {
    /// Basic exit reason, or one of our own.
    pub reason: u32,
    /// The exit is a failed VM entry (bit 31 of the exit reason).
    pub entry_failure: bool,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit instruction length; 0 where it is not defined.
    pub length: u32,
    /// Guest-linear address.
    pub gla: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// VM-exit interruption information.
    pub intr_info: u32,
    /// VM-exit interruption error code.
    pub intr_error: u32,
    /// IDT-vectoring information.
    pub idt_info: u32,
    /// IDT-vectoring error code.
    pub idt_error: u32,
    /// VM-exit instruction information.
    pub instr_info: u32,
}

impl Exit {
    /// An exit with a reason and a qualification.
    #[must_use]
    pub fn new(reason: u32, qualification: u64) -> Self {
        Self { reason, qualification, ..Self::default() }
    }
}
