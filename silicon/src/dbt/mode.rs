//! What of the processor's state is built into translations.

use crate::arch::bits::{cr0, cr4, rflags};
use crate::cpu::state::{Core, Mode};

pub(super) const MODE_USER: u32 = 1;
pub(super) const MODE_LIFTED: u32 = 2;
pub(super) const MODE_VECTOR: u32 = 4;
/// Not of the processor: the version of a block in which each access has its own check.
pub(super) const MODE_UNGROUPED: u32 = 8;

/// What of the processor's state is built into translations.
pub(super) fn mode_key(core: &Core) -> Option<u32> {
    if core.mode != Mode::Bits64 {
        return None;
    }
    let mut key = 0;
    if core.cpl == 3 {
        key |= MODE_USER;
    } else if core.cr4 & cr4::SMAP != 0 && core.flag(rflags::AC) {
        key |= MODE_LIFTED;
    }
    if core.cr0 & (cr0::EM | cr0::TS) == 0 && core.cr4 & cr4::OSFXSR != 0 {
        key |= MODE_VECTOR;
    }
    Some(key)
}

pub(super) fn class_of(mode: u32) -> usize {
    match (mode & MODE_USER != 0, mode & MODE_LIFTED != 0) {
        (true, _) => 0,
        (false, false) => 1,
        (false, true) => 2,
    }
}

pub(super) fn is_user(mode: u32) -> bool {
    mode & MODE_USER != 0
}

pub(super) fn has_groups(mode: u32) -> bool {
    mode & MODE_UNGROUPED == 0
}

pub(super) fn has_vector(mode: u32) -> bool {
    mode & MODE_VECTOR != 0
}
