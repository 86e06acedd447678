//! Host-physical memory: one sparse memfd, handed out in 4-KByte frames.
//!
//! A frame that was never written, or was discarded, is a hole and costs the computer nothing.
//! Beside the bytes stand two marks a frame: *dirty* (something changed it; whose frame it is takes
//! the mark away, and every processor notices by the epoch) and *code* (engines hold translations of
//! instructions in it; whoever writes there must say so: [`crate::code`]).

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex};

use crate::addr::FRAME_BYTES;
use crate::code::{Marks, NOBODY};
use crate::dbt::zeroed::Zeroed;

/// Physical memory of one machine, shared by its processors.
pub struct Memory {
    base: *mut u8,
    size: u64,
    fd: i32,
    dirty: Zeroed<AtomicU8>,
    /// How often a dirty mark was taken away.
    dirty_epoch: AtomicU64,
    code: Marks,
    split_lock: Mutex<()>,
}

// SAFETY: all access goes through raw pointers into a shared mapping that lives as long as the
// value; racing accesses are the guest's own races, as on real memory.
unsafe impl Send for Memory {}
// SAFETY: as above; the marks are atomics and the log has a lock.
unsafe impl Sync for Memory {}

impl Memory {
    /// Make a memory of `size` bytes (rounded up to whole frames).
    ///
    /// # Errors
    /// What the operating system says when it has no memfd or no address space to give.
    pub fn new(size: u64) -> io::Result<Arc<Memory>> {
        let size = size.next_multiple_of(FRAME_BYTES);
        let len = usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        if len == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let frames = len / FRAME_BYTES as usize;
        let (dirty, code) = (Zeroed::new(frames)?, Marks::new(frames)?);
        // SAFETY: plain system calls; the results are checked; the mapping is owned by the value.
        let (fd, base) = unsafe {
            let fd = libc::memfd_create(c"understudy".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::ftruncate(fd, size.cast_signed()) != 0 {
                let e = io::Error::last_os_error();
                libc::close(fd);
                return Err(e);
            }
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let base = libc::mmap(ptr::null_mut(), len, prot, flags, fd, 0);
            if base == libc::MAP_FAILED {
                let e = io::Error::last_os_error();
                libc::close(fd);
                return Err(e);
            }
            (fd, base.cast::<u8>())
        };
        Ok(Arc::new(Memory {
            base,
            size,
            fd,
            dirty,
            dirty_epoch: AtomicU64::new(0),
            code,
            split_lock: Mutex::new(()),
        }))
    }

    /// Bytes in all.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> i32 {
        self.fd
    }

    /// Where the mapping begins in this process.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Whether `len` bytes at `hpa` are all inside.
    #[must_use]
    pub fn contains(&self, hpa: u64, len: u64) -> bool {
        hpa.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// The host pointer of a byte inside the memory.
    ///
    /// # Panics
    /// If `hpa` is outside.
    #[must_use]
    pub fn host_ptr(&self, hpa: u64) -> *mut u8 {
        assert!(hpa < self.size);
        // SAFETY: checked to be inside the mapping.
        unsafe { self.base.add(hpa as usize) }
    }

    /// Read 1, 2, 4 or 8 bytes, zero-extended; outside the memory: all ones.
    #[must_use]
    pub fn load(&self, hpa: u64, size: usize) -> u64 {
        if !self.contains(hpa, size as u64) {
            return u64::MAX >> (64 - 8 * size);
        }
        // SAFETY: checked to be inside; unaligned reads are allowed by read_unaligned.
        unsafe {
            let p = self.base.add(hpa as usize);
            match size {
                1 => u64::from(p.read_volatile()),
                2 => u64::from(p.cast::<u16>().read_unaligned()),
                4 => u64::from(p.cast::<u32>().read_unaligned()),
                _ => p.cast::<u64>().read_unaligned(),
            }
        }
    }

    /// Write 1, 2, 4 or 8 bytes and mark the frame dirty; outside the memory: nothing happens.
    ///
    /// Does not look at the code mark: callers that may hit code ask [`Memory::is_code`].
    pub fn store(&self, hpa: u64, size: usize, value: u64) {
        if !self.contains(hpa, size as u64) {
            return;
        }
        self.mark_dirty(hpa);
        self.mark_dirty(hpa + size as u64 - 1);
        // SAFETY: checked to be inside; write_unaligned allows any alignment.
        unsafe {
            let p = self.base.add(hpa as usize);
            match size {
                1 => p.write_volatile(value as u8),
                2 => p.cast::<u16>().write_unaligned(value as u16),
                4 => p.cast::<u32>().write_unaligned(value as u32),
                _ => p.cast::<u64>().write_unaligned(value),
            }
        }
    }

    /// Copy bytes out.  Returns false (and leaves `out` alone) if any are outside.
    pub fn read_bytes(&self, hpa: u64, out: &mut [u8]) -> bool {
        if !self.contains(hpa, out.len() as u64) {
            return false;
        }
        // SAFETY: source checked to be inside; `out` is a live exclusive slice outside the mapping.
        unsafe { ptr::copy_nonoverlapping(self.base.add(hpa as usize), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Copy bytes in, as DMA does: marks frames dirty and reports writes to code frames.
    pub fn write_bytes(&self, hpa: u64, data: &[u8]) -> bool {
        if !self.contains(hpa, data.len() as u64) {
            return false;
        }
        self.touch(hpa, data.len() as u64);
        // SAFETY: destination checked to be inside; `data` cannot overlap the mapping mutably.
        unsafe { ptr::copy(data.as_ptr(), self.base.add(hpa as usize), data.len()) };
        true
    }

    /// Copy `len` bytes upwards inside the memory, byte by byte in effect (as REP MOVSB does).
    pub fn copy_within(&self, from: u64, to: u64, len: u64) -> bool {
        if !self.contains(from, len) || !self.contains(to, len) {
            return false;
        }
        self.mark_range(to, len);
        // SAFETY: both ranges are inside.  Overlap with `to` above `from` must replicate, so go
        // byte by byte there.
        unsafe {
            let (s, d) = (self.base.add(from as usize), self.base.add(to as usize));
            if to > from && to - from < len {
                for i in 0..len as usize {
                    d.add(i).write(s.add(i).read());
                }
            } else {
                ptr::copy(s, d, len as usize);
            }
        }
        true
    }

    /// Fill bytes.  Returns false if any are outside.
    pub fn fill(&self, hpa: u64, len: u64, byte: u8) -> bool {
        if !self.contains(hpa, len) {
            return false;
        }
        self.touch(hpa, len);
        // SAFETY: checked to be inside.
        unsafe { ptr::write_bytes(self.base.add(hpa as usize), byte, len as usize) };
        true
    }

    /// Give whole frames back to the computer; they read as zero from now on.
    ///
    /// # Errors
    /// What fallocate says, or `InvalidInput` if the range is not whole frames inside.
    pub fn discard(&self, hpa: u64, len: u64) -> io::Result<()> {
        if !self.contains(hpa, len) || !(hpa | len).is_multiple_of(FRAME_BYTES) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.touch(hpa, len);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: our own descriptor and a checked range.
        let r = unsafe { libc::fallocate(self.fd, mode, hpa.cast_signed(), len.cast_signed()) };
        if r == 0 || len == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// What the computer really spends on this memory, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        // SAFETY: an all-zero stat is a valid value; the descriptor is ours.
        unsafe {
            let mut st: libc::stat = std::mem::zeroed();
            if libc::fstat(self.fd, &raw mut st) == 0 { st.st_blocks.cast_unsigned() * 512 } else { 0 }
        }
    }

    /// Atomically replace the naturally aligned (or not) word at `hpa` by `f(old)`; returns old.
    ///
    /// A word that crosses a cache line is done under a lock (split locks are rare and slow on
    /// real processors too).  Outside the memory: `f` sees all ones, nothing is written.
    pub fn update(&self, hpa: u64, size: usize, mut f: impl FnMut(u64) -> u64) -> u64 {
        if !self.contains(hpa, size as u64) {
            let ones = u64::MAX >> (64 - 8 * size);
            f(ones);
            return ones;
        }
        self.mark_dirty(hpa);
        if !hpa.is_multiple_of(size as u64) {
            let _guard = self.split_lock.lock();
            let old = self.load(hpa, size);
            self.store(hpa, size, f(old));
            return old;
        }
        // SAFETY: inside the mapping and naturally aligned; atomics of that width are valid for
        // shared memory.
        unsafe {
            let p = self.base.add(hpa as usize);
            macro_rules! go {
                ($atomic:ty, $word:ty) => {{
                    let a = &*p.cast::<$atomic>();
                    let mut old = a.load(SeqCst);
                    loop {
                        let new = f(u64::from(old)) as $word;
                        match a.compare_exchange_weak(old, new, SeqCst, SeqCst) {
                            Ok(v) => break u64::from(v),
                            Err(v) => old = v,
                        }
                    }
                }};
            }
            match size {
                1 => go!(AtomicU8, u8),
                2 => go!(AtomicU16, u16),
                4 => go!(AtomicU32, u32),
                _ => go!(AtomicU64, u64),
            }
        }
    }

    /// LOCK CMPXCHG16B on an aligned 16-byte word: returns the old value.
    pub fn compare_exchange_16(&self, hpa: u64, expected: u128, new: u128) -> u128 {
        if !self.contains(hpa, 16) || !hpa.is_multiple_of(16) {
            return u128::MAX;
        }
        self.mark_dirty(hpa);
        let _guard = self.split_lock.lock();
        // SAFETY: inside and aligned.  Every x86-64 processor of the last ten years has the
        // instruction.
        unsafe {
            let p = self.base.add(hpa as usize).cast::<u128>();
            compare_exchange_16(p, expected, new)
        }
    }

    /// Mark the frame of `hpa` dirty.
    #[inline]
    pub fn mark_dirty(&self, hpa: u64) {
        if let Some(d) = self.dirty.get((hpa >> 12) as usize) {
            d.store(1, Relaxed);
        }
    }

    fn mark_range(&self, hpa: u64, len: u64) {
        if len > 0 {
            for pfn in hpa >> 12..=(hpa + len - 1) >> 12 {
                self.mark_dirty(pfn << 12);
            }
        }
    }

    /// Say that `len` bytes at `hpa` change: marks dirty, and reports frames that hold code.
    pub fn touch(&self, hpa: u64, len: u64) {
        self.mark_range(hpa, len);
        if len > 0 {
            for pfn in hpa >> 12..=(hpa + len - 1) >> 12 {
                if self.is_code(pfn) {
                    self.code.report(pfn, NOBODY);
                }
            }
        }
    }

    /// Read (and with `clear` reset) the dirty mark of a frame.
    pub fn take_dirty(&self, pfn: u64, clear: bool) -> bool {
        match self.dirty.get(pfn as usize) {
            Some(d) if clear => {
                let was_dirty = d.swap(0, Relaxed) != 0;
                if was_dirty {
                    self.dirty_epoch.fetch_add(1, Release);
                }
                was_dirty
            }
            Some(d) => d.load(Relaxed) != 0,
            None => false,
        }
    }

    /// Grows whenever a dirty mark is taken away: who writes without marking has to ask anew.
    #[inline]
    #[must_use]
    pub fn dirty_epoch(&self) -> u64 {
        self.dirty_epoch.load(Acquire)
    }

    /// Who holds translations of code here.
    #[inline]
    #[must_use]
    pub fn code(&self) -> &Marks {
        &self.code
    }

    /// Whether some engine holds a translation of code in this frame.
    #[inline]
    #[must_use]
    pub fn is_code(&self, pfn: u64) -> bool {
        self.code.holders(pfn) != 0
    }
}

/// LOCK CMPXCHG16B: returns the old value.
///
/// # Safety
/// `p` must be valid for reads and writes and aligned to 16 bytes.
unsafe fn compare_exchange_16(p: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: the caller vouches for the pointer.  RBX, which the compiler keeps for itself, is
    // put back.
    unsafe {
        std::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") p,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping and descriptor are ours and nobody can use them any more.
        unsafe {
            libc::munmap(self.base.cast(), self.size as usize);
            libc::close(self.fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unused_frame_costs_nothing_and_a_discarded_one_is_given_back() {
        let m = Memory::new(1 << 32).unwrap();
        assert_eq!(0, m.resident_bytes());
        m.store(0x1234_5000, 8, 7);
        assert_eq!(4096, m.resident_bytes());
        m.discard(0x1234_5000, 4096).unwrap();
        assert_eq!((0, 0), (m.resident_bytes(), m.load(0x1234_5000, 8)));
    }

    #[test]
    fn outside_reads_ones_and_writes_vanish() {
        let m = Memory::new(4096).unwrap();
        assert_eq!(0xFFFF, m.load(4095, 2));
        m.store(4095, 2, 0);
        assert!(!m.write_bytes(4090, &[0; 7]));
        assert_eq!(0, m.resident_bytes());
    }

    #[test]
    fn the_dirty_mark_is_set_by_a_write_and_taken_once() {
        let m = Memory::new(8192).unwrap();
        m.store(4092, 8, 1);
        assert_eq!(
            (true, true, false),
            (m.take_dirty(0, true), m.take_dirty(1, false), m.take_dirty(0, false))
        );
    }
}
