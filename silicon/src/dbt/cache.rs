//! The code cache: executable memory, filled from one end, emptied as a whole.

use std::io;
use std::ptr;

/// Bytes of generated code that one processor may have.
pub const CACHE_BYTES: usize = 96 << 20;
/// Room that must be left before a block is begun.
pub const ROOM_BYTES: usize = 64 << 10;

/// Code from which on the cache is in large pages: a processor that does little must not cost one.
const LARGE_FROM: usize = 1 << 20;
/// Bytes of a large page.
const LARGE_BYTES: usize = 2 << 20;

/// Executable memory.
pub struct Cache {
    map: *mut u8,
    used: usize,
    is_large: bool,
}

// SAFETY: the mapping is owned by the value.
unsafe impl Send for Cache {}

impl Cache {
    /// Get executable memory.
    ///
    /// # Errors
    /// If the computer refuses it.
    pub fn new() -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping.
        let map = unsafe { libc::mmap(ptr::null_mut(), CACHE_BYTES, prot, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { map: map.cast(), used: 0, is_large: false })
    }

    /// Have large pages from now on, if the computer has them to give, and what is there already
    /// moved into one: generated code is large and jumps about.
    #[cold]
    fn enlarge(&mut self) {
        self.is_large = true;
        // SAFETY: hints about our own mapping; they may be refused.
        unsafe {
            libc::madvise(self.map.cast(), CACHE_BYTES, libc::MADV_HUGEPAGE);
            libc::madvise(self.map.cast(), LARGE_BYTES.min(CACHE_BYTES), libc::MADV_COLLAPSE);
        }
    }

    /// The host address of the next byte.
    #[must_use]
    pub fn here(&self) -> u64 {
        self.map as u64 + self.used as u64
    }

    /// Where the cache begins.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.map as u64
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
        // SAFETY: checked to fit in the mapping, which nobody executes right here.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.map.add(self.used), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16).min(CACHE_BYTES);
        if self.used >= LARGE_FROM && !self.is_large {
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
        let offset = (address - self.map as u64) as usize;
        assert!(offset + bytes.len() <= self.used);
        // SAFETY: checked to be inside; the processor is between two blocks, and x86 keeps its
        // instruction stream coherent with its own writes.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.add(offset), bytes.len()) };
    }

    /// Make the jump whose 32-bit displacement is at `place` go to `target`.
    pub fn patch_jump(&mut self, place: u64, target: u64) {
        let rel = target.wrapping_sub(place + 4) as u32;
        self.patch(place, &rel.to_le_bytes());
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: our mapping, not executing any more.
        unsafe { libc::munmap(self.map.cast(), CACHE_BYTES) };
    }
}
