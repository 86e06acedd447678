//! Checks on VMX controls and on the host-state area (SDM 3C, "Checks on VMX Controls and
//! Host-State Area"), in the manual's order.
//!
//! A broken rule comes back as a sentence; the caller makes VMfail 7 or 8 of it.

use crate::addr::PHYS_MASK;
use crate::arch::bits::{cr0, cr4, efer};
use crate::arch::exception::vector;
use crate::arch::vmcs as f;
use crate::cpu::cr::efer_bits;
use crate::cpu::pmu;
use crate::cpu::state::Core;
use crate::vmx::capabilities as cap;
use crate::vmx::controls::{Controls, entry, exit, pin, primary, secondary};

/// A rule that is broken, in words.
pub(crate) type Broken = &'static str;

pub(crate) fn rule(holds: bool, words: Broken) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(words) }
}

/// Whether a linear address is canonical.
#[must_use]
pub(crate) fn is_canonical(gva: u64) -> bool {
    (gva.cast_signed() << 16 >> 16).cast_unsigned() == gva
}

/// Whether `hpa` is a multiple of `align` inside the physical-address width.
pub(crate) fn is_frame(hpa: u64, align: u64) -> bool {
    hpa & (align - 1) == 0 && hpa & !PHYS_MASK == 0
}

/// Whether a value is allowed in IA32_PAT.
pub(crate) fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|b| matches!(b, 0 | 1 | 4 | 5 | 6 | 7))
}

/// Whether an EPT pointer would pass at VM entry (INVEPT asks, too).
pub(crate) fn is_eptp(eptp: u64) -> bool {
    matches!(eptp & 7, 0 | 6) && eptp >> 3 & 7 == 3 && eptp & 0xF80 == 0 && eptp & !PHYS_MASK == 0
}

/// SDM 3C, "VM-Execution Control Fields" (among the checks).
pub(crate) fn execution_controls(core: &Core, c: &Controls) -> Result<(), Broken> {
    use secondary as s;
    rule(cap::PIN.permits(c.pin), "reserved bits of the pin-based controls must be set properly")?;
    rule(cap::PRIMARY.permits(c.primary), "reserved bits of the primary controls must be set properly")?;
    rule(
        cap::SECONDARY.permits(c.secondary),
        "reserved bits of the secondary controls must be set properly",
    )?;
    rule(c.cr3_targets <= cap::CR3_TARGETS, "the CR3-target count must not exceed 4")?;
    if c.primary(primary::USE_IO_BITMAPS) {
        let both = is_frame(c.io_bitmap_a, 4096) && is_frame(c.io_bitmap_b, 4096);
        rule(both, "the I/O-bitmap addresses must be frames inside the physical-address width")?;
    }
    if c.primary(primary::USE_MSR_BITMAPS) {
        rule(is_frame(c.msr_bitmaps, 4096), "the MSR-bitmap address must be a frame inside the width")?;
    }
    if c.primary(primary::USE_TPR_SHADOW) {
        rule(is_frame(c.virtual_apic, 4096), "the virtual-APIC address must be a frame inside the width")?;
        let has_delivery = c.secondary(s::VIRTUAL_INTERRUPT_DELIVERY);
        rule(has_delivery || c.tpr_threshold & !0xF == 0, "bits 31:4 of the TPR threshold must be 0")?;
        if !has_delivery && !c.secondary(s::VIRTUALIZE_APIC_ACCESSES) {
            let vtpr = core.mem.load(c.virtual_apic + 0x80, 1) >> 4;
            rule(c.tpr_threshold <= vtpr, "the TPR threshold must not exceed VTPR[7:4]")?;
        }
    } else {
        let needs =
            s::VIRTUALIZE_X2APIC_MODE | s::APIC_REGISTER_VIRTUALIZATION | s::VIRTUAL_INTERRUPT_DELIVERY;
        rule(!c.secondary(needs), "APIC virtualization needs \"use TPR shadow\"")?;
    }
    let virtual_nmis = c.pin(pin::VIRTUAL_NMIS);
    rule(c.pin(pin::NMI_EXITING) || !virtual_nmis, "\"virtual NMIs\" needs \"NMI exiting\"")?;
    let window = c.primary(primary::NMI_WINDOW_EXITING);
    rule(virtual_nmis || !window, "\"NMI-window exiting\" needs \"virtual NMIs\"")?;
    if c.secondary(s::VIRTUALIZE_APIC_ACCESSES) {
        rule(is_frame(c.apic_access, 4096), "the APIC-access address must be a frame inside the width")?;
    }
    virtual_interrupts(c)?;
    if c.secondary(s::ENABLE_VPID) {
        rule(c.vpid != 0, "the VPID must not be 0 if \"enable VPID\" is 1")?;
    }
    if c.secondary(s::ENABLE_EPT) {
        rule(
            is_eptp(c.eptp),
            "the EPT pointer must have memory type 0 or 6, walk length 4, no reserved bit",
        )?;
    }
    if c.secondary(s::VMCS_SHADOWING) {
        let both = is_frame(c.vmread_bitmap, 4096) && is_frame(c.vmwrite_bitmap, 4096);
        rule(both, "the VMREAD and VMWRITE bitmaps must be frames inside the width")?;
    }
    if c.secondary(s::ENABLE_PML) {
        rule(c.secondary(s::ENABLE_EPT), "\"enable PML\" needs \"enable EPT\"")?;
        rule(is_frame(c.pml_address, 4096), "the PML address must be a frame inside the width")?;
    }
    let needs = c.secondary(s::UNRESTRICTED_GUEST | s::MODE_BASED_EXECUTE);
    rule(
        c.secondary(s::ENABLE_EPT) || !needs,
        "\"unrestricted guest\" and \"mode-based execute control\" need \"enable EPT\"",
    )
}

/// The rules of virtual interrupts among them.
fn virtual_interrupts(c: &Controls) -> Result<(), Broken> {
    use secondary as s;
    let both = c.secondary(s::VIRTUALIZE_X2APIC_MODE) && c.secondary(s::VIRTUALIZE_APIC_ACCESSES);
    rule(!both, "\"virtualize x2APIC mode\" and \"virtualize APIC accesses\" exclude each other")?;
    let has_delivery = c.secondary(s::VIRTUAL_INTERRUPT_DELIVERY);
    let exits = c.pin(pin::EXTERNAL_INTERRUPT_EXITING);
    rule(exits || !has_delivery, "\"virtual-interrupt delivery\" needs \"external-interrupt exiting\"")?;
    if !c.pin(pin::PROCESS_POSTED_INTERRUPTS) {
        return Ok(());
    }
    rule(has_delivery, "\"process posted interrupts\" needs \"virtual-interrupt delivery\"")?;
    let acknowledges = c.exit(exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT);
    rule(acknowledges, "\"process posted interrupts\" needs \"acknowledge interrupt on exit\"")?;
    rule(c.notification_vector <= 0xFF, "bits 15:8 of the notification vector must be 0")?;
    rule(is_frame(c.posted_descriptor, 64), "the posted-interrupt descriptor must be aligned and inside")
}

fn is_msr_list(count: u64, address: u64) -> bool {
    count == 0 || (is_frame(address, 16) && (address + 16 * count - 1) & !PHYS_MASK == 0)
}

/// SDM 3C, "VM-Exit Control Fields" (among the checks).
pub(crate) fn exit_controls(core: &Core, c: &Controls) -> Result<(), Broken> {
    rule(cap::EXIT.permits(c.exit), "reserved bits of the VM-exit controls must be set properly")?;
    let timer = c.pin(pin::ACTIVATE_PREEMPTION_TIMER);
    rule(
        timer || !c.exit(exit::SAVE_PREEMPTION_TIMER),
        "\"save VMX-preemption timer value\" needs \"activate VMX-preemption timer\"",
    )?;
    let store = core.vmcs(f::EXIT_MSR_STORE_ADDRESS);
    rule(is_msr_list(c.exit_store_count, store), "the VM-exit MSR-store list must be aligned and inside")?;
    let load = core.vmcs(f::EXIT_MSR_LOAD_ADDRESS);
    rule(is_msr_list(c.exit_load_count, load), "the VM-exit MSR-load list must be aligned and inside")
}

/// SDM 3C, "VM-Entry Control Fields" (among the checks), without event injection.
pub(crate) fn entry_controls(core: &Core, c: &Controls) -> Result<(), Broken> {
    rule(cap::ENTRY.permits(c.entry), "reserved bits of the VM-entry controls must be set properly")?;
    let load = core.vmcs(f::ENTRY_MSR_LOAD_ADDRESS);
    rule(is_msr_list(c.entry_load_count, load), "the VM-entry MSR-load list must be aligned and inside")
}

/// Whether a hardware exception pushes an error code.
pub(crate) const fn has_error_code(v: u8) -> bool {
    matches!(v, vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC)
}

/// The VM-entry interruption-information field (checked at every entry).
pub(crate) fn injection(core: &Core, c: &Controls, info: u64) -> Result<(), Broken> {
    if info >> 31 & 1 == 0 {
        return Ok(());
    }
    let (kind, v, with_code) = (info >> 8 & 7, info as u8, info >> 11 & 1 != 0);
    rule(kind != 1, "the interruption type 1 is reserved")?;
    let fits = match kind {
        2 => v == 2,
        3 => v <= 31,
        7 => v == 0,
        _ => true,
    };
    rule(fits, "the vector must fit the interruption type")?;
    let protected = !c.secondary(secondary::UNRESTRICTED_GUEST) || core.vmcs(f::GUEST_CR0) & cr0::PE != 0;
    let expected = protected && kind == 3 && has_error_code(v);
    rule(with_code == expected, "an error code is delivered exactly for the exceptions that have one")?;
    rule(info & 0x7FFF_F000 == 0, "bits 30:12 of the interruption information must be 0")?;
    if with_code {
        let code = core.vmcs(f::ENTRY_EXCEPTION_ERROR_CODE);
        rule(code >> 16 == 0, "bits 31:16 of the exception error code must be 0")?;
    }
    if matches!(kind, 4..=6) {
        let length = core.vmcs(f::ENTRY_INSTRUCTION_LENGTH);
        rule((1..=15).contains(&length), "the instruction length of a software event must be 1 to 15")?;
    }
    Ok(())
}

/// SDM 3C, "Checks on Host Control Registers, MSRs, and SSP" to "Checks Related to Address-Space
/// Size".
pub(crate) fn host_state(core: &Core, c: &Controls) -> Result<(), Broken> {
    let h = |field| core.vmcs(field);
    let has64 = c.exit(exit::HOST_ADDRESS_SPACE_SIZE);
    let fixed = |v: u64, f0: u64, f1: u64| v & f0 == f0 && v & !f1 == 0;
    rule(fixed(h(f::HOST_CR0), cap::CR0_FIXED0, cap::CR0_FIXED1), "host CR0 has a value VMX refuses")?;
    let host_cr4 = h(f::HOST_CR4);
    rule(fixed(host_cr4, cap::CR4_FIXED0, cap::CR4_FIXED1), "host CR4 has a value VMX refuses")?;
    rule(h(f::HOST_CR3) & !PHYS_MASK == 0, "host CR3 exceeds the physical-address width")?;
    let canonical = [f::HOST_SYSENTER_ESP, f::HOST_SYSENTER_EIP].iter().all(|&field| is_canonical(h(field)));
    rule(canonical, "host IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical")?;
    if c.exit(exit::LOAD_PERF_GLOBAL_CTRL) {
        let global = h(f::HOST_PERF_GLOBAL_CTRL);
        rule(global & !pmu::GLOBAL == 0, "host IA32_PERF_GLOBAL_CTRL sets a reserved bit")?;
    }
    if c.exit(exit::LOAD_PKRS) {
        rule(h(f::HOST_PKRS) >> 32 == 0, "host IA32_PKRS sets a reserved bit")?;
    }
    if c.exit(exit::LOAD_PAT) {
        rule(is_pat(h(f::HOST_PAT)), "host IA32_PAT names a reserved memory type")?;
    }
    if c.exit(exit::LOAD_EFER) {
        let e = h(f::HOST_EFER);
        rule(e & !efer_bits(core) == 0, "host IA32_EFER sets a reserved bit")?;
        let long = (e & efer::LMA != 0, e & efer::LME != 0);
        rule(long == (has64, has64), "host IA32_EFER.LMA and LME must equal \"host address-space size\"")?;
    }
    let selectors = [f::HOST_ES, f::HOST_CS, f::HOST_SS, f::HOST_DS, f::HOST_FS, f::HOST_GS, f::HOST_TR];
    rule(selectors.iter().all(|&s| h(s) & 7 == 0), "TI and RPL of host selectors must be 0")?;
    rule(h(f::HOST_CS) != 0 && h(f::HOST_TR) != 0, "host CS and TR must not be null")?;
    rule(has64 || h(f::HOST_SS) != 0, "host SS must not be null for a 32-bit host")?;
    let bases = [f::HOST_FS_BASE, f::HOST_GS_BASE, f::HOST_GDTR_BASE, f::HOST_IDTR_BASE, f::HOST_TR_BASE];
    rule(bases.iter().all(|&b| is_canonical(h(b))), "host base addresses must be canonical")?;
    let guest64 = c.entry(entry::IA32E_MODE_GUEST);
    if core.is_long() {
        rule(has64, "\"host address-space size\" must be 1 in IA-32e mode")?;
    } else {
        rule(!has64, "\"host address-space size\" must be 0 outside IA-32e mode")?;
        rule(!guest64, "\"IA-32e mode guest\" must be 0 outside IA-32e mode")?;
    }
    if has64 {
        rule(host_cr4 & cr4::PAE != 0, "host CR4.PAE must be 1 for a 64-bit host")?;
        rule(is_canonical(h(f::HOST_RIP)), "host RIP must be canonical")
    } else {
        rule(!guest64, "\"IA-32e mode guest\" must be 0 for a 32-bit host")?;
        rule(host_cr4 & cr4::PCIDE == 0, "host CR4.PCIDE must be 0 for a 32-bit host")?;
        rule(h(f::HOST_RIP) >> 32 == 0, "bits 63:32 of host RIP must be 0 for a 32-bit host")
    }
}
