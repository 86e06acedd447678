//! Instructions that may cause VM exits (SDM 3C, "Instructions That Cause VM Exits").

use crate::cpu::state::Core;
use crate::cpu::trap::Exec;

/// An instruction about to execute, with what its VM exit would report.
///
/// `length` is the instruction's; `info` the VM-exit instruction information where the manual
/// defines it for that instruction (operand registers and address parts).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Sensitive {
    Cpuid,
    Hlt,
    Invd,
    Wbinvd,
    Invlpg {
        gva: u64,
    },
    Invpcid {
        displacement: u64,
        info: u32,
    },
    Rdpmc,
    Rdtsc,
    Rdtscp,
    Pause,
    Monitor,
    Mwait,
    Xsetbv,
    Rdrand {
        info: u32,
    },
    Rdseed {
        info: u32,
    },
    Rdmsr {
        index: u32,
    },
    Wrmsr {
        index: u32,
    },
    MovToCr {
        cr: u8,
        reg: u8,
        value: u64,
    },
    MovFromCr {
        cr: u8,
        reg: u8,
    },
    Clts,
    Lmsw {
        source: u16,
        gla: Option<u64>,
    },
    MovDr {
        dr: u8,
        from_dr: bool,
        reg: u8,
    },
    /// IN, OUT, INS, OUTS.  `gla`: of the first element of INS/OUTS.
    Io {
        port: u16,
        size: u8,
        is_in: bool,
        is_string: bool,
        is_rep: bool,
        is_imm: bool,
        gla: u64,
        info: u32,
    },
    /// LGDT LIDT SGDT SIDT.
    GdtrIdtr {
        displacement: u64,
        info: u32,
    },
    /// LLDT LTR SLDT STR.
    LdtrTr {
        displacement: u64,
        info: u32,
    },
    /// A task switch by CALL, JMP, IRET or a task gate (source 0, 2, 1, 3 of the qualification).
    TaskSwitch {
        selector: u16,
        source: u8,
    },
    Rsm,
}

impl Core {
    /// In VMX non-root operation: leave if the VMCS says that this instruction exits.
    /// The caller has done all checks with higher priority (privilege, #UD), has written nothing,
    /// and `length` is the instruction's length.
    ///
    /// # Errors
    /// The VM exit.
    #[inline]
    pub fn intercept(&mut self, what: Sensitive, length: u32) -> Exec<()> {
        if self.vmx.non_root { self.intercept_in_guest(what, length) } else { Ok(()) }
    }

    #[cold]
    fn intercept_in_guest(&mut self, _what: Sensitive, _length: u32) -> Exec<()> {
        unimplemented!()
    }

    /// What a MOV from CR0/CR4 (SMSW) reads: under masks and shadows in non-root operation.
    #[must_use]
    pub fn read_cr_shadowed(&self, cr: u8) -> u64 {
        if cr == 4 { self.cr4 } else { self.cr0 }
    }

    /// The value that a MOV to CR0/CR4 (LMSW, CLTS) writes: host-owned bits keep their value.
    #[must_use]
    pub fn filter_cr_write(&self, _cr: u8, value: u64) -> u64 {
        value
    }

    /// RDTSC in non-root operation: the offset to add ("use TSC offsetting").
    #[must_use]
    pub fn tsc_offset(&self) -> u64 {
        0
    }
}
