//! What of the processor's state is built into translations.

use crate::arch::bits::{cr0, cr4, rflags};
use crate::arch::segment::{Segment, attr, seg};
use crate::cpu::ring0;
use crate::cpu::state::{Clock, Core, Mode};
use crate::cpu::vector::is_avx_enabled;
use crate::mmu::window;

pub(super) const MODE_USER: u32 = 1;
pub(super) const MODE_LIFTED: u32 = 2;
pub(super) const MODE_VECTOR: u32 = 4;
/// Not of the processor: the version of a block in which each access has its own check.
pub(super) const MODE_UNGROUPED: u32 = 8;

/// 32-bit code, with flat CS, DS, ES and SS.
pub(super) const MODE_32: u32 = 16;
/// In 32-bit code: FS is a data segment that reaches up to 4 GBytes from its base.
pub(super) const MODE_FS: u32 = 32;
/// The same of GS.
pub(super) const MODE_GS: u32 = 64;
/// CPL is 0.
pub(super) const MODE_LEVEL_0: u32 = 128;

/// PAUSE may make a VM exit.
pub(super) const MODE_PAUSE: u32 = 256;

/// RDTSC and RDTSCP read the clock and raise nothing.
pub(super) const MODE_TSC: u32 = 512;
/// The VMCS has an offset for it.
pub(super) const MODE_TSC_OFFSET: u32 = 1024;

/// The clock is the computer's.
pub(super) const MODE_WALL: u32 = 4096;

/// Operands are accessed in a window ([`crate::mmu::window`]); of 64-bit code, the stack pointer is in the
/// arena of stacks.
pub(super) const MODE_WINDOW: u32 = 2048;
/// The window has the lowest arena, too.
pub(super) const MODE_LOW: u32 = 8192;

/// It has it far: its distance is loaded.
pub(super) const MODE_FAR: u32 = 65536;
/// What the window of a program decides.
pub(super) const MODE_WINDOWS: u32 = MODE_WINDOW | MODE_LOW | MODE_FAR;

/// AVX state may be used.
pub(super) const MODE_AVX: u32 = 32768;

/// A data segment, writable and without limit.
fn is_unlimited(s: &Segment) -> bool {
    let bits = attr::UNUSABLE | attr::P | attr::S | attr::CODE | attr::EC | attr::RW;
    s.limit == u32::MAX && s.attr & bits == attr::P | attr::S | attr::RW
}

/// The key's bits for the segments of 32-bit code; `None` if it has to be interpreted.
fn segments_key(core: &Core) -> Option<u32> {
    let is_flat = |i: usize| core.seg[i].base == 0 && is_unlimited(&core.seg[i]);
    let cs = &core.seg[seg::CS];
    let ok = cs.base == 0
        && cs.limit == u32::MAX
        && core.seg[seg::SS].has(attr::DB)
        && [seg::SS, seg::DS, seg::ES].into_iter().all(is_flat);
    let bit = |i: usize, bit: u32| if is_unlimited(&core.seg[i]) { bit } else { 0 };
    // Kernels that use GS give it a limit; the others leave the program's there, whose kind should
    // not make two versions of the kernel's code.
    let gs = if core.cpl == 3 { bit(seg::GS, MODE_GS) } else { 0 };
    ok.then(|| MODE_32 | bit(seg::FS, MODE_FS) | gs)
}

/// Sensitive instructions are looked at before they execute ([`crate::cpu::ring0`]).
pub(super) const MODE_SENSITIVE: u32 = 16384;

/// The key's bits for a program's window.
fn window_key(core: &Core, is_32: bool) -> u32 {
    let Some(current) = core.tlb.windows.current() else { return 0 };
    if current.kind.is_32() != is_32 || !is_32 && !window::is_stack(core.gpr[4]) {
        return 0;
    }
    let low = if current.low.is_some() { MODE_LOW } else { 0 };
    MODE_WINDOW | low | if current.is_far() { MODE_FAR } else { 0 }
}

/// What of the processor's state is built into translations.
pub(super) fn mode_key(core: &Core) -> Option<u32> {
    let mut key = match core.mode {
        Mode::Bits64 => 0,
        Mode::Bits32 => segments_key(core)?,
        Mode::Real | Mode::V86 | Mode::Bits16 => return None,
    };
    if core.cpl == 0 {
        key |= MODE_LEVEL_0;
    }
    if core.cpl == 3 {
        key |= MODE_USER | window_key(core, is_32(key));
    } else if core.cr4 & cr4::SMAP != 0 && core.flag(rflags::AC) {
        key |= MODE_LIFTED;
    }
    if core.cr0 & (cr0::EM | cr0::TS) == 0 && core.cr4 & cr4::OSFXSR != 0 {
        key |= MODE_VECTOR;
    }
    if core.cr0 & cr0::TS == 0 && is_avx_enabled(core) {
        key |= MODE_AVX;
    }
    if core.tsc_is_plain() {
        key |= MODE_TSC;
    }
    if core.clock == Clock::Wall {
        key |= MODE_WALL;
    }
    if core.uses_tsc_offset() {
        key |= MODE_TSC_OFFSET;
    }
    if core.pause_may_exit() {
        key |= MODE_PAUSE;
    }
    if ring0::looks(core) {
        key |= MODE_SENSITIVE;
    }
    Some(key)
}

/// Whether the next instruction has debug conditions or alignment to look after.
pub(super) fn must_step(core: &Core) -> bool {
    must_step_but(core, 0)
}

/// The same, some bits of RFLAGS aside.
pub(super) fn must_step_but(core: &Core, aside: u64) -> bool {
    core.rflags & !aside & (rflags::TF | rflags::RF) != 0
        || core.dr[7] & 0xFF != 0
        || core.pending_db != 0
        || (core.cpl == 3 && core.flag(rflags::AC) && core.cr0 & cr0::AM != 0)
}

/// Which first level of the TLB and which table of indirect targets the code uses.
pub(super) fn class_of(mode: u32) -> usize {
    match (mode & MODE_USER != 0, mode & MODE_LIFTED != 0) {
        (true, _) => 0,
        (false, false) => 1,
        (false, true) => 2,
    }
}

pub(super) fn is_32(mode: u32) -> bool {
    mode & MODE_32 != 0
}

/// Bits of the code.
pub(super) fn code_bits(mode: u32) -> u32 {
    if is_32(mode) { 32 } else { 64 }
}

pub(super) fn is_user(mode: u32) -> bool {
    mode & MODE_USER != 0
}

pub(super) fn has_window(mode: u32) -> bool {
    mode & MODE_WINDOW != 0
}

pub(super) fn is_far(mode: u32) -> bool {
    mode & MODE_FAR != 0
}

pub(super) fn has_low(mode: u32) -> bool {
    mode & MODE_LOW != 0
}

/// 64-bit code that relies on where the stack pointer is.
pub(super) fn relies_on_stack(mode: u32) -> bool {
    has_window(mode) && !is_32(mode)
}

pub(super) fn is_level_0(mode: u32) -> bool {
    mode & MODE_LEVEL_0 != 0
}

pub(super) fn has_groups(mode: u32) -> bool {
    mode & MODE_UNGROUPED == 0
}

pub(super) fn has_vector(mode: u32) -> bool {
    mode & MODE_VECTOR != 0
}
