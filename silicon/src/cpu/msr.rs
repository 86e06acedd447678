//! Model-specific registers (SDM 4, "Architectural MSRs"; SDM 2, "RDMSR" and "WRMSR").
//!
//! [`read()`] and [`write()`] are the registers themselves, without privilege checks and VM
//! exits: the bindings use them, too.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::msr as index;
use crate::arch::segment::seg;
use crate::cpu::cr;
use crate::cpu::pmu;
use crate::cpu::segment::is_canonical;
use crate::cpu::state::Core;
use crate::cpu::system::require_level_0;
use crate::cpu::trap::{Exec, gp};
use crate::vmx::apic;
use crate::vmx::capabilities;
use crate::vmx::intercept::Sensitive;

const IA32_PLATFORM_ID: u32 = 0x17;
const IA32_TSC_ADJUST: u32 = 0x3B;
const MSR_PLATFORM_INFO: u32 = 0xCE;
const IA32_MCG_CAP: u32 = 0x179;
const IA32_MCG_STATUS: u32 = 0x17A;

/// Software uses the bits of IA32_FEATURE_CONTROL until it locks them.
const LOCKED: u64 = 1;
/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO,
/// IF_PSCHANGE_MC_NO, TAA_NO: nothing here runs ahead of itself.
const ARCH_CAPABILITIES: u64 = 0x17B;
/// MSR_PLATFORM_INFO: the TSC makes ten ticks of a 100-MHz bus clock.
const PLATFORM_INFO: u64 = 10 << 8;
/// IA32_MTRRCAP: no range registers; write combining exists.
const MTRRCAP: u64 = 1 << 10;
/// IA32_BIOS_SIGN_ID: microcode revision 1.
const MICROCODE: u64 = 1 << 32;
/// IA32_MISC_ENABLE: branch trace store and PEBS are unavailable.
const MISC_UNAVAILABLE: u64 = 1 << 11 | 1 << 12;

/// IA32_MISC_ENABLE: what only reads: those, and that there is performance monitoring.
const MISC_READ_ONLY: u64 = MISC_UNAVAILABLE | 1 << 7;
/// IA32_MISC_ENABLE: the bits that exist.  Fast strings, automatic thermal control, Enhanced
/// SpeedStep, xTPR messages, turbo mode, and those below.
const MISC_KNOWN: u64 = MISC_READ_ONLY
    | 1
    | 1 << 3
    | 1 << 16
    | 1 << 23
    | 1 << 38
    | MISC_MONITOR
    | MISC_LIMIT_CPUID
    | MISC_XD_DISABLE;
/// ENABLE MONITOR FSM.
pub(crate) const MISC_MONITOR: u64 = 1 << 18;
/// Limit CPUID Maxval.
pub(crate) const MISC_LIMIT_CPUID: u64 = 1 << 22;
/// XD Bit Disable.
pub(crate) const MISC_XD_DISABLE: u64 = 1 << 34;

/// RDMSR, WRMSR.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    const LOW: u64 = 0xFFFF_FFFF;
    require_level_0(core)?;
    let (msr, length) = (core.gpr[1] as u32, insn.len() as u32);
    if insn.mnemonic() == Mnemonic::Rdmsr {
        core.intercept(Sensitive::Rdmsr { index: msr }, length)?;
        let value = apic::rdmsr(core, msr).or_else(|| read(core, msr)).ok_or_else(|| gp(0))?;
        core.gpr[0] = value & LOW;
        core.gpr[2] = value >> 32;
        return Ok(());
    }
    core.intercept(Sensitive::Wrmsr { index: msr }, length)?;
    let value = core.gpr[0] & LOW | core.gpr[2] << 32;
    if apic::wrmsr(core, msr, value)? { Ok(()) } else { write(core, msr, value) }
}

fn is_apic(msr: u32) -> bool {
    matches!(msr, index::IA32_APIC_BASE | index::IA32_TSC_DEADLINE)
        || (index::X2APIC_FIRST..=index::X2APIC_LAST).contains(&msr)
}

/// The value of an MSR; `None` if there is none of that number.
pub fn read(core: &mut Core, msr: u32) -> Option<u64> {
    let m = &core.msr;
    Some(match msr {
        index::IA32_TSC => core.visible_tsc(),
        IA32_TSC_ADJUST => m.tsc_adjust,
        index::IA32_FEATURE_CONTROL => m.feature_control,
        index::IA32_SPEC_CTRL => m.spec_ctrl,
        index::IA32_BIOS_SIGN_ID => MICROCODE,
        index::IA32_MTRRCAP => MTRRCAP,
        index::IA32_ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        index::IA32_SYSENTER_CS => m.sysenter_cs,
        index::IA32_SYSENTER_ESP => m.sysenter_esp,
        index::IA32_SYSENTER_EIP => m.sysenter_eip,
        index::IA32_MISC_ENABLE => m.misc_enable | MISC_READ_ONLY,
        index::IA32_DEBUGCTL => m.debugctl,
        index::IA32_PAT => m.pat,
        index::IA32_MTRR_DEF_TYPE => m.mtrr_def_type,
        index::IA32_XSS => m.xss,
        index::IA32_PKRS => m.pkrs,
        index::IA32_EFER => core.efer,
        index::IA32_STAR => m.star,
        index::IA32_LSTAR => m.lstar,
        index::IA32_CSTAR => m.cstar,
        index::IA32_FMASK => m.fmask,
        index::IA32_FS_BASE => core.seg[seg::FS].base,
        index::IA32_GS_BASE => core.seg[seg::GS].base,
        index::IA32_KERNEL_GS_BASE => m.kernel_gs_base,
        index::IA32_TSC_AUX => m.tsc_aux,
        IA32_PLATFORM_ID | IA32_MCG_CAP | IA32_MCG_STATUS => 0,
        MSR_PLATFORM_INFO => PLATFORM_INFO,
        index::IA32_VMX_BASIC..=index::IA32_VMX_LAST => capabilities::read(msr)?,
        index::IA32_TSC_DEADLINE => {
            // The APIC counts in ticks that know nothing of IA32_TSC_ADJUST.
            let now = core.tsc();
            match core.apic.rdmsr(msr, now)? {
                0 => 0,
                at => at.wrapping_add(core.msr.tsc_adjust),
            }
        }
        _ if is_apic(msr) => {
            let now = core.tsc();
            core.apic.rdmsr(msr, now)?
        }
        _ => return pmu::read(core, msr),
    })
}

/// Whether every byte of IA32_PAT is a memory type that may stand there.
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}

/// Write an MSR.
///
/// # Errors
/// #GP(0) if there is none of that number, if it is read-only, or if it does not take the value.
pub fn write(core: &mut Core, msr: u32, value: u64) -> Exec<()> {
    if is_apic(msr) {
        return write_apic(core, msr, value);
    }
    let fits = match msr {
        index::IA32_SPEC_CTRL => value & !7 == 0,
        index::IA32_PRED_CMD => value & !1 == 0,
        index::IA32_FEATURE_CONTROL => core.msr.feature_control & LOCKED == 0,
        index::IA32_DEBUGCTL => value & !(3 | pmu::FREEZE_BITS) == 0,
        index::IA32_PAT => is_pat(value),
        index::IA32_MTRR_DEF_TYPE => value & !0xCFF == 0 && matches!(value & 0xFF, 0 | 1 | 4..=6),
        index::IA32_TSC_AUX | index::IA32_PKRS => value >> 32 == 0,
        index::IA32_XSS => value == 0, // no component is a supervisor's
        IA32_MCG_STATUS => value == 0,
        index::IA32_MISC_ENABLE => value & !MISC_KNOWN == 0,
        index::IA32_SYSENTER_ESP
        | index::IA32_SYSENTER_EIP
        | index::IA32_LSTAR
        | index::IA32_CSTAR
        | index::IA32_FS_BASE
        | index::IA32_GS_BASE
        | index::IA32_KERNEL_GS_BASE => is_canonical(value),
        _ => true,
    };
    if !fits {
        return Err(gp(0));
    }
    let now = core.tsc();
    let m = &mut core.msr;
    match msr {
        index::IA32_TSC => m.tsc_adjust = value.wrapping_sub(now),
        IA32_TSC_ADJUST => m.tsc_adjust = value,
        index::IA32_FEATURE_CONTROL => m.feature_control = value,
        index::IA32_SPEC_CTRL => m.spec_ctrl = value,
        index::IA32_SYSENTER_CS => m.sysenter_cs = value & 0xFFFF_FFFF,
        index::IA32_SYSENTER_ESP => m.sysenter_esp = value,
        index::IA32_SYSENTER_EIP => m.sysenter_eip = value,
        index::IA32_MISC_ENABLE => {
            m.misc_enable = value & !MISC_READ_ONLY;
            // With the execute-disable feature NXE goes, too.
            return cr::write_efer(core, core.efer & cr::efer_bits(core));
        }
        index::IA32_DEBUGCTL => m.debugctl = value,
        index::IA32_PAT => m.pat = value,
        index::IA32_MTRR_DEF_TYPE => m.mtrr_def_type = value,
        index::IA32_XSS => m.xss = value,
        index::IA32_PKRS => m.pkrs = value,
        index::IA32_EFER => return cr::write_efer(core, value),
        index::IA32_STAR => m.star = value,
        index::IA32_LSTAR => m.lstar = value,
        index::IA32_CSTAR => m.cstar = value,
        index::IA32_FMASK => m.fmask = value,
        index::IA32_FS_BASE => core.seg[seg::FS].base = value,
        index::IA32_GS_BASE => core.seg[seg::GS].base = value,
        index::IA32_KERNEL_GS_BASE => m.kernel_gs_base = value,
        index::IA32_TSC_AUX => m.tsc_aux = value,
        index::IA32_PRED_CMD | index::IA32_BIOS_SIGN_ID | IA32_MCG_STATUS => {}
        _ => return pmu::write(core, msr, value).ok_or_else(|| gp(0)),
    }
    core.attention = 1;
    Ok(())
}

fn write_apic(core: &mut Core, msr: u32, value: u64) -> Exec<()> {
    let now = core.tsc();
    let value = match (msr, value) {
        (index::IA32_TSC_DEADLINE, 1..) => {
            // Never 0, which would disarm it.
            value.wrapping_sub(core.msr.tsc_adjust).max(1)
        }
        _ => value,
    };
    // An interrupt command finds no other processor on this bus.
    let icr = core.apic.wrmsr(msr, value, now).ok_or_else(|| gp(0))?;
    core.nmi_pending |= core.apic.take_nmi() | (icr.is_some() && core.apic.commands_own_nmi());
    if msr == index::IA32_APIC_BASE {
        // Translations remember which page is the APIC's.
        core.flush_guest();
    }
    core.attention = 1;
    Ok(())
}
