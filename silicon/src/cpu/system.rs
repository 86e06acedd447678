//! System instructions: which file executes which, and those that are small enough to stay here.
//!
//! Order inside every one of them: #UD, privilege, VM exit, the other faults, then the effect
//! (SDM 3C, "Relative Priority of Faults and VM Exits").

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::arch::bits::{cr4, rflags};
use crate::arch::segment::seg;
use crate::cpu::operand::{address_mask, ea, linear_at, read_op, segment_of, set_reg};
use crate::cpu::segment::is_canonical;
use crate::cpu::state::{Activity, Core, Mode};
use crate::cpu::trap::{Exec, gp, ud};
use crate::cpu::{cr, debug, descriptors, flag_control, io, keys, msr, pmu, random, ring0, syscall, xsave};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;
use crate::vmx::execute::{self as vmx, displacement, information};
use crate::vmx::intercept::Sensitive;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

/// Execute an instruction of this group.
///
/// # Errors
/// What the instruction raises.
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Mov => moves(core, insn),
        M::Push
        | M::Pop
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Lgdt
        | M::Lidt
        | M::Sgdt
        | M::Sidt
        | M::Lldt
        | M::Ltr
        | M::Sldt
        | M::Str
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Arpl => descriptors::execute(core, insn),
        M::Clts | M::Lmsw | M::Smsw => cr::execute(core, insn),
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            io::execute(core, insn)
        }
        M::Cli
        | M::Sti
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Clac
        | M::Stac => flag_control::execute(core, insn),
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => {
            syscall::execute(core, insn)
        }
        M::Swapgs | M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => {
            syscall::segment_bases(core, insn)
        }
        M::Rdmsr | M::Wrmsr => msr::execute(core, insn),
        M::Rdrand | M::Rdseed => random::execute(core, insn),
        M::Cpuid => cpuid(core, insn),
        M::Hlt => hlt(core, insn),
        M::Invd => privileged(core, insn, Sensitive::Invd),
        M::Wbinvd => privileged(core, insn, Sensitive::Wbinvd),
        M::Invlpg => invlpg(core, insn),
        M::Invpcid => invpcid(core, insn),
        M::Rdpid | M::Rdtscp if !core.vmx.has_rdtscp() => Err(ud()),
        M::Rdpid => {
            let aux = core.msr.tsc_aux;
            set_reg(core, insn.op0_register(), aux);
            Ok(())
        }
        M::Rdtsc | M::Rdtscp => rdtsc(core, insn),
        M::Rdpmc => rdpmc(core, insn),
        M::Pause => core.intercept(Sensitive::Pause, insn.len() as u32),
        M::Monitor => monitor(core, insn),
        M::Mwait => {
            unprivileged_is_ud(core)?;
            core.intercept(Sensitive::Mwait, insn.len() as u32)
        }
        M::Rsm => {
            core.intercept(Sensitive::Rsm, insn.len() as u32)?;
            Err(ud())
        }
        M::Vmcall
        | M::Vmclear
        | M::Vmlaunch
        | M::Vmptrld
        | M::Vmptrst
        | M::Vmread
        | M::Vmresume
        | M::Vmwrite
        | M::Vmxoff
        | M::Vmxon
        | M::Invept
        | M::Invvpid => vmx::execute(core, insn),
        M::Rdpkru | M::Wrpkru => keys::execute(core, insn),
        M::Xgetbv | M::Xsetbv => xsave::registers(core, insn),
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64 => xsave::execute(core, insn),
        _ => Err(ud()),
    }
}

/// #GP(0) unless at privilege level 0.
pub(crate) fn require_level_0(core: &Core) -> Exec<()> {
    if core.cpl == 0 { Ok(()) } else { Err(gp(0)) }
}

/// Instructions that exist only at level 0.
fn unprivileged_is_ud(core: &Core) -> Exec<()> {
    if core.cpl == 0 { Ok(()) } else { Err(ud()) }
}

/// A privileged instruction whose only visible effect is its VM exit.
fn privileged(core: &mut Core, insn: &Instruction, what: Sensitive) -> Exec<()> {
    require_level_0(core)?;
    core.intercept(what, insn.len() as u32)
}

fn moves(core: &mut Core, insn: &Instruction) -> Exec<()> {
    for i in 0..2 {
        let r = insn.op_register(i);
        if insn.op_kind(i) != OpKind::Register {
            continue;
        }
        if r.is_cr() {
            return cr::moves(core, insn, i == 0);
        }
        if r.is_dr() {
            return debug::moves(core, insn, i == 0);
        }
        if r.is_segment_register() {
            return descriptors::moves(core, insn, i == 0);
        }
    }
    Err(ud())
}

fn cpuid(core: &mut Core, insn: &Instruction) -> Exec<()> {
    if ring0::is_below(core) {
        return Err(gp(0));
    }
    core.intercept(Sensitive::Cpuid, insn.len() as u32)?;
    let (leaf, subleaf) = (core.gpr[RAX] as u32, core.gpr[RCX] as u32);
    // Leaves without subleaves ignore ECX.
    let has_subleaves = matches!(leaf, 4 | 7 | 0xB | 0xD | 0xF | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1F);
    let key = (leaf, if has_subleaves { subleaf } else { 0 });
    let mut words = core.cpuid.get(&key).copied().unwrap_or_default();
    follow_registers(core, leaf, subleaf, &mut words);
    for (r, word) in [RAX, RBX, RCX, RDX].into_iter().zip(words) {
        core.gpr[r] = u64::from(word);
    }
    Ok(())
}

/// What CPUID shows of features that registers turn off or on (SDM 3A, "Enabling or Disabling the Local
/// APIC"; SDM 4, IA32_MISC_ENABLE).
fn follow_registers(core: &Core, leaf: u32, subleaf: u32, words: &mut [u32; 4]) {
    const APIC: u32 = 1 << 9;
    const NX: u32 = 1 << 20;
    const MONITOR: u32 = 1 << 3;
    const OSXSAVE: u32 = 1 << 27;
    /// XSAVEC or XSAVES.
    const COMPACTING: u32 = 1 << 1 | 1 << 3;
    const OSPKE: u32 = 1 << 4;
    let misc = core.msr.misc_enable;
    match leaf {
        0 if misc & msr::MISC_LIMIT_CPUID != 0 => words[0] = words[0].min(2),
        1 => {
            if !core.apic.is_enabled() {
                words[3] &= !APIC;
            }
            if misc & msr::MISC_MONITOR == 0 {
                words[2] &= !MONITOR;
            }
            words[2] &= !OSXSAVE;
            if core.cr4 & cr4::OSXSAVE != 0 {
                words[2] |= OSXSAVE;
            }
        }
        7 if subleaf == 0 => {
            words[2] &= !OSPKE;
            if core.cr4 & cr4::PKE != 0 {
                words[2] |= OSPKE;
            }
        }
        // How large an area is of which format, for the components that are enabled now.
        0xD if subleaf == 0 && words[0] != 0 => words[1] = xsave::standard_bytes(core.xcr0),
        0xD if subleaf == 1 && words[0] & COMPACTING != 0 => {
            words[1] = xsave::compacted_bytes(core.xcr0 | core.msr.xss);
        }
        0x8000_0001 if misc & msr::MISC_XD_DISABLE != 0 => words[3] &= !NX,
        _ => {}
    }
}

fn hlt(core: &mut Core, insn: &Instruction) -> Exec<()> {
    privileged(core, insn, Sensitive::Hlt)?;
    core.activity = Activity::Hlt;
    core.attention = 1;
    Ok(())
}

/// A hint that nothing depends on: the address must be one that can be read.
fn monitor(core: &mut Core, insn: &Instruction) -> Exec<()> {
    unprivileged_is_ud(core)?;
    core.intercept(Sensitive::Monitor, insn.len() as u32)?;
    if core.gpr[RCX] as u32 != 0 {
        return Err(gp(0));
    }
    let index = match insn.segment_prefix() {
        iced_x86::Register::None => seg::DS,
        r => r.number(),
    };
    let mask = match insn.op0_register().size() {
        2 => 0xFFFF,
        8 => u64::MAX,
        _ => 0xFFFF_FFFF,
    };
    let offset = core.gpr[RAX] & mask;
    let gva = linear_at(core, index, offset, 1, Access::Read)?;
    core.translate(gva, Access::Read)?;
    Ok(())
}

fn invlpg(core: &mut Core, insn: &Instruction) -> Exec<()> {
    require_level_0(core)?;
    let (index, offset) = (segment_of(insn), ea(core, insn));
    let base = if core.mode == Mode::Bits64 && index < seg::FS { 0 } else { core.seg[index].base };
    let gva = core.linear_add(base, offset);
    core.intercept(Sensitive::Invlpg { gva }, insn.len() as u32)?;
    invalidate(core, gva);
    Ok(())
}

/// Drop what is cached of the translation of a page.
pub(crate) fn invalidate(core: &mut Core, gva: u64) {
    if is_canonical(gva) {
        let before = fetches_from(core);
        core.tlb.invalidate(gva);
        look_again(core, before);
    }
}

/// What tells whether translations for fetches went.
fn fetches_from(core: &Core) -> (u32, u32, u64) {
    (core.tlb.asn, core.tlb.global_asn, core.tlb.fetch_epoch)
}

/// If translations for fetches went, the next instruction has to be fetched anew.
fn look_again(core: &mut Core, before: (u32, u32, u64)) {
    if fetches_from(core) != before {
        core.attention = 1;
    }
}

fn invpcid(core: &mut Core, insn: &Instruction) -> Exec<()> {
    if core.mode == Mode::V86 {
        return Err(gp(0));
    }
    require_level_0(core)?;
    let info = information(insn);
    let displacement = displacement(insn);
    core.intercept(Sensitive::Invpcid { displacement, info }, insn.len() as u32)?;
    let kind = read_op(core, insn, 0)?;
    let (index, offset) = (segment_of(insn), ea(core, insn));
    let place = linear_at(core, index, offset, 8, Access::Read)?;
    let pcid = core.read_lin(place, 8, Who::Program)?;
    let offset = offset.wrapping_add(8) & address_mask(insn);
    let place = linear_at(core, index, offset, 8, Access::Read)?;
    let gva = core.read_lin(place, 8, Who::Program)?;
    let has_pcids = core.cr4 & cr4::PCIDE != 0;
    let is_bad =
        kind > 3 || pcid > 0xFFF || kind == 0 && !is_canonical(gva) || kind < 2 && !has_pcids && pcid != 0;
    if is_bad {
        return Err(gp(0));
    }
    let vpid = core.vmx.vpid;
    let current = if has_pcids { core.cr3 & 0xFFF } else { 0 };
    let before = fetches_from(core);
    match kind {
        0 if pcid == current => core.tlb.invalidate(gva),
        // One address of another space: dropping all of that space is allowed, too.
        0 | 1 => core.tlb.drop_spaces(|v, _, p| v == vpid && u64::from(p) == pcid, |_, _| false),
        2 => core.flush_guest(),
        _ => core.tlb.drop_spaces(|v, _, _| v == vpid, |_, _| false),
    }
    core.refresh();
    look_again(core, before);
    Ok(())
}

impl Core {
    /// The TSC that software sees: with IA32_TSC_ADJUST and, in a guest, the VMCS's offset.
    #[must_use]
    pub fn visible_tsc(&self) -> u64 {
        self.tsc().wrapping_add(self.msr.tsc_adjust).wrapping_add(self.tsc_offset())
    }
}

fn rdtsc(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let is_p = insn.mnemonic() == Mnemonic::Rdtscp;
    if core.cr4 & cr4::TSD != 0 && core.cpl != 0 {
        return Err(gp(0));
    }
    let what = if is_p { Sensitive::Rdtscp } else { Sensitive::Rdtsc };
    core.intercept(what, insn.len() as u32)?;
    let tsc = core.visible_tsc();
    core.gpr[RAX] = tsc & 0xFFFF_FFFF;
    core.gpr[RDX] = tsc >> 32;
    if is_p {
        core.gpr[RCX] = core.msr.tsc_aux & 0xFFFF_FFFF;
    }
    Ok(())
}

/// #GP for an index that no counter of performance has.
fn rdpmc(core: &mut Core, insn: &Instruction) -> Exec<()> {
    if core.cr4 & cr4::PCE == 0 && core.cpl != 0 {
        return Err(gp(0));
    }
    core.intercept(Sensitive::Rdpmc, insn.len() as u32)?;
    let counter = core.gpr[RCX] as u32;
    let value = pmu::read_counter(core, counter).ok_or_else(|| gp(0))?;
    core.gpr[RAX] = value & 0xFFFF_FFFF;
    core.gpr[RDX] = value >> 32;
    Ok(())
}

/// The flags that wait in R11 or a stack image may let interrupts in or start single-stepping.
pub(crate) fn flags_changed(core: &mut Core, before: u64) {
    if core.rflags & !before & (rflags::IF | rflags::TF) != 0 {
        core.attention = 1;
    }
}
