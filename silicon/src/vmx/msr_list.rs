//! The MSR areas of VM entries and VM exits (SDM 3C, "Loading MSRs", "Saving MSRs").

use crate::arch::msr;
use crate::arch::vmcs as f;
use crate::cpu::msr::{read, write};
use crate::cpu::state::Core;
use crate::vmx::checks::Broken;

/// Entries at most (SDM 3D, "Miscellaneous Data": 512 is what this processor recommends).
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
        let (head, value) =
            (core.mem.load(at.wrapping_add(16 * i), 8), core.mem.load(at.wrapping_add(16 * i + 8), 8));
        let index = head as u32;
        let forbidden = matches!(index, msr::IA32_FS_BASE | msr::IA32_GS_BASE)
            || (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&index);
        if head >> 32 != 0 || forbidden {
            return Err((i + 1, "an MSR-load entry names an MSR that must not be loaded"));
        }
        if write(core, index, value).is_err() {
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
        let head = core.mem.load(at.wrapping_add(16 * i), 8);
        let Some(value) = (if head >> 32 == 0 { read(core, head as u32) } else { None }) else {
            return false;
        };
        core.mem.store(at.wrapping_add(16 * i + 8), 8, value);
    }
    count <= LIMIT
}
