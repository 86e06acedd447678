//! Control registers (SDM 3A, "Control Registers"; SDM 2, "MOV—Move to/from Control Registers"):
//! what may be written, what changes with it, and which cached translations go.

use crate::addr::{PAGE_OFFSET, PHYS_MASK};
use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::segment::{attr, seg};
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, gp};
use crate::mmu::walk::Access;

/// Bits of CR0 that exist; the others read as zero and writes to them are lost.
const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR3, bit 63 of a MOV under PCIDs: keep the translations.
const CR3_KEEP: u64 = 1 << 63;

/// Whether PAE paging (not its 4-level kin) is in use under these registers.
fn is_pae(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LME == 0
}

/// The page-directory-pointer-table entries behind `cr3` ("PDPTE Registers").
///
/// # Errors
/// #GP(0) if a present one sets reserved bits; EPT violations.
pub(crate) fn read_pdptes(core: &mut Core, cr3: u64) -> Exec<[u64; 4]> {
    const RESERVED: u64 = 0x1E6 | !PHYS_MASK;
    let mut entries = [0; 4];
    for (i, entry) in entries.iter_mut().enumerate() {
        let gpa = (cr3 & 0xFFFF_FFE0) + 8 * i as u64;
        let hpa = core.translate_physical(gpa, Access::Read)?;
        *entry = core.mem.load(hpa, 8);
        if *entry & 1 != 0 && *entry & RESERVED != 0 {
            return Err(gp(0));
        }
    }
    Ok(entries)
}

/// Bits of CR0 that are one in VMX operation ("Restrictions on VMX Operation").
const CR0_FIXED: u64 = cr0::PE | cr0::NE | cr0::PG;
/// Bits of CR4 that are one in VMX operation.
const CR4_FIXED: u64 = cr4::VMXE;

/// Write CR0, after privilege checks and VM exits.
///
/// # Errors
/// #GP(0) for the combinations that the manual forbids.
pub fn write_cr0(core: &mut Core, value: u64) -> Exec<()> {
    if value >> 32 != 0 {
        return Err(gp(0));
    }
    let new = core.filter_cr_write(0, value) & CR0_KNOWN | cr0::ET;
    let on = |bit: u64| new & bit != 0;
    let changed = new ^ core.cr0;
    if on(cr0::PG) && !on(cr0::PE) || on(cr0::NW) && !on(cr0::CD) {
        return Err(gp(0));
    }
    // An unrestricted guest may clear PE and PG; for others its host's mask keeps them.
    let exempt = if core.vmx.non_root { cr0::PE | cr0::PG } else { 0 };
    if core.vmx.is_on && !new & CR0_FIXED & !exempt != 0 {
        return Err(gp(0));
    }
    let mut new_efer = core.efer;
    if changed & cr0::PG != 0 {
        if on(cr0::PG) {
            if core.efer & efer::LME != 0 {
                let is_tss16 = core.tr.attr & attr::CODE == 0;
                if core.cr4 & cr4::PAE == 0 || core.seg[seg::CS].has(attr::L) || is_tss16 {
                    return Err(gp(0));
                }
                new_efer |= efer::LMA;
            }
        } else {
            if core.is_64() || core.cr4 & cr4::PCIDE != 0 {
                return Err(gp(0));
            }
            new_efer &= !efer::LMA;
        }
    }
    let reloads = cr0::PG | cr0::CD | cr0::NW;
    if changed & reloads != 0 && is_pae(new, core.cr4, core.efer) {
        core.pdpte = read_pdptes(core, core.cr3)?;
    }
    core.cr0 = new;
    core.efer = new_efer;
    if changed & cr0::PE != 0 {
        core.cpl = 0;
    }
    core.refresh();
    if changed & (cr0::PG | cr0::PE | cr0::WP) != 0 {
        core.flush_guest();
    }
    core.attention = 1;
    Ok(())
}

/// Write CR3.
///
/// # Errors
/// #GP(0) for reserved bits, also in the PDPTEs.
pub fn write_cr3(core: &mut Core, value: u64) -> Exec<()> {
    let has_pcids = core.cr4 & cr4::PCIDE != 0;
    let keeps = has_pcids && value & CR3_KEEP != 0;
    let new = if keeps { value & !CR3_KEEP } else { value };
    if new & !PHYS_MASK != 0 {
        return Err(gp(0));
    }
    if is_pae(core.cr0, core.cr4, core.efer) {
        core.pdpte = read_pdptes(core, new)?;
    }
    core.cr3 = new;
    core.refresh();
    if !keeps {
        core.flush_non_global();
    }
    core.attention = 1;
    Ok(())
}

/// Write CR4, after privilege checks and VM exits.
///
/// # Errors
/// #GP(0) for reserved bits and the combinations that the manual forbids.
pub fn write_cr4(core: &mut Core, value: u64) -> Exec<()> {
    let new = core.filter_cr_write(4, value);
    if new & !cr4::KNOWN != 0 {
        return Err(gp(0));
    }
    if core.vmx.is_on && !new & CR4_FIXED != 0 {
        return Err(gp(0));
    }
    let changed = new ^ core.cr4;
    let on = |bit: u64| new & bit != 0;
    if core.is_long() && !on(cr4::PAE) {
        return Err(gp(0));
    }
    if changed & cr4::PCIDE != 0 && on(cr4::PCIDE) && (!core.is_long() || core.cr3 & PAGE_OFFSET != 0) {
        return Err(gp(0));
    }
    let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
    if changed & paging != 0 && is_pae(core.cr0, new, core.efer) {
        core.pdpte = read_pdptes(core, core.cr3)?;
    }
    core.cr4 = new;
    core.refresh();
    if changed & (paging | cr4::PCIDE | cr4::SMAP) != 0 {
        core.flush_guest();
    }
    core.attention = 1;
    Ok(())
}

/// Write IA32_EFER.
///
/// # Errors
/// #GP(0) for reserved bits, and for a change of LME while paging.
pub fn write_efer(core: &mut Core, value: u64) -> Exec<()> {
    if value & !efer::KNOWN != 0 {
        return Err(gp(0));
    }
    let changed = value ^ core.efer;
    if changed & efer::LME != 0 && core.is_paging() {
        return Err(gp(0));
    }
    // LMA is the processor's: a write does not reach it.
    core.efer = value & !efer::LMA | core.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        core.flush_guest();
    }
    core.refresh();
    core.attention = 1;
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
///
/// # Errors
/// As [`write_cr0`].
pub fn load_msw(core: &mut Core, source: u16) -> Exec<()> {
    let seen = core.read_cr_shadowed(0);
    let low = u64::from(source) & 0xF | seen & cr0::PE;
    // Host-owned bits are filtered in `write_cr0`.
    write_cr0(core, core.cr0 & !0xF | low)
}

impl Core {
    /// I/O privilege level.
    #[must_use]
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> 12) as u8
    }
}
