//! The VMX instructions (SDM 3D, "VMX Instruction Reference"), called by the bindings with
//! host-physical operands, and by [`crate::vmx::execute`] for guest code in root operation.

use crate::arch::exit::Exit;
use crate::arch::vmcs::{self as f, REVISION, Type};
use crate::cpu::state::Core;
use crate::vmx::checks::{is_canonical, is_eptp, is_frame};
pub use crate::vmx::execute::execute;
use crate::vmx::{NO_VMCS, entry};

/// Why a VMX instruction failed: the VM-instruction error number, 0 for VMfailInvalid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmFail(pub u32);

/// VM-instruction error numbers (SDM 3D, "VM Instruction Error Numbers").
pub mod error {
    #![allow(missing_docs)]
    pub const VMCALL_IN_ROOT: u32 = 1;
    pub const VMCLEAR_ADDRESS: u32 = 2;
    pub const VMCLEAR_VMXON_POINTER: u32 = 3;
    pub const VMLAUNCH_NOT_CLEAR: u32 = 4;
    pub const VMRESUME_NOT_LAUNCHED: u32 = 5;
    pub const INVALID_CONTROL_FIELD: u32 = 7;
    pub const INVALID_HOST_STATE: u32 = 8;
    pub const VMPTRLD_ADDRESS: u32 = 9;
    pub const VMPTRLD_VMXON_POINTER: u32 = 10;
    pub const VMPTRLD_REVISION: u32 = 11;
    pub const UNSUPPORTED_FIELD: u32 = 12;
    pub const READ_ONLY_FIELD: u32 = 13;
    pub const VMXON_IN_ROOT: u32 = 15;
    pub const ENTRY_UNDER_MOV_SS: u32 = 26;
    pub const INVALID_INVALIDATION: u32 = 28;
}

impl Core {
    /// VMfail: with a number if there is a current VMCS to hold it, else VMfailInvalid.
    pub(crate) fn vm_fail(&mut self, number: u32) -> VmFail {
        self.fail_in(self.vmx.current, number)
    }

    /// The same with the VMCS that holds the number.
    fn fail_in(&mut self, vmcs: u64, number: u32) -> VmFail {
        if vmcs == NO_VMCS {
            return VmFail(0);
        }
        self.mem.store(vmcs.wrapping_add(f::offset(f::VM_INSTRUCTION_ERROR)), 8, u64::from(number));
        VmFail(number)
    }

    /// The VMCS that VMREAD and VMWRITE access: the current one, or for a guest under "VMCS
    /// shadowing" the one that the link pointer names.
    pub(crate) fn accessed_vmcs(&self) -> u64 {
        if self.vmx.non_root { self.vmcs(f::VMCS_LINK_POINTER) } else { self.vmx.current }
    }

    /// In VMX root operation?  Else hardware would raise #UD or exit; from outside: VMfailInvalid.
    fn in_root(&self) -> Result<(), VmFail> {
        if self.vmx.is_on && !self.vmx.non_root { Ok(()) } else { Err(VmFail(0)) }
    }
}

/// VMXON.
///
/// # Errors
/// 15 if in VMX operation already; VMfailInvalid for a bad region.
pub fn vmxon(core: &mut Core, region: u64) -> Result<(), VmFail> {
    if core.vmx.is_on {
        return Err(core.vm_fail(error::VMXON_IN_ROOT));
    }
    if !is_frame(region, 4096) || core.mem.load(region, 4) != u64::from(REVISION) {
        return Err(VmFail(0));
    }
    core.vmx = crate::vmx::Vmx { is_on: true, vmxon_region: region, ..crate::vmx::Vmx::default() };
    core.refresh();
    core.attention = 1;
    Ok(())
}

/// VMXOFF.
///
/// # Errors
/// VMfailInvalid outside VMX root operation.
pub fn vmxoff(core: &mut Core) -> Result<(), VmFail> {
    core.in_root()?;
    core.vmx = crate::vmx::Vmx::default();
    core.refresh();
    core.attention = 1;
    Ok(())
}

/// VMCLEAR.
///
/// # Errors
/// 2 for a bad address, 3 for the VMXON region.
pub fn vmclear(core: &mut Core, region: u64) -> Result<(), VmFail> {
    core.in_root()?;
    if !is_frame(region, 4096) {
        return Err(core.vm_fail(error::VMCLEAR_ADDRESS));
    }
    if region == core.vmx.vmxon_region {
        return Err(core.vm_fail(error::VMCLEAR_VMXON_POINTER));
    }
    core.mem.store(region.wrapping_add(f::LAUNCH_STATE), 4, 0);
    if core.vmx.current == region {
        core.vmx.current = NO_VMCS;
    }
    Ok(())
}

/// VMPTRLD.
///
/// # Errors
/// 9 for a bad address, 10 for the VMXON region, 11 for another revision.
pub fn vmptrld(core: &mut Core, region: u64) -> Result<(), VmFail> {
    core.in_root()?;
    if !is_frame(region, 4096) {
        return Err(core.vm_fail(error::VMPTRLD_ADDRESS));
    }
    if region == core.vmx.vmxon_region {
        return Err(core.vm_fail(error::VMPTRLD_VMXON_POINTER));
    }
    let revision = core.mem.load(region, 4) & u64::from(!f::SHADOW);
    if !core.mem.contains(region, 4096) || revision != u64::from(REVISION) {
        return Err(core.vm_fail(error::VMPTRLD_REVISION));
    }
    core.vmx.current = region;
    core.vmx.is_stale = true;
    Ok(())
}

/// VMPTRST: all ones if no VMCS is current.
///
/// # Errors
/// VMfailInvalid outside VMX root operation.
pub fn vmptrst(core: &Core) -> Result<u64, VmFail> {
    core.in_root()?;
    Ok(core.vmx.current)
}

/// VMREAD.
///
/// # Errors
/// VMfailInvalid without a current VMCS, 12 for a field that does not exist.
pub fn vmread(core: &mut Core, field: u32) -> Result<u64, VmFail> {
    core.in_root()?;
    read_field(core, field)
}

/// VMREAD, and VMREAD in a guest that "VMCS shadowing" lets go on.
pub(crate) fn read_field(core: &mut Core, field: u32) -> Result<u64, VmFail> {
    let vmcs = core.accessed_vmcs();
    if vmcs == NO_VMCS {
        return Err(VmFail(0));
    }
    let Some(at) = f::locate(field) else {
        return Err(core.fail_in(vmcs, error::UNSUPPORTED_FIELD));
    };
    let value = core.mem.load(vmcs.wrapping_add(at), 8);
    Ok(if field & 1 != 0 { value >> 32 } else { value & f::mask_of(field) })
}

/// VMWRITE.
///
/// # Errors
/// VMfailInvalid without a current VMCS, 12 for a field that does not exist, 13 for a read-only
/// one.
pub fn vmwrite(core: &mut Core, field: u32, value: u64) -> Result<(), VmFail> {
    core.in_root()?;
    write_field(core, field, value)
}

/// VMWRITE, and VMWRITE in a guest that "VMCS shadowing" lets go on.
pub(crate) fn write_field(core: &mut Core, field: u32, value: u64) -> Result<(), VmFail> {
    let vmcs = core.accessed_vmcs();
    if vmcs == NO_VMCS {
        return Err(VmFail(0));
    }
    let Some(at) = f::locate(field) else {
        return Err(core.fail_in(vmcs, error::UNSUPPORTED_FIELD));
    };
    match f::type_of(field) {
        Type::ExitInformation => return Err(core.fail_in(vmcs, error::READ_ONLY_FIELD)),
        Type::Guest => {}
        // These three are looked at at every VM entry.
        Type::Control
            if matches!(
                field,
                f::ENTRY_INTERRUPTION_INFORMATION
                    | f::ENTRY_EXCEPTION_ERROR_CODE
                    | f::ENTRY_INSTRUCTION_LENGTH
            ) => {}
        Type::Control | Type::Host => core.vmx.is_stale = true,
    }
    let place = vmcs.wrapping_add(at);
    if field & 1 != 0 {
        core.mem.store(place.wrapping_add(4), 4, value);
    } else {
        core.mem.store(place, 8, value & f::mask_of(field));
    }
    Ok(())
}

/// VMLAUNCH by host software outside.  `Some(exit)`: the entry failed on guest state, or ended at
/// once in a VM exit; `None`: the guest can run.
///
/// # Errors
/// VMfailInvalid, 4, 7, 8, 26.
pub fn vmlaunch(core: &mut Core) -> Result<Option<Exit>, VmFail> {
    entry::enter(core, true, true)
}

/// VMRESUME by host software outside; see [`vmlaunch`].
///
/// # Errors
/// VMfailInvalid, 5, 7, 8, 26.
pub fn vmresume(core: &mut Core) -> Result<Option<Exit>, VmFail> {
    entry::enter(core, false, true)
}

/// INVEPT.
///
/// # Errors
/// 28 for an unknown type, or (single-context) an EPT pointer that VM entry would refuse.
pub fn invept(core: &mut Core, kind: u64, eptp: u64) -> Result<(), VmFail> {
    core.in_root()?;
    match kind {
        1 if is_eptp(eptp) => {
            let root = eptp & !0xFFF;
            core.tlb.drop_spaces(|_, e, _| e == root, |_, e| e == root);
            core.tlb.caches.drop_ept(Some(root));
        }
        2 => {
            core.tlb.drop_spaces(|_, e, _| e != 0, |_, e| e != 0);
            core.tlb.caches.drop_ept(None);
        }
        _ => return Err(core.vm_fail(error::INVALID_INVALIDATION)),
    }
    core.refresh();
    Ok(())
}

/// INVVPID.
///
/// # Errors
/// 28 for an unknown type, VPID 0 (but for all-context), a VPID over 16 bits, an address that is
/// not canonical.
pub fn invvpid(core: &mut Core, kind: u64, vpid: u64, gva: u64) -> Result<(), VmFail> {
    core.in_root()?;
    let fits = match kind {
        0 => vpid != 0 && is_canonical(gva),
        1 | 3 => vpid != 0,
        2 => true,
        _ => false,
    };
    if !fits || vpid >> 16 != 0 {
        return Err(core.vm_fail(error::INVALID_INVALIDATION));
    }
    let v = vpid as u16;
    match kind {
        0 => core.tlb.invalidate_in(v, gva),
        1 => core.tlb.drop_spaces(|x, _, _| x == v, |x, _| x == v),
        2 => core.tlb.drop_spaces(|x, _, _| x != 0, |x, _| x != 0),
        _ => core.tlb.drop_spaces(|x, _, _| x == v, |_, _| false),
    }
    core.refresh();
    Ok(())
}
