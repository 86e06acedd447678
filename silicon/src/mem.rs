//! Host-physical memory: one sparse memfd, handed out in 4-KByte frames.
//!
//! A frame that was never written, or was discarded, is a hole and costs the computer nothing.
//! Beside the bytes stand two marks a frame: *dirty* (something changed it; whose frame it is takes
//! the mark away, and every processor notices by the epoch) and *code* (engines hold translations of
//! instructions in it; whoever writes there must say so: [`crate::code`]).
//!
//! Several threads use the bytes at once.  Every plain access is one MOV of the computer, every
//! locked one a locked instruction, every copy its REP MOVSB, written as assembly: so they are as
//! atomic and in such an order as on the processor that is modelled, and the compiler, which knows
//! nothing of the other threads, neither moves nor splits them.

use std::arch::asm;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::*, fence};
use std::sync::{Arc, Once};

use crate::addr::FRAME_BYTES;
use crate::bus::{Agent, Bus};
use crate::code::{Marks, NOBODY};
use crate::dbt::zeroed::Zeroed;

/// Bytes of a cache line.
const LINE_BYTES: u64 = 64;

/// How many forks led from the process in which the first memory was made to this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Which process this is.  A mapping that is shared with another one is no copy: a fork takes no memory along,
/// nor generated code, and whoever was made in another process is refused here.
#[must_use]
pub fn process() -> u32 {
    extern "C" fn forked() {
        FORKS.fetch_add(1, Relaxed);
    }
    static WATCH: Once = Once::new();
    // SAFETY: the handler only counts.
    WATCH.call_once(|| _ = unsafe { libc::pthread_atfork(None, None, Some(forked)) });
    FORKS.load(Relaxed)
}

/// Physical memory of one machine, shared by its processors.
pub struct Memory {
    base: *mut u8,
    size: u64,
    fd: i32,
    dirty: Zeroed<AtomicU8>,
    /// How often a dirty mark was taken away.
    dirty_epoch: AtomicU64,
    code: Marks,
    bus: Arc<Bus>,
    process: u32,
}

// SAFETY: all access goes through raw pointers into a shared mapping that lives as long as the
// value; racing accesses are the guest's own races, as on real memory.
unsafe impl Send for Memory {}
// SAFETY: as above; the marks are atomics, log and bus have locks.
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
            bus: Arc::default(),
            process: process(),
        }))
    }

    /// Bytes in all.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What its processors share beside the bytes.
    #[inline]
    #[must_use]
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Whether it was made in this process, and not in one that this was forked from.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.process == process()
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
        // SAFETY: checked to be inside; a MOV takes any alignment.
        unsafe {
            let p = self.base.add(hpa as usize);
            let v: u64;
            match size {
                1 => {
                    asm!("movzx {v:e}, byte ptr [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly));
                }
                2 => {
                    asm!("movzx {v:e}, word ptr [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly));
                }
                4 => {
                    asm!("mov {v:e}, [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly));
                }
                _ => {
                    asm!("mov {v}, [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly));
                }
            }
            v
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
        // SAFETY: checked to be inside; a MOV takes any alignment.
        unsafe {
            let p = self.base.add(hpa as usize);
            match size {
                1 => {
                    asm!("mov [{}], {}", in(reg) p, in(reg_byte) value as u8, options(nostack, preserves_flags));
                }
                2 => asm!("mov [{}], {:x}", in(reg) p, in(reg) value, options(nostack, preserves_flags)),
                4 => asm!("mov [{}], {:e}", in(reg) p, in(reg) value, options(nostack, preserves_flags)),
                _ => asm!("mov [{}], {}", in(reg) p, in(reg) value, options(nostack, preserves_flags)),
            }
        }
    }

    /// Copy bytes out.  Returns false (and leaves `out` alone) if any are outside.
    pub fn read_bytes(&self, hpa: u64, out: &mut [u8]) -> bool {
        if !self.contains(hpa, out.len() as u64) {
            return false;
        }
        // SAFETY: source checked to be inside; `out` is a live exclusive slice outside the mapping.
        unsafe { copy(self.base.add(hpa as usize), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Read by the file: looking at a hole of the mapping would give it a frame.
    ///
    /// # Errors
    /// What pread says, or `InvalidInput` if any bytes are outside.
    pub fn read_file(&self, hpa: u64, out: &mut [u8]) -> io::Result<()> {
        if !self.contains(hpa, out.len() as u64) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: our own descriptor; `out` is a live exclusive slice of that length.
        match unsafe { libc::pread(self.fd, out.as_mut_ptr().cast(), out.len(), hpa.cast_signed()) } {
            -1 => Err(io::Error::last_os_error()),
            n if n.cast_unsigned() < out.len() => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Copy bytes in, as DMA does: marks frames dirty and reports writes to code frames.
    pub fn write_bytes(&self, hpa: u64, data: &[u8]) -> bool {
        if !self.contains(hpa, data.len() as u64) {
            return false;
        }
        self.mark_range(hpa, data.len() as u64);
        // SAFETY: destination checked to be inside; `data` is a live slice outside the mapping.
        unsafe { copy(data.as_ptr(), self.base.add(hpa as usize), data.len()) };
        self.wrote(hpa, data.len() as u64);
        true
    }

    /// REP MOVS: copy `n` elements of `size` bytes upwards inside the memory, one after the other.
    /// Returns false if any are outside.
    pub fn move_elements(&self, from: u64, to: u64, n: u64, size: usize) -> bool {
        let len = n * size as u64;
        if !self.contains(from, len) || !self.contains(to, len) {
            return false;
        }
        self.mark_range(to, len);
        // SAFETY: both ranges are inside.
        unsafe {
            let (s, d) = (self.base.add(from as usize), self.base.add(to as usize));
            match size {
                1 => {
                    asm!("rep movsb", inout("rsi") s => _, inout("rdi") d => _, inout("rcx") n => _, options(nostack, preserves_flags));
                }
                2 => {
                    asm!("rep movsw", inout("rsi") s => _, inout("rdi") d => _, inout("rcx") n => _, options(nostack, preserves_flags));
                }
                4 => {
                    asm!("rep movsd", inout("rsi") s => _, inout("rdi") d => _, inout("rcx") n => _, options(nostack, preserves_flags));
                }
                _ => {
                    asm!("rep movsq", inout("rsi") s => _, inout("rdi") d => _, inout("rcx") n => _, options(nostack, preserves_flags));
                }
            }
        }
        true
    }

    /// REP STOS: write an element of `size` bytes `n` times.  Returns false if any are outside.
    pub fn store_elements(&self, to: u64, n: u64, size: usize, value: u64) -> bool {
        let len = n * size as u64;
        if !self.contains(to, len) {
            return false;
        }
        self.mark_range(to, len);
        // SAFETY: the range is inside.
        unsafe {
            let d = self.base.add(to as usize);
            match size {
                1 => {
                    asm!("rep stosb", inout("rdi") d => _, inout("rcx") n => _, in("rax") value, options(nostack, preserves_flags));
                }
                2 => {
                    asm!("rep stosw", inout("rdi") d => _, inout("rcx") n => _, in("rax") value, options(nostack, preserves_flags));
                }
                4 => {
                    asm!("rep stosd", inout("rdi") d => _, inout("rcx") n => _, in("rax") value, options(nostack, preserves_flags));
                }
                _ => {
                    asm!("rep stosq", inout("rdi") d => _, inout("rcx") n => _, in("rax") value, options(nostack, preserves_flags));
                }
            }
        }
        true
    }

    /// Fill bytes.  Returns false if any are outside.
    pub fn fill(&self, hpa: u64, len: u64, byte: u8) -> bool {
        if !self.contains(hpa, len) {
            return false;
        }
        self.store_elements(hpa, len, 1, byte.into());
        self.wrote(hpa, len);
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
        self.mark_range(hpa, len);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: our own descriptor and a checked range.
        let r = unsafe { libc::fallocate(self.fd, mode, hpa.cast_signed(), len.cast_signed()) };
        let result = if r == 0 || len == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        self.wrote(hpa, len);
        result
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

    /// Whether a locked instruction on `size` bytes at `hpa` needs no bus lock: they are in one cache
    /// line.
    #[inline]
    #[must_use]
    pub fn is_in_line(hpa: u64, size: usize) -> bool {
        hpa % LINE_BYTES + size as u64 <= LINE_BYTES
    }

    /// Atomically replace the 1, 2, 4 or 8 bytes at `hpa`, which are in one cache line, by `f(old)`;
    /// returns old.  Outside the memory: `f` sees all ones, nothing is written.
    pub fn update(&self, hpa: u64, size: usize, mut f: impl FnMut(u64) -> u64) -> u64 {
        debug_assert!(Self::is_in_line(hpa, size));
        let mut old = self.load(hpa, size);
        loop {
            let now = self.compare_exchange(hpa, size, old, f(old));
            if now == old {
                return old;
            }
            old = now;
        }
    }

    /// LOCK CMPXCHG on 1, 2, 4 or 8 bytes: returns the old value.  Outside the memory: all ones.
    pub fn compare_exchange(&self, hpa: u64, size: usize, expected: u64, new: u64) -> u64 {
        if !self.contains(hpa, size as u64) {
            return u64::MAX >> (64 - 8 * size);
        }
        self.mark_dirty(hpa);
        self.mark_dirty(hpa + size as u64 - 1);
        let mut old = expected;
        // SAFETY: inside the mapping; a locked instruction takes any alignment.
        unsafe {
            let p = self.base.add(hpa as usize);
            match size {
                1 => {
                    let mut byte = expected as u8;
                    asm!("lock cmpxchg [{}], {}", in(reg) p, in(reg_byte) new as u8, inout("al") byte, options(nostack));
                    old = byte.into();
                }
                2 => {
                    asm!("lock cmpxchg [{}], {:x}", in(reg) p, in(reg) new, inout("rax") old, options(nostack));
                }
                4 => {
                    asm!("lock cmpxchg [{}], {:e}", in(reg) p, in(reg) new, inout("rax") old, options(nostack));
                }
                _ => {
                    asm!("lock cmpxchg [{}], {}", in(reg) p, in(reg) new, inout("rax") old, options(nostack));
                }
            }
        }
        old & (u64::MAX >> (64 - 8 * size))
    }

    /// LOCK CMPXCHG16B on an aligned 16-byte word: returns the old value.
    pub fn compare_exchange_16(&self, hpa: u64, expected: u128, new: u128) -> u128 {
        if !self.contains(hpa, 16) || !hpa.is_multiple_of(16) {
            return u128::MAX;
        }
        self.mark_dirty(hpa);
        // SAFETY: inside and aligned.  Every x86-64 processor of the last ten years has the
        // instruction.
        unsafe {
            let p = self.base.add(hpa as usize).cast::<u128>();
            compare_exchange_16(p, expected, new)
        }
    }

    /// Whether a frame has its dirty mark.
    #[must_use]
    pub fn is_dirty(&self, pfn: u64) -> bool {
        self.dirty.get(pfn as usize).is_some_and(|d| d.load(Relaxed) != 0)
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

    /// Say that `len` bytes at `hpa` were written (and marked dirty before), not by a processor's own
    /// program: reports frames that hold code.
    pub fn wrote(&self, hpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        fence(SeqCst); // either who marks the frame reads what was written, or the mark is seen here
        for pfn in hpa >> 12..=(hpa + len - 1) >> 12 {
            if self.is_code(pfn) {
                self.code.report(pfn, NOBODY);
                if self.bus.is_parallel() {
                    self.bus.ring(None);
                }
            }
        }
    }

    /// A processor wrote to a frame that others hold code of: they hear of it before its next
    /// instruction.
    #[cold]
    pub fn report_code(&self, pfn: u64, writer: u32, agent: &Agent) {
        self.code.report(pfn, writer);
        if self.bus.is_parallel() {
            self.bus.ring(Some(agent));
        }
    }

    /// Read (and with `clear` reset) the dirty mark of a frame.  What a processor that is running
    /// writes there is sure to be marked anew once it knows of the change ([`Bus::publish`]).
    pub fn take_dirty(&self, pfn: u64, clear: bool) -> bool {
        match self.dirty.get(pfn as usize) {
            Some(d) if clear => {
                let was_dirty = d.swap(0, Relaxed) != 0;
                if was_dirty {
                    self.dirty_epoch.fetch_add(1, SeqCst);
                    self.bus.change();
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

/// Copy bytes upwards, one after the other, as REP MOVSB does.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes, `to` for writes.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") len => _,
            options(nostack, preserves_flags));
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
        asm!(
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
