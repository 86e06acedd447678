//! Checks on the guest-state area (SDM 3C, "Checks on the Guest State Area"), in the manual's
//! order.  A broken rule is a failed VM entry: exit reason 33 with a qualification.

use crate::addr::PHYS_MASK;
use crate::arch::bits::{cr0, cr4, efer, rflags};
use crate::arch::segment::{attr, seg};
use crate::arch::vmcs as f;
use crate::cpu::cr::efer_bits;
use crate::cpu::pmu;
use crate::cpu::state::Core;
use crate::vmx::capabilities as cap;
use crate::vmx::checks::{Broken, is_canonical, is_frame, is_pat, rule};
use crate::vmx::checks_segments::{self, Circumstances};
use crate::vmx::controls::{Controls, entry, pin, secondary};
use crate::vmx::entry::GuestState;

/// Bits of IA32_DEBUGCTL that may be 1: LBR, BTF.
pub(crate) const DEBUGCTL_KNOWN: u64 = 3 | pmu::FREEZE_BITS;
/// PDPTE bits that must be 0 in a present entry of PAE paging.
pub(crate) const PDPTE_RESERVED: u64 = 0x1E6 | !PHYS_MASK;

/// Exit qualifications of a VM entry that failed on guest state ("VM-Entry Failures During or
/// After Loading Guest State").
pub(crate) mod why {
    pub const DEFAULT: u64 = 0;
    pub const PDPTE: u64 = 2;
    pub const NMI: u64 = 3;
    pub const LINK_POINTER: u64 = 4;
}

/// Exit qualification and the rule.
pub(crate) type Failure = (u64, Broken);

/// All checks; `info` is the VM-entry interruption information.
pub(crate) fn check(core: &Core, c: &Controls, g: &GuestState, info: u64) -> Result<(), Failure> {
    let default = |words| (why::DEFAULT, words);
    control_registers(core, c, g).map_err(default)?;
    let circumstances = Circumstances {
        v86: g.rflags & rflags::VM != 0,
        unrestricted: c.secondary(secondary::UNRESTRICTED_GUEST),
        long: c.entry(entry::IA32E_MODE_GUEST),
        protected: g.cr0 & cr0::PE != 0,
    };
    checks_segments::check(&g.seg, &g.ldtr, &g.tr, &circumstances).map_err(default)?;
    tables(g).map_err(default)?;
    instruction_pointer(c, g, info).map_err(default)?;
    non_register(c, g, info)?;
    link_pointer(core, c, g).map_err(|words| (why::LINK_POINTER, words))?;
    pdptes(core, c, g).map_err(|words| (why::PDPTE, words))
}

fn control_registers(core: &Core, c: &Controls, g: &GuestState) -> Result<(), Broken> {
    let exempt = if c.secondary(secondary::UNRESTRICTED_GUEST) { cr0::PE | cr0::PG } else { 0 };
    let must = cap::CR0_FIXED0 & !exempt;
    rule(g.cr0 & must == must && g.cr0 & !cap::CR0_FIXED1 == 0, "guest CR0 has a value VMX refuses")?;
    rule(g.cr0 & cr0::PG == 0 || g.cr0 & cr0::PE != 0, "guest CR0.PG needs CR0.PE")?;
    let cr4_fits = g.cr4 & cap::CR4_FIXED0 == cap::CR4_FIXED0 && g.cr4 & !cap::CR4_FIXED1 == 0;
    rule(cr4_fits, "guest CR4 has a value VMX refuses")?;
    let debug = c.entry(entry::LOAD_DEBUG_CONTROLS);
    if debug {
        rule(g.debugctl & !DEBUGCTL_KNOWN == 0, "guest IA32_DEBUGCTL sets a reserved bit")?;
    }
    let long = c.entry(entry::IA32E_MODE_GUEST);
    if long {
        let pages = g.cr0 & cr0::PG != 0 && g.cr4 & cr4::PAE != 0;
        rule(pages, "\"IA-32e mode guest\" needs CR0.PG and CR4.PAE")?;
    } else {
        rule(g.cr4 & cr4::PCIDE == 0, "guest CR4.PCIDE needs \"IA-32e mode guest\"")?;
    }
    rule(g.cr3 & !PHYS_MASK == 0, "guest CR3 exceeds the physical-address width")?;
    if debug {
        rule(g.dr7 >> 32 == 0, "bits 63:32 of guest DR7 must be 0")?;
    }
    let sysenter = is_canonical(g.sysenter_esp) && is_canonical(g.sysenter_eip);
    rule(sysenter, "guest IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical")?;
    if c.entry(entry::LOAD_PERF_GLOBAL_CTRL) {
        rule(g.perf_global_ctrl & !pmu::GLOBAL == 0, "guest IA32_PERF_GLOBAL_CTRL sets a reserved bit")?;
    }
    if c.entry(entry::LOAD_PKRS) {
        rule(g.pkrs >> 32 == 0, "guest IA32_PKRS sets a reserved bit")?;
    }
    if c.entry(entry::LOAD_PAT) {
        rule(is_pat(g.pat), "guest IA32_PAT names a reserved memory type")?;
    }
    if c.entry(entry::LOAD_EFER) {
        rule(g.efer & !efer_bits(core) == 0, "guest IA32_EFER sets a reserved bit")?;
        let lma = g.efer & efer::LMA != 0;
        rule(lma == long, "guest IA32_EFER.LMA must equal \"IA-32e mode guest\"")?;
        let agree = g.cr0 & cr0::PG == 0 || lma == (g.efer & efer::LME != 0);
        rule(agree, "guest IA32_EFER.LME must equal LMA if CR0.PG is 1")?;
    }
    Ok(())
}

fn tables(g: &GuestState) -> Result<(), Broken> {
    let canonical = is_canonical(g.gdtr_base) && is_canonical(g.idtr_base);
    rule(canonical, "guest GDTR and IDTR bases must be canonical")?;
    rule(g.gdtr_limit >> 16 == 0 && g.idtr_limit >> 16 == 0, "guest GDTR and IDTR limits exceed 16 bits")
}

fn instruction_pointer(c: &Controls, g: &GuestState, info: u64) -> Result<(), Broken> {
    let long = c.entry(entry::IA32E_MODE_GUEST);
    if long && g.seg[seg::CS].has(attr::L) {
        // Not more: after the last byte of the lower half RIP is not canonical, and the next fetch
        // faults.
        rule(matches!(g.rip >> 48, 0 | 0xFFFF), "bits 63:48 of guest RIP must be identical")?;
    } else {
        rule(g.rip >> 32 == 0, "bits 63:32 of guest RIP must be 0 outside 64-bit mode")?;
    }
    const RESERVED: u64 = !0x3F_FFFF | 1 << 15 | 1 << 5 | 1 << 3;
    let reserved = g.rflags & RESERVED == 0 && g.rflags & rflags::FIXED1 != 0;
    rule(reserved, "reserved bits of guest RFLAGS must be set properly")?;
    let v86 = g.rflags & rflags::VM != 0;
    rule(!v86 || !long && g.cr0 & cr0::PE != 0, "guest RFLAGS.VM must be 0 in IA-32e and real-address mode")?;
    let is_external = info >> 31 & 1 != 0 && info >> 8 & 7 == 0;
    rule(!is_external || g.rflags & rflags::IF != 0, "injecting an external interrupt needs RFLAGS.IF")
}

const STI: u64 = 1;
const MOV_SS: u64 = 2;
const BY_NMI: u64 = 8;

fn non_register(c: &Controls, g: &GuestState, info: u64) -> Result<(), Failure> {
    let default = |holds, words| rule(holds, words).map_err(|w| (why::DEFAULT, w));
    let (is_valid, kind, v) = (info >> 31 & 1 != 0, info >> 8 & 7, info & 0xFF);
    let i = g.interruptibility;
    default(g.activity <= 1, "guest activity state must be active or HLT")?;
    let halted = g.activity == 1;
    default(!halted || g.seg[seg::SS].dpl() == 0, "guest activity state HLT needs SS.DPL 0")?;
    default(!halted || i & (STI | MOV_SS) == 0, "guest activity state must be active under STI or MOV SS")?;
    if is_valid && halted {
        let wakes = match kind {
            0 | 2 => true,
            3 => v == 1 || v == 18,
            7 => v == 0,
            _ => false,
        };
        default(wakes, "the injected event cannot occur in the HLT state")?;
    }
    default(i & !0x1F == 0, "reserved bits of the interruptibility state must be 0")?;
    default(i & 3 != 3, "blocking by STI and by MOV SS exclude each other")?;
    default(i & STI == 0 || g.rflags & rflags::IF != 0, "blocking by STI needs RFLAGS.IF")?;
    let external = is_valid && kind == 0;
    default(!external || i & 3 == 0, "an external interrupt cannot be injected under STI or MOV SS")?;
    let nmi = is_valid && kind == 2;
    rule(!nmi || i & MOV_SS == 0, "an NMI cannot be injected under MOV SS").map_err(|w| (why::NMI, w))?;
    default(i & 4 == 0, "blocking by SMI is impossible outside SMM")?;
    let blocked = c.pin(pin::VIRTUAL_NMIS) && i & BY_NMI != 0;
    default(!nmi || !blocked, "an NMI cannot be injected under virtual-NMI blocking")?;
    default(i & 0x10 == 0, "enclave interruption is not supported")?;
    let p = g.pending_debug;
    default(p & (0xFF0 | 1 << 13 | !0x7FFF) == 0, "reserved pending debug exceptions must be 0")?;
    if i & 3 != 0 || halted {
        let steps = g.rflags & rflags::TF != 0 && g.debugctl & 2 == 0;
        default(steps == (p >> 14 & 1 != 0), "pending BS must equal RFLAGS.TF without BTF under a shadow")?;
    }
    Ok(())
}

fn link_pointer(core: &Core, c: &Controls, g: &GuestState) -> Result<(), Broken> {
    if g.link_pointer == u64::MAX {
        return Ok(());
    }
    rule(is_frame(g.link_pointer, 4096), "the VMCS link pointer must be a frame, or all ones")?;
    rule(g.link_pointer != core.vmx.current, "the VMCS link pointer must not be the current VMCS")?;
    let revision = core.mem.load(g.link_pointer, 4);
    let shadow = u64::from(f::SHADOW);
    rule(
        revision & !shadow == u64::from(f::REVISION),
        "the linked VMCS must have this processor's revision",
    )?;
    let is_shadow = revision & shadow != 0;
    let has_shadowing = c.secondary(secondary::VMCS_SHADOWING);
    rule(is_shadow == has_shadowing, "the linked VMCS must be a shadow VMCS exactly under \"VMCS shadowing\"")
}

/// "Checks on Guest Page-Directory-Pointer-Table Entries".
fn pdptes(core: &Core, c: &Controls, g: &GuestState) -> Result<(), Broken> {
    if !g.uses_pdptes(c) {
        return Ok(());
    }
    let entries = if c.secondary(secondary::ENABLE_EPT) { g.pdpte } else { pdptes_at(core, g.cr3) };
    rule(are_pdptes(&entries), "a present guest PDPTE sets reserved bits")
}

/// The four entries in memory that CR3 names, without EPT.
pub(crate) fn pdptes_at(core: &Core, cr3: u64) -> [u64; 4] {
    [0, 8, 16, 24].map(|i| core.mem.load((cr3 & 0xFFFF_FFE0) + i, 8))
}

/// Whether the present ones set no reserved bit.
pub(crate) fn are_pdptes(entries: &[u64; 4]) -> bool {
    entries.iter().all(|e| e & 1 == 0 || e & PDPTE_RESERVED == 0)
}
