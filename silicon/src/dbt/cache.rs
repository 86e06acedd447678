//! The code cache: executable memory, filled from one end, emptied as a whole.

use std::io;
use std::ptr;

use super::twin::{LARGE_BYTES, Twin, serialize};

/// Bytes of generated code that one processor may have.
pub const CACHE_BYTES: usize = 96 << 20;
/// Room that must be left before a block is begun.
pub const ROOM_BYTES: usize = 64 << 10;

/// Code from which on the cache is in large pages: a processor that does little must not cost one.
const LARGE_FROM: usize = 1 << 20;

/// Executable memory.
pub struct Cache {
    twin: Twin,
    used: usize,
    /// Bytes in large pages, or tried.
    large: usize,
    /// Something was written that the computer may have fetched before.
    is_written: bool,
}

impl Cache {
    /// Get executable memory.
    ///
    /// # Errors
    /// If the computer refuses it.
    pub fn new() -> io::Result<Self> {
        Ok(Self { twin: Twin::new(CACHE_BYTES)?, used: 0, large: 0, is_written: false })
    }

    /// Have another large page, if the computer has one to give: generated code is large and jumps
    /// about.
    #[cold]
    fn enlarge(&mut self) {
        self.twin.enlarge(self.large);
        self.large += LARGE_BYTES;
    }

    /// Let the computer see what was written, before it is executed.
    #[inline]
    pub fn serialize(&mut self) {
        if std::mem::take(&mut self.is_written) {
            serialize();
        }
    }

    /// The host address of the next byte.
    #[must_use]
    pub fn here(&self) -> u64 {
        self.base() + self.used as u64
    }

    /// Where the cache begins.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.twin.executable() as u64
    }

    /// Whether another block fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.used + ROOM_BYTES <= CACHE_BYTES
    }

    /// Append code that was assembled for [`Cache::here`].
    ///
    /// # Panics
    /// If it does not fit.
    pub fn append(&mut self, code: &[u8]) {
        assert!(self.used + code.len() <= CACHE_BYTES);
        self.is_written = true;
        // SAFETY: checked to fit in the mapping, which nobody executes right here.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.twin.writable().add(self.used), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16).min(CACHE_BYTES);
        if self.used >= LARGE_FROM && self.used > self.large {
            self.enlarge();
        }
    }

    /// Forget all code after `used` bytes.
    pub fn truncate(&mut self, used: usize) {
        self.used = used.next_multiple_of(16);
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Overwrite bytes at a host address inside the cache.
    ///
    /// # Panics
    /// If the address is outside.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let offset = (address - self.base()) as usize;
        assert!(offset + bytes.len() <= self.used);
        self.is_written = true;
        // SAFETY: checked to be inside; the processor is between two blocks.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.twin.writable().add(offset), bytes.len()) };
    }

    /// Make the jump whose 32-bit displacement is at `place` go to `target`.
    pub fn patch_jump(&mut self, place: u64, target: u64) {
        let rel = target.wrapping_sub(place + 4) as u32;
        self.patch(place, &rel.to_le_bytes());
    }
}
