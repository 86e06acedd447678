//! One instruction.
//!
//! While an instruction executes, [`Core::rip`] already names the one after it: branches
//! overwrite it, and whoever needs the address of the instruction itself asks
//! `Instruction::ip()`.  When it ends with a trap, RIP and the interrupt shadow are put back here
//! (except for a trap-class exception, which comes after the instruction).

use std::mem::take;

use iced_x86::{FlowControl, Instruction, Mnemonic};

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::bits::cr4;
use crate::arch::bits::rflags::{RF, TF};
use crate::arch::exception::{Exception, vector};
use crate::arch::segment::{attr, seg};
use crate::cpu::decode::{self, Execute, FetchKey, MAX_LENGTH, Verdict};
use crate::cpu::ring0;
use crate::cpu::segment;
use crate::cpu::state::{Core, Mode, Shadow};
use crate::cpu::trap::{Exec, Trap, gp, ud};
use crate::mmu::walk::Access;

/// DR6.BS: single step.
const BS: u64 = 1 << 14;
/// IA32_DEBUGCTL: single-step on branches.
pub(crate) const BTF: u64 = 1 << 1;
/// DR6.B0 … B3: the conditions that can be held back by MOV SS and POP SS.
const HELD_MARKS: u64 = 0xF;

/// Fetch, decode and execute one instruction; on success RIP names the next one and
/// `countdown` went down by one.
///
/// # Errors
/// The trap that stopped it.
pub fn step(core: &mut Core) -> Exec<()> {
    if core.rflags & (TF | RF) != 0 || core.dr[7] & 0xFF != 0 || core.pending_db != 0 {
        return step_debugged(core);
    }
    let shadow = take(&mut core.shadow);
    core.shadowed = shadow;
    let rip = core.rip;
    let result = fetch(core).and_then(|(insn, execute)| {
        ring0::check(core, &insn)?;
        core.rip = next(core, &insn);
        execute(core, &insn)
    });
    finish(core, result, rip, shadow)
}

/// As [`step`], for an instruction that was fetched and decoded before, and still is what stands
/// at RIP.
///
/// # Errors
/// As [`step`].
#[inline]
pub fn step_known(core: &mut Core, insn: &Instruction, execute: Execute) -> Exec<()> {
    if core.rflags & (TF | RF) != 0 || core.dr[7] & 0xFF != 0 || core.pending_db != 0 {
        return step_debugged(core);
    }
    let shadow = take(&mut core.shadow);
    core.shadowed = shadow;
    let rip = core.rip;
    let result = ring0::check(core, insn).and_then(|()| {
        core.rip = next(core, insn);
        execute(core, insn)
    });
    finish(core, result, rip, shadow)
}

#[inline]
fn finish(core: &mut Core, result: Exec<()>, rip: u64, shadow: Shadow) -> Exec<()> {
    match result {
        Ok(()) => {
            core.countdown.add(-1);
            if core.pending_db != 0 { report(core, 0) } else { Ok(()) }
        }
        Err(t) => Err(undo(core, t, rip, shadow)),
    }
}

#[inline]
fn next(core: &Core, insn: &Instruction) -> u64 {
    if core.mode == Mode::Bits64 { insn.next_ip() } else { insn.next_ip() & 0xFFFF_FFFF }
}

#[cold]
fn undo(core: &mut Core, t: Trap, rip: u64, shadow: Shadow) -> Trap {
    if let Trap::Exception(Exception { is_trap: true, .. }) = t {
        core.countdown.add(-1);
    } else {
        core.rip = rip;
        // After part of a repeated instruction interrupts may come: the shadow is over.
        core.shadow = if t == Trap::Again { Shadow::None } else { shadow };
    }
    t
}

/// As [`step`], with debug conditions to look after
/// (SDM 3B, "Debug, Branch Profile, TSC, and Intel Resource Director Technology Features").
fn step_debugged(core: &mut Core) -> Exec<()> {
    let shadow = take(&mut core.shadow);
    core.shadowed = shadow;
    let (rip, before) = (core.rip, core.rflags);
    // Conditions met by MOV SS or POP SS wait for the end of this instruction.
    let held = if shadow == Shadow::MovSs { take(&mut core.pending_db) } else { 0 };
    core.pending_db = 0;
    if before & RF == 0 && shadow != Shadow::MovSs {
        let met = instruction_breakpoints(core);
        if met != 0 {
            core.shadow = shadow;
            return Err(debug_exception(met, false));
        }
    }
    core.rflags &= !RF;
    let (mut mnemonic, mut flow, mut behind) = (Mnemonic::INVALID, FlowControl::Next, 0);
    let result = fetch(core).and_then(|(insn, execute)| {
        ring0::check(core, &insn)?;
        core.rip = next(core, &insn);
        (mnemonic, flow, behind) = (insn.mnemonic(), insn.flow_control(), core.rip);
        execute(core, &insn)
    });
    let counts = core.msr.debugctl & BTF == 0 || is_branch(flow, core.rip != behind);
    let is_step = before & TF != 0 && counts && !ends_single_step(core, mnemonic);
    match result {
        Ok(()) => {
            core.countdown.add(-1);
            if mnemonic == Mnemonic::Int1 {
                // INT1 is a #DB already: what was held goes into that one.
                core.dr[6] |= held & HELD_MARKS;
                return Ok(());
            }
            core.pending_db |= held;
            if core.shadow == Shadow::MovSs {
                return Ok(()); // neither single step nor data breakpoints until the next one
            }
            report(core, if is_step { BS } else { 0 })
        }
        Err(Trap::Again) => {
            // One iteration was done.  The instruction's own breakpoint must not hit again.
            core.rip = rip;
            core.rflags |= RF;
            core.pending_db |= held;
            report(core, if is_step { BS } else { 0 })?;
            Err(Trap::Again)
        }
        Err(t) => {
            core.pending_db = 0;
            if !matches!(t, Trap::Exception(Exception { is_trap: true, .. })) {
                core.rflags = core.rflags & !RF | before & RF;
                if shadow == Shadow::MovSs {
                    core.pending_db = held;
                }
            }
            Err(undo(core, t, rip, shadow))
        }
    }
}

/// Instructions after which TF, set before them, makes no #DB: those that enter a handler through
/// the IDT, and SYSCALL if it cleared TF.
fn ends_single_step(core: &Core, mnemonic: Mnemonic) -> bool {
    match mnemonic {
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 => true,
        Mnemonic::Into | Mnemonic::Syscall => core.rflags & TF == 0,
        Mnemonic::Vmlaunch | Mnemonic::Vmresume => core.vmx.non_root,
        _ => false,
    }
}

/// Whether IA32_DEBUGCTL.BTF lets a single step end after such an instruction.
fn is_branch(flow: FlowControl, went_elsewhere: bool) -> bool {
    use FlowControl as F;
    match flow {
        F::UnconditionalBranch | F::IndirectBranch | F::Call | F::IndirectCall | F::Return => true,
        F::ConditionalBranch => went_elsewhere,
        _ => false,
    }
}

fn debug_exception(payload: u64, is_trap: bool) -> Trap {
    Trap::Exception(Exception { payload, is_trap, ..Exception::plain(vector::DB) })
}

/// Raise the debug conditions that the instruction met.
fn report(core: &mut Core, more: u64) -> Exec<()> {
    if core.shadow == Shadow::MovSs {
        return Ok(());
    }
    let met = take(&mut core.pending_db) | more;
    if met == 0 { Ok(()) } else { Err(debug_exception(met, true)) }
}

fn instruction_breakpoints(core: &Core) -> u64 {
    let is_64 = core.mode == Mode::Bits64;
    let at = core.rip.wrapping_add(if is_64 { 0 } else { core.seg[seg::CS].base });
    let at = if is_64 { at } else { at & 0xFFFF_FFFF };
    let mut met = 0;
    for i in 0..4 {
        let (control, is_on) = (core.dr[7] >> (16 + 4 * i), core.dr[7] >> (2 * i) & 3 != 0);
        if is_on && control & 3 == 0 && core.dr[i] == at {
            met |= 1 << i;
        }
    }
    met
}

/// How wide the code is.
#[inline]
#[must_use]
pub fn code_bits(core: &Core) -> u8 {
    match core.mode {
        Mode::Bits64 => 64,
        Mode::Bits32 => 32,
        // A D bit left from protected mode stays in force.
        Mode::Real if core.seg[seg::CS].has(attr::DB) => 32,
        Mode::Real | Mode::V86 | Mode::Bits16 => 16,
    }
}

/// How many bytes from RIP on the code segment allows.
#[inline]
fn allowed(core: &Core) -> usize {
    let left = match core.mode {
        Mode::Bits64 => return MAX_LENGTH,
        _ => (u64::from(core.seg[seg::CS].limit) + 1).saturating_sub(core.rip),
    };
    left.min(MAX_LENGTH as u64) as usize
}

/// Translate the page of an instruction, with the last page at hand.
#[inline]
fn fetch_page(core: &mut Core, gva: u64) -> Exec<(u64, bool)> {
    let key = FetchKey {
        vpn: gva >> 12,
        spaces: (core.tlb.asn, core.tlb.global_asn),
        rules: (core.cpl == 3, core.cr4 & cr4::SMEP != 0),
        epoch: core.tlb.fetch_epoch,
        walks: core.counts.itlb_misses,
    };
    if core.decoded.page_key == key {
        return Ok((core.decoded.page.0 | (gva & PAGE_OFFSET), core.decoded.page.1));
    }
    let (hpa, special) = core.translate(gva, Access::Fetch)?;
    let key = FetchKey { epoch: core.tlb.fetch_epoch, walks: core.counts.itlb_misses, ..key };
    core.decoded.page_key = key;
    core.decoded.page = (hpa & !PAGE_OFFSET, special);
    Ok((hpa, special))
}

/// The instruction at RIP and its executor.
///
/// # Errors
/// #GP(0) beyond the segment, the page's fault, #UD.
#[inline]
pub fn fetch(core: &mut Core) -> Exec<(Instruction, Execute)> {
    let rip = core.rip;
    let gva = segment::code_linear(core, rip)?;
    let (hpa, special) = fetch_page(core, gva)?;
    let bits = code_bits(core);
    let room = (FRAME_BYTES - (gva & PAGE_OFFSET)) as usize;
    if room > MAX_LENGTH && !special {
        let bytes = (core.mem.load(hpa, 8), core.mem.load(hpa + 8, 8));
        let available = allowed(core);
        if let Some(known) = core.decoded.find(rip, bits, bytes, available) {
            return Ok(known);
        }
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&bytes.0.to_le_bytes());
        raw[8..].copy_from_slice(&bytes.1.to_le_bytes());
        let insn = settle(decode::decode(bits, rip, &raw[..available]))?;
        let execute = decode::route(&insn);
        core.decoded.keep(bits, bytes, &insn, execute);
        return Ok((insn, execute));
    }
    let insn = fetch_slowly(core, gva, hpa, special, room)?;
    Ok((insn, decode::route(&insn)))
}

fn settle(verdict: Verdict) -> Exec<Instruction> {
    match verdict {
        Verdict::Instruction(insn) => Ok(insn),
        Verdict::Undefined => Err(ud()),
        Verdict::Incomplete | Verdict::TooLong => Err(gp(0)),
    }
}

/// Fetch near the end of a page, or from a page that is no plain memory.
fn fetch_slowly(core: &mut Core, gva: u64, hpa: u64, special: bool, room: usize) -> Exec<Instruction> {
    let (rip, bits, available) = (core.rip, code_bits(core), allowed(core));
    let mut raw = [0; MAX_LENGTH];
    let first = available.min(room);
    for (i, b) in raw[..first].iter_mut().enumerate() {
        *b = fetch_byte(core, hpa + i as u64, special)?;
    }
    let verdict = decode::decode(bits, rip, &raw[..first]);
    if first == available || !matches!(verdict, Verdict::Incomplete) {
        return settle(verdict);
    }
    segment::code_linear(core, rip.wrapping_add(room as u64))?;
    let second = core.linear_add(gva, room as u64);
    let (hpa, special) = fetch_page(core, second)?;
    for (i, b) in raw[first..available].iter_mut().enumerate() {
        *b = fetch_byte(core, hpa + i as u64, special)?;
    }
    settle(decode::decode(bits, rip, &raw[..available]))
}

fn fetch_byte(core: &mut Core, hpa: u64, special: bool) -> Exec<u8> {
    let byte = if special { core.fetch_special(hpa)? } else { core.mem.load(hpa, 1) };
    Ok(byte as u8)
}
