//! What linear addresses mean to the guest of the current VMCS, for host software that looks.
//!
//! After a VM exit the guest's registers are in the VMCS (SDM 3C, "Saving Guest State"); inside the
//! guest they are the processor's own.  Host software may put values of its own in their place.

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::bits::{cr0, cr4, efer};
use crate::arch::vmcs as f;
use crate::cpu::segment::is_canonical;
use crate::cpu::state::Core;
use crate::mem::Memory;
use crate::mmu::walk::{Access, Intent, Space, Walked, Walker};
use crate::vmx::NO_VMCS;
use crate::vmx::controls::{entry, exit, primary, secondary};
use crate::vmx::instructions::VmFail;

/// Values in place of the guest's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given {
    /// CR0.
    pub cr0: Option<u64>,
    /// CR3; the PDPTEs of PAE paging are then those in memory there.
    pub cr3: Option<u64>,
    /// CR4.
    pub cr4: Option<u64>,
    /// IA32_EFER.
    pub efer: Option<u64>,
    /// The EPT pointer; 0: no EPT.
    pub eptp: Option<u64>,
}

/// The guest's space.
///
/// # Errors
/// A value is neither given nor there: no VMCS is current.
pub fn guest_space(core: &Core, given: Given) -> Result<Space, VmFail> {
    let Given { cr0: Some(cr0), cr3: Some(cr3), cr4: Some(cr4), efer: Some(efer), eptp: Some(eptp) } = given
    else {
        let own = if core.vmx.non_root {
            core.space()
        } else if core.vmx.current == NO_VMCS {
            return Err(VmFail(0));
        } else {
            saved(core)
        };
        let space = Space {
            cr0: given.cr0.unwrap_or(own.cr0),
            cr3: given.cr3.unwrap_or(own.cr3),
            cr4: given.cr4.unwrap_or(own.cr4),
            efer: given.efer.unwrap_or(own.efer),
            eptp: given.eptp.unwrap_or(own.eptp),
            ..own
        };
        // Without EPT the VMCS has no PDPTEs: they were loaded from memory.
        let is_in_memory = given.cr3.is_some() || own.eptp == 0 && !core.vmx.non_root;
        return Ok(if is_in_memory { with_pdptes(&core.mem, space) } else { space });
    };
    Ok(with_pdptes(&core.mem, Space { cr0, cr3, cr4, efer, pdpte: [0; 4], eptp, by_mode: false }))
}

/// The space that the last VM exit saved in the current VMCS.
fn saved(core: &Core) -> Space {
    let get = |field| core.vmcs(field);
    let has = |field, bit: u32| get(field) & u64::from(bit) != 0;
    // Where EFER is not saved, what it had beside LMA is unknown: nothing may fault for want of it.
    let is_saved = has(f::EXIT_CONTROLS, exit::SAVE_EFER);
    let rest = if is_saved { get(f::GUEST_EFER) } else { efer::LME | efer::NXE };
    let is_long = has(f::ENTRY_CONTROLS, entry::IA32E_MODE_GUEST);
    let has_second = |bit| {
        has(f::PRIMARY_CONTROLS, primary::ACTIVATE_SECONDARY_CONTROLS) && has(f::SECONDARY_CONTROLS, bit)
    };
    Space {
        cr0: get(f::GUEST_CR0),
        cr3: get(f::GUEST_CR3),
        cr4: get(f::GUEST_CR4),
        efer: rest & !efer::LMA | if is_long { efer::LMA } else { 0 },
        pdpte: [0, 2, 4, 6].map(|i| get(f::GUEST_PDPTE0 + i)),
        eptp: if has_second(secondary::ENABLE_EPT) { get(f::EPT_POINTER) } else { 0 },
        by_mode: has_second(secondary::MODE_BASED_EXECUTE),
    }
}

fn uses_pae(s: &Space) -> bool {
    s.cr0 & cr0::PG != 0 && s.cr4 & cr4::PAE != 0 && s.efer & efer::LMA == 0
}

/// The same with the PDPTEs in memory at CR3, if they matter.
#[must_use]
pub fn with_pdptes(mem: &Memory, mut space: Space) -> Space {
    if uses_pae(&space) {
        let mut walker = Walker::observer(mem);
        for i in 0..4 {
            let gpa = (space.cr3 & 0xFFFF_FFE0) + 8 * i as u64;
            let place = walker.physical(&space, gpa, Access::Read);
            space.pdpte[i] = place.map_or(0, |hpa| mem.load(hpa, 8));
        }
    }
    space
}

/// The address as the space's mode has it; `None` if that is none.
fn linear(s: &Space, gva: u64) -> Option<u64> {
    if s.efer & efer::LMA == 0 {
        return Some(gva & 0xFFFF_FFFF);
    }
    (s.cr4 & cr4::LA57 != 0 || is_canonical(gva)).then_some(gva)
}

/// Where a linear address is now: no side effects, not counted, whoever may read there.
#[must_use]
pub fn locate(mem: &Memory, s: &Space, gva: u64) -> Option<Walked> {
    look(mem, s, gva, Access::Read)
}

fn look(mem: &Memory, s: &Space, gva: u64, access: Access) -> Option<Walked> {
    let intent = Intent { access, user: false, smap: false };
    Walker::observer(mem).walk(s, linear(s, gva)?, intent).ok()
}

/// The bytes of code at a linear address: as many as are mapped and executable, at whatever
/// privilege level.  No side effects, not counted: the processor has fetched them before.
#[must_use]
pub fn fetch(mem: &Memory, s: &Space, gva: u64, out: &mut [u8]) -> usize {
    let s = Space { cr4: s.cr4 & !cr4::SMEP, ..*s };
    let mut done = 0;
    while done < out.len() {
        let at = gva.wrapping_add(done as u64);
        let part = ((FRAME_BYTES - (at & PAGE_OFFSET)) as usize).min(out.len() - done);
        let found = look(mem, &s, at, Access::Fetch);
        if !found.is_some_and(|w| mem.read_bytes(w.hpa, &mut out[done..done + part])) {
            break;
        }
        done += part;
    }
    done
}
