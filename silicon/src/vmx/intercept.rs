//! Instructions that may cause VM exits (SDM 3C, "Instructions That Cause VM Exits").

use crate::arch::bits::{cr0, cr4};
use crate::arch::exit::{Exit, reason};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, ud, vm_exit};
use crate::vmx::controls::{primary, secondary};

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
    /// `components`: EDX:EAX.
    Xsaves {
        components: u64,
        displacement: u64,
        info: u32,
    },
    Xrstors {
        components: u64,
        displacement: u64,
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
    /// The VM exit; #UD for instructions that the controls do not enable.
    #[inline]
    pub fn intercept(&mut self, what: Sensitive, length: u32) -> Exec<()> {
        if self.vmx.non_root { self.intercept_in_guest(what, length) } else { Ok(()) }
    }

    #[cold]
    fn intercept_in_guest(&mut self, what: Sensitive, length: u32) -> Exec<()> {
        let Some(exit) = self.exit_of(what)? else { return Ok(()) };
        Err(vm_exit(Exit { length, ..exit }))
    }

    fn exit_of(&mut self, what: Sensitive) -> Exec<Option<Exit>> {
        use primary as p;
        use secondary as s;
        let c = &self.vmx.controls;
        let when = |on: bool, why: u32| on.then(|| Exit::new(why, 0));
        let described = |on: bool, why: u32, displacement: u64, info: u32| {
            on.then(|| Exit { instr_info: info, ..Exit::new(why, displacement) })
        };
        Ok(match what {
            Sensitive::Cpuid => when(true, reason::CPUID),
            Sensitive::Invd => when(true, reason::INVD),
            Sensitive::Xsetbv => when(true, reason::XSETBV),
            Sensitive::Rsm => when(true, reason::RSM),
            Sensitive::Hlt => when(c.primary(p::HLT_EXITING), reason::HLT),
            Sensitive::Wbinvd => when(c.secondary(s::WBINVD_EXITING), reason::WBINVD),
            Sensitive::Invlpg { gva } => c.primary(p::INVLPG_EXITING).then(|| Exit::new(reason::INVLPG, gva)),
            Sensitive::Invpcid { displacement, info } => {
                if !c.secondary(s::ENABLE_INVPCID) {
                    return Err(ud());
                }
                described(c.primary(p::INVLPG_EXITING), reason::INVPCID, displacement, info)
            }
            Sensitive::Rdpmc => when(c.primary(p::RDPMC_EXITING), reason::RDPMC),
            Sensitive::Rdtsc => when(c.primary(p::RDTSC_EXITING), reason::RDTSC),
            Sensitive::Rdtscp => {
                if !c.secondary(s::ENABLE_RDTSCP) {
                    return Err(ud());
                }
                when(c.primary(p::RDTSC_EXITING), reason::RDTSCP)
            }
            Sensitive::Pause => {
                let exits = c.primary(p::PAUSE_EXITING) || self.is_pause_loop();
                when(exits, reason::PAUSE)
            }
            Sensitive::Monitor => when(c.primary(p::MONITOR_EXITING), reason::MONITOR),
            Sensitive::Mwait => when(c.primary(p::MWAIT_EXITING), reason::MWAIT),
            Sensitive::Rdrand { info } => described(c.secondary(s::RDRAND_EXITING), reason::RDRAND, 0, info),
            Sensitive::Rdseed { info } => described(c.secondary(s::RDSEED_EXITING), reason::RDSEED, 0, info),
            Sensitive::Xsaves { components, displacement, info } => {
                described(self.exits_on_components(components), reason::XSAVES, displacement, info)
            }
            Sensitive::Xrstors { components, displacement, info } => {
                described(self.exits_on_components(components), reason::XRSTORS, displacement, info)
            }
            Sensitive::Rdmsr { index } => when(self.exits_on_msr(index, false), reason::RDMSR),
            Sensitive::Wrmsr { index } => when(self.exits_on_msr(index, true), reason::WRMSR),
            Sensitive::MovToCr { cr, reg, value } => self.of_cr_write(cr, reg, value),
            Sensitive::MovFromCr { cr, reg } => {
                let exits = match cr {
                    3 => c.primary(p::CR3_STORE_EXITING),
                    8 => c.primary(p::CR8_STORE_EXITING),
                    _ => false,
                };
                exits.then(|| cr_access(cr, MOV_FROM, reg))
            }
            Sensitive::Clts => {
                let exits = c.cr0_mask & c.cr0_shadow & cr0::TS != 0;
                exits.then(|| cr_access(0, CLTS, 0))
            }
            Sensitive::Lmsw { source, gla } => self.of_lmsw(source, gla),
            Sensitive::MovDr { dr, from_dr, reg } => c.primary(p::MOV_DR_EXITING).then(|| {
                let q = u64::from(dr) | u64::from(from_dr) << 4 | u64::from(reg) << 8;
                Exit::new(reason::MOV_DR, q)
            }),
            Sensitive::Io { port, size, is_in, is_string, is_rep, is_imm, gla, info } => {
                self.exits_on_port(port, size).then(|| {
                    let flag = |on: bool, bit: u32| u64::from(on) << bit;
                    let q = u64::from(size - 1)
                        | flag(is_in, 3)
                        | flag(is_string, 4)
                        | flag(is_rep, 5)
                        | flag(is_imm, 6)
                        | u64::from(port) << 16;
                    Exit { gla, instr_info: info, ..Exit::new(reason::IO, q) }
                })
            }
            Sensitive::GdtrIdtr { displacement, info } => {
                described(c.secondary(s::DESCRIPTOR_TABLE_EXITING), reason::GDTR_IDTR, displacement, info)
            }
            Sensitive::LdtrTr { displacement, info } => {
                described(c.secondary(s::DESCRIPTOR_TABLE_EXITING), reason::LDTR_TR, displacement, info)
            }
            Sensitive::TaskSwitch { selector, source } => {
                Some(Exit::new(reason::TASK_SWITCH, u64::from(selector) | u64::from(source) << 30))
            }
        })
    }

    fn of_cr_write(&self, cr: u8, reg: u8, value: u64) -> Option<Exit> {
        let c = &self.vmx.controls;
        let exits = match cr {
            0 => (value ^ c.cr0_shadow) & c.cr0_mask != 0,
            4 => (value ^ c.cr4_shadow) & c.cr4_mask != 0,
            3 => {
                let targets = [c.cr3_target0, c.cr3_target1, c.cr3_target2, c.cr3_target3];
                c.primary(primary::CR3_LOAD_EXITING)
                    && !targets.iter().take(c.cr3_targets.min(4) as usize).any(|&t| t == value)
            }
            8 => c.primary(primary::CR8_LOAD_EXITING),
            _ => false,
        };
        exits.then(|| cr_access(cr, MOV_TO, reg))
    }

    /// LMSW writes CR0 bits 3:0 and cannot clear PE.
    fn of_lmsw(&self, source: u16, gla: Option<u64>) -> Option<Exit> {
        let c = &self.vmx.controls;
        let new = u64::from(source);
        let differs = (new ^ c.cr0_shadow) & c.cr0_mask & 0xE != 0;
        let sets_pe = new & !c.cr0_shadow & c.cr0_mask & cr0::PE != 0;
        (differs || sets_pe).then(|| {
            let mut exit = cr_access(0, LMSW, 0);
            exit.qualification |= new << 16 | u64::from(gla.is_some()) << 6;
            exit.gla = gla.unwrap_or(0);
            exit
        })
    }

    /// The XSS-exiting bitmap is about supervisor state components alone.
    fn exits_on_components(&self, components: u64) -> bool {
        components & self.msr.xss & self.vmx.controls.xss_exiting != 0
    }

    fn exits_on_msr(&self, index: u32, is_write: bool) -> bool {
        let c = &self.vmx.controls;
        if !c.primary(primary::USE_MSR_BITMAPS) {
            return true;
        }
        let half = match index {
            0..=0x1FFF => 0,
            0xC000_0000..=0xC000_1FFF => 1024,
            _ => return true,
        };
        let bit = u64::from(index & 0x1FFF);
        let at = c.msr_bitmaps.wrapping_add(half + if is_write { 2048 } else { 0 } + bit / 8);
        self.mem.load(at, 1) >> (bit % 8) & 1 != 0
    }

    /// "Unconditional I/O exiting" is ignored under "use I/O bitmaps"; an access that wraps past
    /// port FFFFH exits.
    fn exits_on_port(&self, port: u16, size: u8) -> bool {
        let c = &self.vmx.controls;
        if !c.primary(primary::USE_IO_BITMAPS) {
            return c.primary(primary::UNCONDITIONAL_IO_EXITING);
        }
        (u32::from(port)..u32::from(port) + u32::from(size)).any(|p| {
            let map = if p < 0x8000 { c.io_bitmap_a } else { c.io_bitmap_b };
            p > 0xFFFF || self.mem.load(map.wrapping_add(u64::from(p & 0x7FFF) / 8), 1) >> (p % 8) & 1 != 0
        })
    }

    /// Whether RDTSC and RDTSCP always read the clock, plus the VMCS's offset if
    /// [`Core::uses_tsc_offset`].
    #[inline]
    #[must_use]
    pub fn tsc_is_plain(&self) -> bool {
        let c = &self.vmx.controls;
        let in_guest = self.vmx.non_root
            && (c.primary(primary::RDTSC_EXITING)
                || c.secondary(secondary::USE_TSC_SCALING)
                || !self.vmx.has_rdtscp());
        (self.cpl == 0 || self.cr4 & cr4::TSD == 0) && !in_guest
    }

    /// Whether the VMCS has an offset for the time-stamp counter.
    #[inline]
    #[must_use]
    pub fn uses_tsc_offset(&self) -> bool {
        self.vmx.non_root && self.vmx.controls.primary(primary::USE_TSC_OFFSETTING)
    }

    /// Whether PAUSE does more than nothing under the present controls.
    #[inline]
    #[must_use]
    pub fn pause_may_exit(&self) -> bool {
        let c = &self.vmx.controls;
        self.vmx.non_root && (c.primary(primary::PAUSE_EXITING) || c.secondary(secondary::PAUSE_LOOP_EXITING))
    }

    /// "PAUSE-loop exiting" (SDM 3C, "Instructions That Cause VM Exits Conditionally").
    fn is_pause_loop(&mut self) -> bool {
        let c = &self.vmx.controls;
        if self.cpl != 0 || !c.secondary(secondary::PAUSE_LOOP_EXITING) {
            return false;
        }
        let (gap, window, now) = (c.ple_gap, c.ple_window, self.tsc());
        let (first, last) = self.vmx.pause_loop;
        let starts = last == 0 || now.wrapping_sub(last) > gap;
        self.vmx.pause_loop = if starts { (now, now) } else { (first, now) };
        !starts && now.wrapping_sub(first) > window
    }

    /// What a MOV from CR0/CR4 (SMSW) reads: under masks and shadows in non-root operation.
    #[must_use]
    pub fn read_cr_shadowed(&self, cr: u8) -> u64 {
        let real = if cr == 4 { self.cr4 } else { self.cr0 };
        if !self.vmx.non_root {
            return real;
        }
        let (mask, shadow) = self.mask_and_shadow(cr);
        real & !mask | shadow & mask
    }

    /// The value that a MOV to CR0/CR4 (LMSW, CLTS) writes: host-owned bits keep their value.
    #[must_use]
    pub fn filter_cr_write(&self, cr: u8, value: u64) -> u64 {
        if !self.vmx.non_root {
            return value;
        }
        let (mask, _) = self.mask_and_shadow(cr);
        let real = if cr == 4 { self.cr4 } else { self.cr0 };
        value & !mask | real & mask
    }

    fn mask_and_shadow(&self, cr: u8) -> (u64, u64) {
        let c = &self.vmx.controls;
        if cr == 4 { (c.cr4_mask, c.cr4_shadow) } else { (c.cr0_mask, c.cr0_shadow) }
    }

    /// What RDTSC in non-root operation adds to the TSC: "use TSC offsetting", "use TSC scaling".
    #[must_use]
    pub fn tsc_offset(&self) -> u64 {
        let c = &self.vmx.controls;
        if !self.vmx.non_root || !c.primary(primary::USE_TSC_OFFSETTING) {
            return 0;
        }
        if !c.secondary(secondary::USE_TSC_SCALING) {
            return c.tsc_offset;
        }
        let now = self.tsc();
        let scaled = ((u128::from(now) * u128::from(c.tsc_multiplier)) >> 48) as u64;
        scaled.wrapping_sub(now).wrapping_add(c.tsc_offset)
    }
}

const MOV_TO: u64 = 0;
const MOV_FROM: u64 = 1;
const CLTS: u64 = 2;
const LMSW: u64 = 3;

/// "Exit Qualification for Control-Register Accesses".
fn cr_access(cr: u8, access: u64, reg: u8) -> Exit {
    Exit::new(reason::CR_ACCESS, u64::from(cr) | access << 4 | u64::from(reg) << 8)
}
