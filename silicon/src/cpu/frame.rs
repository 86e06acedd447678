//! A stack while the processor itself uses it: pushes and pops that become visible all at once.

use crate::arch::exception::{Exception, vector};
use crate::arch::segment::{Segment, attr, seg};
use crate::cpu::segment::{fits, is_canonical};
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::mmu::access::Who;

/// A stack segment and pointer that are not yet (or no longer) in the registers.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    ss: Segment,
    sp: u64,
    mask: u64,
    /// The error code of a stack fault.
    code: u32,
}

impl Cursor {
    /// The current stack.
    #[must_use]
    pub fn current(core: &Core) -> Self {
        Self { ss: core.seg[seg::SS], sp: core.gpr[4], mask: core.stack_mask(), code: 0 }
    }

    /// Another stack of 16- or 32-bit code; a stack fault names its selector.
    #[must_use]
    pub fn legacy(ss: Segment, sp: u64, ext: u32) -> Self {
        let mask = if ss.has(attr::DB) { 0xFFFF_FFFF } else { 0xFFFF };
        Self { ss, sp, mask, code: u32::from(ss.selector & 0xFFFC) | ext }
    }

    /// Another stack of 64-bit code.
    #[must_use]
    pub fn long(sp: u64, ext: u32) -> Self {
        Self { ss: Segment::default(), sp, mask: u64::MAX, code: ext }
    }

    /// The same stack with another error code for faults.
    #[must_use]
    pub fn with_code(self, code: u32) -> Self {
        Self { code, ..self }
    }

    /// The pointer as it is now.
    #[must_use]
    pub fn sp(&self) -> u64 {
        self.sp & self.mask
    }

    fn place(&self, sp: u64, size: u64) -> Exec<u64> {
        let address = if self.mask == u64::MAX {
            (is_canonical(sp) && is_canonical(sp.wrapping_add(size - 1))).then_some(sp)
        } else {
            (!self.ss.is_unusable() && fits(&self.ss, sp, size))
                .then(|| self.ss.base.wrapping_add(sp) & 0xFFFF_FFFF)
        };
        address.ok_or_else(|| Exception::coded(vector::SS, self.code).into())
    }

    /// Push `size` bytes, as the current privilege level.
    ///
    /// # Errors
    /// #SS, page faults.
    pub fn push(&mut self, core: &mut Core, size: usize, value: u64) -> Exec<()> {
        let sp = self.sp.wrapping_sub(size as u64) & self.mask;
        let address = self.place(sp, size as u64)?;
        core.write_lin(address, size, value, Who::Program)?;
        self.sp = sp;
        Ok(())
    }

    /// Pop `size` bytes, as the current privilege level.
    ///
    /// # Errors
    /// #SS, page faults.
    pub fn pop(&mut self, core: &mut Core, size: usize) -> Exec<u64> {
        let value = self.peek(core, 0, size)?;
        self.skip(size as u64);
        Ok(value)
    }

    /// Read `size` bytes `distance` above the pointer.
    ///
    /// # Errors
    /// #SS, page faults.
    pub fn peek(&self, core: &mut Core, distance: u64, size: usize) -> Exec<u64> {
        let sp = self.sp.wrapping_add(distance) & self.mask;
        let address = self.place(sp, size as u64)?;
        core.read_lin(address, size, Who::Program)
    }

    /// Release `bytes`.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp.wrapping_add(bytes) & self.mask;
    }

    /// Make the pointer the processor's own (SS is the caller's business).
    pub fn commit(self, core: &mut Core) {
        core.gpr[4] = match self.mask {
            0xFFFF => core.gpr[4] & !0xFFFF | self.sp & 0xFFFF,
            mask => self.sp & mask,
        };
    }
}
