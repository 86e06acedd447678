//! Reads and writes of linear addresses.

use std::sync::atomic::{Ordering::SeqCst, fence};

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::cpu::state::{Core, Mode};
use crate::cpu::trap::Exec;
use crate::mem::Memory;
use crate::mmu::walk::Access;

/// On whose behalf memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// The program, at the current privilege level.
    Program,
    /// The processor itself (descriptor tables, TSS, interrupt stacks): a supervisor access.
    Processor,
}

impl Core {
    fn place(&mut self, gva: u64, access: Access, who: Who) -> Exec<(u64, bool)> {
        match who {
            Who::Program => self.translate(gva, access),
            Who::Processor => self.translate_as(gva, access, false, true),
        }
    }

    /// The linear address `n` bytes on, wrapping as the mode does.
    #[must_use]
    pub fn linear_add(&self, gva: u64, n: u64) -> u64 {
        let sum = gva.wrapping_add(n);
        if self.mode == Mode::Bits64 || self.is_long() { sum } else { sum & 0xFFFF_FFFF }
    }

    /// Read 1, 2, 4 or 8 bytes at a linear address, zero-extended.
    ///
    /// # Errors
    /// The translation's, or a stop for memory-mapped I/O.
    pub fn read_lin(&mut self, gva: u64, size: usize, who: Who) -> Exec<u64> {
        let room = FRAME_BYTES - (gva & PAGE_OFFSET);
        if room >= size as u64 {
            let (hpa, special) = self.place(gva, Access::Read, who)?;
            return if special { self.read_special(hpa, size) } else { Ok(self.mem.load(hpa, size)) };
        }
        let second = self.linear_add(gva, room);
        let (a, a_special) = self.place(gva, Access::Read, who)?;
        let (b, b_special) = self.place(second, Access::Read, who)?;
        let mut value = 0;
        for i in 0..size as u64 {
            let (hpa, special) = if i < room { (a + i, a_special) } else { (b + i - room, b_special) };
            let byte = if special { self.read_special(hpa, 1)? } else { self.mem.load(hpa, 1) };
            value |= byte << (8 * i);
        }
        Ok(value)
    }

    /// Write 1, 2, 4 or 8 bytes at a linear address.
    ///
    /// # Errors
    /// The translation's (nothing was written then), or a stop for memory-mapped I/O.
    pub fn write_lin(&mut self, gva: u64, size: usize, value: u64, who: Who) -> Exec<()> {
        let room = FRAME_BYTES - (gva & PAGE_OFFSET);
        if room >= size as u64 {
            let (hpa, special) = self.place(gva, Access::Write, who)?;
            return self.write_phys(hpa, special, size, value);
        }
        let second = self.linear_add(gva, room);
        let (a, a_special) = self.place(gva, Access::Write, who)?;
        let (b, b_special) = self.place(second, Access::Write, who)?;
        for i in 0..size as u64 {
            let (hpa, special) = if i < room { (a + i, a_special) } else { (b + i - room, b_special) };
            self.write_phys(hpa, special, 1, value >> (8 * i) & 0xFF)?;
        }
        Ok(())
    }

    fn write_phys(&mut self, hpa: u64, special: bool, size: usize, value: u64) -> Exec<()> {
        if special {
            return self.write_special(hpa, size, value);
        }
        self.mem.store(hpa, size, value);
        self.note_write(hpa, size as u64);
        Ok(())
    }

    /// Tell the engines if a write of plain memory inside one frame hit code.
    #[inline]
    pub fn note_write(&mut self, hpa: u64, len: u64) {
        if self.is_parallel {
            fence(SeqCst); // either who marks the frame reads what was written, or the mark is seen here
        }
        if self.mem.is_code(hpa >> 12) {
            self.code_writes.push((hpa, len));
        }
    }

    /// Where `size` bytes at a linear address lie in plain memory; `None` if they are in two pages
    /// or in a special one.
    ///
    /// # Errors
    /// The translation's.
    pub fn plain_range(&mut self, gva: u64, size: usize, access: Access) -> Exec<Option<u64>> {
        if (gva & PAGE_OFFSET) + size as u64 > FRAME_BYTES {
            return Ok(None);
        }
        let (hpa, special) = self.place(gva, access, Who::Program)?;
        Ok((!special).then_some(hpa))
    }

    /// Check that a write would succeed, without writing (both pages of a crossing operand).
    ///
    /// # Errors
    /// The translation's.
    pub fn probe_write(&mut self, gva: u64, size: usize, who: Who) -> Exec<()> {
        self.place(gva, Access::Write, who)?;
        if (gva & PAGE_OFFSET) + size as u64 > FRAME_BYTES {
            let second = self.linear_add(gva, FRAME_BYTES - (gva & PAGE_OFFSET));
            self.place(second, Access::Write, who)?;
        }
        Ok(())
    }

    /// Read into a buffer of any length.
    ///
    /// # Errors
    /// As [`Core::read_lin`].
    pub fn read_lin_bytes(&mut self, gva: u64, out: &mut [u8], who: Who) -> Exec<()> {
        for (i, b) in out.iter_mut().enumerate() {
            *b = self.read_lin(self.linear_add(gva, i as u64), 1, who)? as u8;
        }
        Ok(())
    }

    /// Write a buffer of any length (at most two pages), all or nothing.
    ///
    /// # Errors
    /// As [`Core::write_lin`].
    pub fn write_lin_bytes(&mut self, gva: u64, data: &[u8], who: Who) -> Exec<()> {
        self.probe_write(gva, data.len(), who)?;
        for (i, &b) in data.iter().enumerate() {
            self.write_lin(self.linear_add(gva, i as u64), 1, u64::from(b), who)?;
        }
        Ok(())
    }

    /// Atomically read-modify-write 1, 2, 4 or 8 bytes (LOCK, XCHG): returns the old value.
    ///
    /// # Errors
    /// As [`Core::write_lin`]; on special pages it is not atomic.
    pub fn update_lin(&mut self, gva: u64, size: usize, mut f: impl FnMut(u64) -> u64) -> Exec<u64> {
        let is_crossing = (gva & PAGE_OFFSET) + size as u64 > FRAME_BYTES;
        if !is_crossing {
            let (hpa, special) = self.translate(gva, Access::Write)?;
            if !special && Memory::is_in_line(hpa, size) {
                let old = self.mem.update(hpa, size, f);
                self.note_write(hpa, size as u64);
                return Ok(old);
            }
        }
        self.probe_write(gva, size, Who::Program)?;
        let bus = self.mem.bus().clone();
        let _lock = bus.lock(&self.agent);
        let old = self.read_lin(gva, size, Who::Program)?;
        self.write_lin(gva, size, f(old), Who::Program)?;
        Ok(old)
    }
}
