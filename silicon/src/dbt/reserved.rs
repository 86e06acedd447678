//! Addresses of this process that lead nowhere, until a page of them is made to lead to a frame.

use std::io;
use std::ptr::{self, NonNull};

use crate::addr::FRAME_BYTES;
use crate::mem::Memory;

/// Nobody's but generated code's.
pub struct Reserved {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its addresses.
unsafe impl Send for Reserved {}

const NOWHERE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Reserved {
    /// So many bytes of addresses: two mappings, no memory.
    ///
    /// # Errors
    /// If the computer gives none.
    pub fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, NOWHERE, -1, 0) };
        Self::owner_of(base, bytes)
    }

    /// So many bytes at an address.
    ///
    /// # Errors
    /// If somebody has any of them.
    pub fn at(address: u64, bytes: usize) -> io::Result<Self> {
        let (place, flags) = (address as *mut libc::c_void, NOWHERE | libc::MAP_FIXED_NOREPLACE);
        // SAFETY: a fresh mapping, over nobody's.
        let base = unsafe { libc::mmap(place, bytes, libc::PROT_NONE, flags, -1, 0) };
        let owner = Self::owner_of(base, bytes)?;
        // (An old kernel takes the address for a wish.)
        if owner.base() == address { Ok(owner) } else { Err(io::ErrorKind::AddrInUse.into()) }
    }

    fn owner_of(base: *mut libc::c_void, bytes: usize) -> io::Result<Self> {
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes })
    }

    /// The first of them.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// # Panics
    /// If the range is not inside.
    fn place(&self, at: usize, bytes: usize) -> *mut libc::c_void {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.bytes));
        // SAFETY: inside.
        unsafe { self.base.as_ptr().add(at).cast() }
    }

    /// Let a page lead to the frame at a host-physical address; whether it does now.
    ///
    /// # Panics
    /// If the page is not inside.
    pub fn show(&self, at: usize, mem: &Memory, hpa: u64, is_writable: bool) -> bool {
        if !mem.contains(hpa, FRAME_BYTES) {
            return false;
        }
        let bytes = FRAME_BYTES as usize;
        let place = self.place(at, bytes);
        let prot = libc::PROT_READ | if is_writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: over our own addresses; a frame of a memfd, which the mapping keeps.
        unsafe { libc::mmap(place, bytes, prot, flags, mem.fd(), hpa.cast_signed()) != libc::MAP_FAILED }
    }

    /// Let a page that leads somewhere be read only.
    ///
    /// # Panics
    /// If the page is not inside, or the computer refuses.
    pub fn protect(&self, at: usize) {
        let bytes = FRAME_BYTES as usize;
        // SAFETY: our own addresses.
        let done = unsafe { libc::mprotect(self.place(at, bytes), bytes, libc::PROT_READ) };
        assert!(done == 0, "a page cannot be protected");
    }

    /// Let a range lead nowhere again.
    ///
    /// # Panics
    /// If it is not inside, or the computer refuses (it needs no more mappings than there were).
    pub fn hide(&self, at: usize, bytes: usize) {
        let (place, flags) = (self.place(at, bytes), NOWHERE | libc::MAP_FIXED);
        // SAFETY: over our own addresses.
        let done = unsafe { libc::mmap(place, bytes, libc::PROT_NONE, flags, -1, 0) };
        assert!(done != libc::MAP_FAILED, "addresses cannot be hidden");
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_its_frame() {
        let mem = Memory::new(1 << 20).unwrap();
        mem.store(0x3008, 8, 77);
        let reserved = Reserved::new(1 << 32).unwrap();
        assert!(!reserved.show(0, &mem, 1 << 20, false)); // no memory
        assert!(reserved.show(0xFFFF_F000, &mem, 0x3000, true));
        let word = (reserved.base() + 0xFFFF_F008) as *mut u64;
        // SAFETY: the page is mapped, and nobody else's.
        unsafe {
            assert_eq!(77, ptr::read_volatile(word));
            ptr::write_volatile(word, 78);
        }
        assert_eq!(78, mem.load(0x3008, 8));
        reserved.protect(0xFFFF_F000);
        reserved.hide(0, 1 << 32);
    }

    #[test]
    #[should_panic(expected = "is_some_and")]
    fn nothing_is_mapped_outside() {
        let mem = Memory::new(1 << 20).unwrap();
        Reserved::new(1 << 16).unwrap().show(1 << 16, &mem, 0, false);
    }
}
