//! Control registers (SDM 3A, "Control Registers"; SDM 2, "MOV—Move to/from Control Registers"):
//! what may be written, what changes with it, and which cached translations go.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::addr::{PAGE_OFFSET, PHYS_MASK};
use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::segment::{attr, seg};
use crate::cpu::msr;
use crate::cpu::operand::{get_reg, mem_linear, read_op, set_reg, write_op};
use crate::cpu::pmu;
use crate::cpu::state::Core;
use crate::cpu::system::require_level_0;
use crate::cpu::trap::{Exec, gp, ud};
use crate::mmu::walk::Access;
use crate::vmx::intercept::Sensitive;
use crate::vmx::{apic, capabilities};

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
    let exempt = if core.vmx.is_unrestricted() { cr0::PE | cr0::PG } else { 0 };
    if core.vmx.is_on && !new & capabilities::CR0_FIXED0 & !exempt != 0 {
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
        pmu::set_level(core, 0);
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
    if core.vmx.is_on && !new & capabilities::CR4_FIXED0 != 0 {
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

/// The bits of IA32_EFER that there are now: NXE as long as software has not turned off the
/// execute-disable feature (SDM 4, IA32_MISC_ENABLE, "XD Bit Disable").
pub(crate) fn efer_bits(core: &Core) -> u64 {
    let is_off = core.msr.misc_enable & msr::MISC_XD_DISABLE != 0;
    if is_off { efer::KNOWN & !efer::NXE } else { efer::KNOWN }
}

/// Write IA32_EFER.
///
/// # Errors
/// #GP(0) for reserved bits, and for a change of LME while paging.
pub fn write_efer(core: &mut Core, value: u64) -> Exec<()> {
    if value & !efer_bits(core) != 0 {
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

/// CLTS, LMSW, SMSW.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let length = insn.len() as u32;
    match insn.mnemonic() {
        Mnemonic::Clts => {
            require_level_0(core)?;
            core.intercept(Sensitive::Clts, length)?;
            write_cr0(core, core.cr0 & !cr0::TS)
        }
        Mnemonic::Lmsw => {
            require_level_0(core)?;
            let gla = if insn.op0_kind() == OpKind::Memory {
                Some(mem_linear(core, insn, 2, Access::Read)?)
            } else {
                None
            };
            let source = read_op(core, insn, 0)? as u16;
            core.intercept(Sensitive::Lmsw { source, gla }, length)?;
            // PE can be set but not cleared.
            let low = u64::from(source) & 0xF | core.cr0 & cr0::PE;
            write_cr0(core, core.cr0 & !0xF | low)
        }
        _ => {
            require_umip(core)?;
            write_op(core, insn, 0, core.read_cr_shadowed(0))
        }
    }
}

/// CR4.UMIP: instructions that show system state are for level 0.
///
/// # Errors
/// #GP(0).
pub(crate) fn require_umip(core: &Core) -> Exec<()> {
    if core.cr4 & cr4::UMIP != 0 && core.cpl != 0 { Err(gp(0)) } else { Ok(()) }
}

/// MOV with a control register as the destination or the source.
pub(crate) fn moves(core: &mut Core, insn: &Instruction, to_cr: bool) -> Exec<()> {
    let (register, gpr) = if to_cr {
        (insn.op0_register(), insn.op1_register())
    } else {
        (insn.op1_register(), insn.op0_register())
    };
    let cr = register.number() as u8;
    if !matches!(cr, 0 | 2 | 3 | 4 | 8) {
        return Err(ud());
    }
    require_level_0(core)?;
    let (reg, length) = (gpr.number() as u8, insn.len() as u32);
    if !to_cr {
        core.intercept(Sensitive::MovFromCr { cr, reg }, length)?;
        let value = match cr {
            0 | 4 => core.read_cr_shadowed(cr),
            2 => core.cr2,
            3 => core.cr3,
            _ => apic::cr8(core).unwrap_or_else(|| u64::from(core.apic.tpr() >> 4)),
        };
        set_reg(core, gpr, value);
        return Ok(());
    }
    let value = get_reg(core, gpr);
    core.intercept(Sensitive::MovToCr { cr, reg, value }, length)?;
    match cr {
        0 => write_cr0(core, value),
        2 => {
            core.cr2 = value;
            Ok(())
        }
        3 => write_cr3(core, value),
        4 => write_cr4(core, value),
        _ => {
            if value > 0xF {
                return Err(gp(0));
            }
            if !apic::set_cr8(core, value) {
                core.apic.set_tpr((value as u8) << 4);
            }
            core.attention = 1;
            Ok(())
        }
    }
}

impl Core {
    /// I/O privilege level.
    #[must_use]
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> 12) as u8
    }
}
