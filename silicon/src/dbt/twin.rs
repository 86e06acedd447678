//! Memory for code, mapped twice: to write it and to execute it, never both at one address.
//!
//! Source: SDM 3A, "Handling Self- and Cross-Modifying Code": code that was written through another linear
//! address than it is executed at needs a serializing instruction between the two ([`serialize`]).

use std::arch::asm;
use std::io;
use std::ptr;

/// Bytes of a large page.
pub const LARGE_BYTES: usize = 2 << 20;

/// The two mappings.
#[derive(Debug)]
pub struct Twin {
    writable: Mapping,
    executable: Mapping,
}

// SAFETY: the mappings belong to the value alone.
unsafe impl Send for Twin {}

/// A mapping at an address that a large page may have, and the addresses reserved for it.
#[derive(Debug)]
struct Mapping {
    start: *mut u8,
    reserved: (*mut u8, usize),
}

impl Mapping {
    fn new(fd: i32, len: usize, prot: i32) -> io::Result<Self> {
        let room = len + LARGE_BYTES;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: fresh addresses, a part of which the second mapping replaces.
        unsafe {
            let all = libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0);
            if all == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let all = all.cast::<u8>();
            let start = all.add(all.align_offset(LARGE_BYTES));
            let mapping = Self { start, reserved: (all, room) };
            let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
            if libc::mmap(start.cast(), len, prot, fixed, fd, 0) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(mapping)
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody runs what is there any more.
        unsafe { libc::munmap(self.reserved.0.cast(), self.reserved.1) };
    }
}

impl Twin {
    /// So many bytes, of which only written pages exist.
    ///
    /// # Errors
    /// If the computer gives no executable memory.
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh descriptor, closed here; the mappings keep its memory.
        unsafe {
            let fd = libc::memfd_create(c"understudy-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, len as i64) != 0 {
                return Err(io::Error::last_os_error());
            }
            let writable = Mapping::new(fd, len, libc::PROT_READ | libc::PROT_WRITE);
            let executable = Mapping::new(fd, len, libc::PROT_READ | libc::PROT_EXEC);
            libc::close(fd);
            Ok(Self { writable: writable?, executable: executable? })
        }
    }

    /// Where it is written.
    #[must_use]
    pub fn writable(&self) -> *mut u8 {
        self.writable.start
    }

    /// Where it is executed.
    #[must_use]
    pub fn executable(&self) -> *mut u8 {
        self.executable.start
    }

    /// Have the large page at `offset` in one piece, if the computer has one to give.
    pub fn enlarge(&self, offset: usize) {
        for mapping in [&self.writable, &self.executable] {
            // SAFETY: a hint about our own mapping; it may be refused.
            unsafe { libc::madvise(mapping.start.add(offset).cast(), LARGE_BYTES, libc::MADV_COLLAPSE) };
        }
    }
}

/// What was written is what is executed from here on.
pub fn serialize() {
    // SAFETY: an IRETQ to the next instruction, with the stack and the flags as they are.
    unsafe {
        asm!(
            "mov {old}, rsp",
            "mov {t:e}, ss", "push {t}", "push {old}", "pushfq", "mov {t:e}, cs", "push {t}",
            "lea {t}, [rip + 2f]", "push {t}",
            "iretq",
            "2:",
            t = out(reg) _, old = out(reg) _,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(at: *mut u8) -> String {
        let at = at as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .find_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (from, to) = range.split_once('-')?;
                let number = |s| usize::from_str_radix(s, 16).unwrap();
                (number(from)..number(to)).contains(&at).then(|| rest[..4].to_owned())
            })
            .unwrap()
    }

    #[test]
    fn what_is_written_here_is_executed_there() {
        let twin = Twin::new(LARGE_BYTES).unwrap();
        assert_eq!(("rw-s", "r-xs"), (&*rights(twin.writable()), &*rights(twin.executable())));
        for value in [7, 8] {
            // SAFETY: mov eax, value; ret.
            let got = unsafe {
                twin.writable().cast::<[u8; 6]>().write([0xB8, value, 0, 0, 0, 0xC3]);
                serialize();
                std::mem::transmute::<*mut u8, extern "C" fn() -> u32>(twin.executable())()
            };
            assert_eq!(u32::from(value), got);
        }
        twin.enlarge(0);
    }

    /// Of a process with processors of both engines, too.
    #[test]
    fn nothing_is_writable_and_executable_at_one_address() {
        use crate::cpu::state::Clock;
        use crate::processor::{EngineKind, Processor};
        let mem = crate::mem::Memory::new(1 << 20).unwrap();
        mem.write_bytes(0xF_FFF0, &[0xD9, 0xE8, 0xEB, 0xFC]); // fld1; jmp
        for kind in [EngineKind::Reference, EngineKind::Dbt] {
            let mut p = Processor::new(mem.clone(), kind, Clock::Virtual, 0).unwrap();
            p.core.seg[crate::arch::segment::seg::CS].base = 0xF_0000;
            p.core.refresh();
            p.run(100, &mut || false);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.lines().any(|l| l.contains(" rwx")), "{maps}");
            assert!(maps.lines().any(|l| l.contains(" r-xs") && l.contains("understudy-code")));
        }
    }
}
