//! The code cache: executable memory in regions, filled one after the other; when all are full, the
//! one that was begun first is emptied and filled again.

use std::io;
use std::ptr;

use super::twin::{LARGE_BYTES, Twin, serialize};

/// Bytes of generated code that one processor may have.
pub const CACHE_BYTES: usize = 96 << 20;
/// Regions that it has.
pub const REGIONS: usize = 8;
/// Room that must be left before a block is begun.
pub const ROOM_BYTES: usize = 64 << 10;
/// The smallest cache.
pub const LEAST_BYTES: usize = REGIONS * 2 * ROOM_BYTES;

/// Code from which on the cache is in large pages: a processor that does little must not cost one.
const LARGE_FROM: usize = 1 << 20;

/// Executable memory.
pub struct Cache {
    twin: Twin,
    /// Bytes of a region.
    region_bytes: usize,
    /// The region that is filled.
    now: usize,
    /// By region: the offset behind its last byte in use.
    used: [usize; REGIONS],
    /// Bytes at the beginning that stay.
    fixed: usize,
    /// Bytes in large pages, or tried.
    large: usize,
    /// Something was written that the computer may have fetched before.
    is_written: bool,
}

impl Cache {
    /// Get so many bytes of executable memory: a multiple of [`LEAST_BYTES`].
    ///
    /// # Errors
    /// If the computer refuses it.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let region_bytes = bytes / REGIONS;
        Ok(Self {
            twin: Twin::new(bytes)?,
            region_bytes,
            now: 0,
            used: std::array::from_fn(|region| region * region_bytes),
            fixed: 0,
            large: 0,
            is_written: false,
        })
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
        self.base() + self.used[self.now] as u64
    }

    /// Where the cache begins.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.twin.executable() as u64
    }

    /// Whether another block fits in the region that is filled.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.used[self.now] + ROOM_BYTES <= self.end()
    }

    /// Behind the region that is filled.
    fn end(&self) -> usize {
        (self.now + 1) * self.region_bytes
    }

    /// Append code that was assembled for [`Cache::here`].
    ///
    /// # Panics
    /// If it does not fit.
    pub fn append(&mut self, code: &[u8]) {
        let from = self.used[self.now];
        assert!(from + code.len() <= self.end());
        self.is_written = true;
        // SAFETY: checked to fit in the mapping, which nobody executes right here.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.twin.writable().add(from), code.len()) };
        let used = (from + code.len()).next_multiple_of(16).min(self.end());
        self.used[self.now] = used;
        if used >= LARGE_FROM && used > self.large {
            self.enlarge();
        }
    }

    /// What was appended so far stays for ever.
    pub fn fix(&mut self) {
        self.fixed = self.used[0];
    }

    /// Bytes of a region.
    #[must_use]
    pub fn region_bytes(&self) -> usize {
        self.region_bytes
    }

    /// All bytes, used or not.
    #[must_use]
    pub fn bytes(&self) -> usize {
        REGIONS * self.region_bytes
    }

    /// The region that is filled.
    #[must_use]
    pub fn region(&self) -> usize {
        self.now
    }

    /// Empty a region, and fill it from now on.
    pub fn begin(&mut self, region: usize) {
        self.now = region;
        self.used[region] = (region * self.region_bytes).max(self.fixed);
    }

    /// The region of a host address inside the cache.
    #[must_use]
    pub fn region_at(&self, address: u64) -> usize {
        (address - self.base()) as usize / self.region_bytes
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.iter().enumerate().map(|(region, used)| used - region * self.region_bytes).sum()
    }

    /// Overwrite bytes at a host address inside the cache.
    ///
    /// # Panics
    /// If the address is outside.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let offset = (address - self.base()) as usize;
        assert!(offset + bytes.len() <= self.used[offset / self.region_bytes]);
        self.is_written = true;
        // SAFETY: checked to be inside; the processor is between two blocks.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.twin.writable().add(offset), bytes.len()) };
    }

    /// So many bytes of code.
    ///
    /// # Panics
    /// If they are not all in use.
    #[must_use]
    pub fn code(&self, address: u64, bytes: usize) -> &[u8] {
        let offset = (address - self.base()) as usize;
        assert!(offset + bytes <= self.used[offset / self.region_bytes]);
        // SAFETY: checked to be inside; they are written through `self` alone.
        unsafe { std::slice::from_raw_parts(self.twin.writable().add(offset), bytes) }
    }

    /// Make the jump whose 32-bit displacement is at `place` go to `target`.
    pub fn patch_jump(&mut self, place: u64, target: u64) {
        let rel = target.wrapping_sub(place + 4) as u32;
        self.patch(place, &rel.to_le_bytes());
    }
}
