//! The MSR areas of VM entries and VM exits (SDM 3C, "Loading MSRs", "Saving MSRs").

use crate::arch::bits::efer;
use crate::arch::msr;
use crate::arch::segment::seg;
use crate::arch::vmcs as f;
use crate::cpu::state::Core;
use crate::vmx::checks::{Broken, is_canonical, is_pat};
use crate::vmx::checks_guest::DEBUGCTL_KNOWN;

/// Entries that the machine-check of an absurd count may not exceed
/// (SDM 3D, "Miscellaneous Data": 512 is what this processor recommends at most).
const LIMIT: u64 = 512;

/// Load `count` MSRs.  The error is the number of the entry that failed, from 1.
pub(crate) fn load(core: &mut Core, list: u32, count: u64) -> Result<(), (u64, Broken)> {
    if count == 0 {
        return Ok(());
    }
    if count > LIMIT {
        return Err((LIMIT + 1, "an MSR-load list has more than 512 entries"));
    }
    let at = core.vmcs(list);
    for i in 0..count {
        let (head, value) = (core.mem.load(at + 16 * i, 8), core.mem.load(at + 16 * i + 8, 8));
        let index = head as u32;
        let forbidden = matches!(index, msr::IA32_FS_BASE | msr::IA32_GS_BASE)
            || (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&index);
        if head >> 32 != 0 || forbidden {
            return Err((i + 1, "an MSR-load entry names an MSR that must not be loaded"));
        }
        if write(core, index, value).is_none() {
            return Err((i + 1, "an MSR-load entry has a value that WRMSR would refuse"));
        }
    }
    core.refresh();
    Ok(())
}

/// Store the VM-exit MSR-store area; false if an entry is wrong.
pub(crate) fn store(core: &mut Core, count: u64) -> bool {
    if count == 0 {
        return true;
    }
    let at = core.vmcs(f::EXIT_MSR_STORE_ADDRESS);
    for i in 0..count.min(LIMIT) {
        let head = core.mem.load(at + 16 * i, 8);
        let Some(value) = (if head >> 32 == 0 { read(core, head as u32) } else { None }) else {
            return false;
        };
        core.mem.store(at + 16 * i + 8, 8, value);
    }
    count <= LIMIT
}

fn plain(core: &mut Core, index: u32) -> Option<&mut u64> {
    let m = &mut core.msr;
    Some(match index {
        msr::IA32_STAR => &mut m.star,
        msr::IA32_LSTAR => &mut m.lstar,
        msr::IA32_CSTAR => &mut m.cstar,
        msr::IA32_FMASK => &mut m.fmask,
        msr::IA32_KERNEL_GS_BASE => &mut m.kernel_gs_base,
        msr::IA32_SYSENTER_CS => &mut m.sysenter_cs,
        msr::IA32_SYSENTER_ESP => &mut m.sysenter_esp,
        msr::IA32_SYSENTER_EIP => &mut m.sysenter_eip,
        msr::IA32_TSC_AUX => &mut m.tsc_aux,
        msr::IA32_PAT => &mut m.pat,
        msr::IA32_DEBUGCTL => &mut m.debugctl,
        msr::IA32_SPEC_CTRL => &mut m.spec_ctrl,
        _ => return None,
    })
}

/// As WRMSR at CPL 0; `None` where it would raise #GP.
fn write(core: &mut Core, index: u32, value: u64) -> Option<()> {
    let fits = match index {
        msr::IA32_PAT => is_pat(value),
        msr::IA32_DEBUGCTL => value & !DEBUGCTL_KNOWN == 0,
        msr::IA32_TSC_AUX => value >> 32 == 0,
        msr::IA32_LSTAR
        | msr::IA32_CSTAR
        | msr::IA32_KERNEL_GS_BASE
        | msr::IA32_SYSENTER_ESP
        | msr::IA32_SYSENTER_EIP => is_canonical(value),
        msr::IA32_EFER => {
            let changed = value ^ core.efer;
            if value & !efer::KNOWN != 0 || changed & efer::LME != 0 && core.is_paging() {
                return None;
            }
            core.efer = value & !efer::LMA | core.efer & efer::LMA;
            return Some(());
        }
        _ => true,
    };
    if fits {
        *plain(core, index)? = value;
    }
    fits.then_some(())
}

/// As RDMSR at CPL 0; `None` where it would raise #GP.
fn read(core: &mut Core, index: u32) -> Option<u64> {
    match index {
        msr::IA32_EFER => Some(core.efer),
        msr::IA32_TSC => Some(core.tsc()),
        msr::IA32_FS_BASE => Some(core.seg[seg::FS].base),
        msr::IA32_GS_BASE => Some(core.seg[seg::GS].base),
        _ => plain(core, index).map(|m| *m),
    }
}
