//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, alone and repeated.
//!
//! A repeated instruction keeps its progress in its registers after every element; after a bounded
//! amount of work it gives way with [`Trap::Again`].  REP MOVS and REP STOS that go upwards in plain
//! memory work in chunks that end with a page.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
use crate::arch::bits::rflags::{DF, TF, ZF};
use crate::arch::segment::seg;
use crate::cpu::flags::{mask, sub};
use crate::cpu::operand::{linear_at, segment_of};
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap};
use crate::mmu::access::Who;
use crate::mmu::walk::Access;

const RAX: usize = 0;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;
/// Elements after which a repeated instruction gives way.
const LIMIT: u64 = 4096;

/// Write the part of a register that a width of the address size covers.
pub(crate) fn set_masked(core: &mut Core, n: usize, mask: u64, v: u64) {
    core.gpr[n] = if mask == 0xFFFF { core.gpr[n] & !mask | v & mask } else { v & mask };
}

/// All ones in an address of a string instruction's address size.
pub(crate) fn string_mask(insn: &Instruction) -> u64 {
    let mut mask = u64::MAX;
    for i in 0..insn.op_count() {
        mask = match insn.op_kind(i) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 0xFFFF,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 0xFFFF_FFFF,
            _ => mask,
        };
    }
    mask
}

/// One instruction's constants.
struct Job {
    mnemonic: Mnemonic,
    size: usize,
    mask: u64,
    source: usize,
}

/// Execute an instruction of this group.
///
/// # Errors
/// What a memory access raises, or [`Trap::Again`].
pub fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let job = Job {
        mnemonic: insn.mnemonic(),
        size: insn.memory_size().size(),
        mask: string_mask(insn),
        source: segment_of(insn),
    };
    let (while_equal, while_different) = (insn.has_rep_prefix(), insn.has_repne_prefix());
    if !while_equal && !while_different {
        let flags = job.element(core)?;
        if let Some(f) = flags {
            core.set_arith(f);
        }
        return Ok(());
    }
    // Under single step, the monitor trap flag and armed breakpoints every element is an event of its own.
    let is_watched = core.flag(TF) || core.dr[7] & 0xFF != 0 || crate::vmx::events::must_step(core);
    let mut done = 0;
    let mut flags = None;
    while core.gpr[RCX] & job.mask != 0 {
        if is_watched && done > 0 || done >= LIMIT || done > 0 && must_give_way(core) {
            return Err(Trap::Again);
        }
        let chunk = if is_watched { 0 } else { job.chunk(core)? };
        if chunk == 0 {
            flags = job.element(core)?;
        }
        let n = chunk.max(1);
        let left = (core.gpr[RCX] & job.mask) - n;
        set_masked(core, RCX, job.mask, left);
        done += n;
        if let Some(f) = flags {
            // A fault later on finds the flags as they were; so write them only when leaving.
            let ends = if f & ZF != 0 { while_different } else { !while_different };
            if ends || left == 0 || is_watched {
                core.set_arith(f);
            }
            if ends {
                break;
            }
        }
    }
    Ok(())
}

/// Whether others wait for this processor, or have to hear that it wrote over code, before the
/// next element.
fn must_give_way(core: &Core) -> bool {
    core.is_parallel && (core.agent.is_rung() || !core.code_writes.is_empty())
}

impl Job {
    fn advance(&self, core: &mut Core, n: usize) {
        let by = if core.flag(DF) { (self.size as u64).wrapping_neg() } else { self.size as u64 };
        let v = core.gpr[n].wrapping_add(by);
        set_masked(core, n, self.mask, v);
    }

    fn read(&self, core: &mut Core, segment: usize, register: usize) -> Exec<u64> {
        let offset = core.gpr[register] & self.mask;
        let gva = linear_at(core, segment, offset, self.size, Access::Read)?;
        core.read_lin(gva, self.size, Who::Program)
    }

    fn write(&self, core: &mut Core, v: u64) -> Exec<()> {
        let offset = core.gpr[RDI] & self.mask;
        let gva = linear_at(core, seg::ES, offset, self.size, Access::Write)?;
        core.write_lin(gva, self.size, v & mask(self.size), Who::Program)
    }

    /// One element; of a comparison, the flags.
    fn element(&self, core: &mut Core) -> Exec<Option<u64>> {
        use Mnemonic as M;
        let mut flags = None;
        match self.mnemonic {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
                let v = self.read(core, self.source, RSI)?;
                self.write(core, v)?;
                self.advance(core, RSI);
                self.advance(core, RDI);
            }
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
                self.write(core, core.gpr[RAX])?;
                self.advance(core, RDI);
            }
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
                let v = self.read(core, self.source, RSI)?;
                let old = core.gpr[RAX];
                core.gpr[RAX] = if self.size < 4 { old & !mask(self.size) | v } else { v };
                self.advance(core, RSI);
            }
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
                let v = self.read(core, seg::ES, RDI)?;
                flags = Some(sub(self.size, core.gpr[RAX] & mask(self.size), v, 0).1);
                self.advance(core, RDI);
            }
            _ => {
                let a = self.read(core, self.source, RSI)?;
                let b = self.read(core, seg::ES, RDI)?;
                flags = Some(sub(self.size, a, b, 0).1);
                self.advance(core, RSI);
                self.advance(core, RDI);
            }
        }
        Ok(flags)
    }

    /// Do as many elements at once as lie in one page; 0 if it cannot be done so.
    fn chunk(&self, core: &mut Core) -> Exec<u64> {
        use Mnemonic as M;
        let is_move = matches!(self.mnemonic, M::Movsb | M::Movsw | M::Movsd | M::Movsq);
        let is_store = matches!(self.mnemonic, M::Stosb | M::Stosw | M::Stosd | M::Stosq);
        if !(is_move || is_store) || core.flag(DF) {
            return Ok(0);
        }
        let mut n = core.gpr[RCX] & self.mask;
        let from = if is_move { self.room(core, self.source, RSI, Access::Read, &mut n)? } else { None };
        if is_move && from.is_none() {
            return Ok(0);
        }
        let Some(to) = self.room(core, seg::ES, RDI, Access::Write, &mut n)? else { return Ok(0) };
        let bytes = n * self.size as u64;
        if let Some(from) = from {
            if to > from && to - from < self.size as u64 {
                return Ok(0); // overlaps itself inside one element
            }
            if !core.mem.move_elements(from, to, n, self.size) {
                return Ok(0);
            }
            let rsi = core.gpr[RSI].wrapping_add(bytes);
            set_masked(core, RSI, self.mask, rsi);
        } else {
            core.mem.store_elements(to, n, self.size, core.gpr[RAX]);
        }
        core.note_write(to, bytes);
        let rdi = core.gpr[RDI].wrapping_add(bytes);
        set_masked(core, RDI, self.mask, rdi);
        Ok(n)
    }

    /// Where in plain memory the elements at a register's address lie; lowers `n` to how many lie
    /// in that page (and in the segment, and below the address's wrap).
    fn room(
        &self,
        core: &mut Core,
        index: usize,
        register: usize,
        access: Access,
        n: &mut u64,
    ) -> Exec<Option<u64>> {
        let (offset, size) = (core.gpr[register] & self.mask, self.size as u64);
        let write = access == Access::Write;
        let gva = segment::linear(core, index, offset, self.size, write, false)?;
        let to_wrap = (self.mask - offset).saturating_add(1);
        let room = (FRAME_BYTES - (gva & PAGE_OFFSET)).min(to_wrap) / size;
        let few = (*n).min(room);
        if few == 0 {
            return Ok(None);
        }
        let last = offset + (few - 1) * size;
        if segment::linear(core, index, last, self.size, write, false).is_err() {
            return Ok(None);
        }
        let (hpa, special) = core.translate(gva, access)?;
        *n = few;
        Ok((!special).then_some(hpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::bits::rflags::{CF, PF, SF};
    use crate::arch::exception::vector;
    use crate::cpu::step::step;
    use crate::cpu::testbed::{fault, long, protected, real};

    fn run(core: &mut Core, code: &[u8]) -> Exec<()> {
        core.mem.write_bytes(core.rip, code);
        loop {
            match step(core) {
                Err(Trap::Again) => {}
                other => return other,
            }
        }
    }

    #[test]
    fn rep_movs_copies_across_pages_and_overlapping_as_one_element_after_the_other() {
        for (size, code) in [(1, &[0xF3, 0xA4][..]), (2, &[0x66, 0xF3, 0xA5]), (4, &[0xF3, 0xA5])] {
            for (from, to) in [(0x2FF0, 0x5FF1), (0x2000, 0x2001), (0x2000, 0x2003), (0x2003, 0x2000)] {
                let mut core = protected(0);
                let bytes: Vec<u8> = (0..0x6000u32).map(|i| ((i * 7) >> 3) as u8).collect();
                core.mem.write_bytes(0x2000, &bytes);
                let mut expected = bytes.clone();
                let n = 5000 / size;
                for i in 0..n {
                    let (s, d) = (from - 0x2000 + i * size, to - 0x2000 + i * size);
                    expected.copy_within(s..s + size, d);
                }
                (core.gpr[6], core.gpr[7], core.gpr[1]) = (from as u64, to as u64, n as u64);
                run(&mut core, code).unwrap();
                let mut got = vec![0; bytes.len()];
                core.mem.read_bytes(0x2000, &mut got);
                assert!(expected == got, "{size} {from:#x} {to:#x}");
                assert_eq!((0, (to + n * size) as u64), (core.gpr[1], core.gpr[7]));
            }
        }
    }

    #[test]
    fn rep_stos_downwards_and_upwards() {
        for (flag, start) in [(0, 0x2000), (DF, 0x2000 + 4 * 99)] {
            let mut core = protected(0);
            core.rflags |= flag;
            (core.gpr[0], core.gpr[1], core.gpr[7]) = (0x1234_5678, 100, start);
            run(&mut core, &[0xF3, 0xAB]).unwrap();
            let words: Vec<u64> = (0..101).map(|i| core.mem.load(0x1FFC + 4 * i, 4)).collect();
            assert_eq!((0, vec![0x1234_5678; 100]), (words[0], words[1..].to_vec()));
        }
    }

    #[test]
    fn a_long_repetition_gives_way_and_is_retired_once() {
        let mut core = long(0);
        core.set_countdown(10);
        (core.gpr[1], core.gpr[7]) = (3 * 4096, 0x10_0000);
        core.mem.write_bytes(0x1000, &[0xF3, 0xAA]);
        assert_eq!(Err(Trap::Again), step(&mut core));
        assert_eq!((0x1000, 2 * 4096, 10), (core.rip, core.gpr[1], core.countdown.get()));
        assert_eq!(Err(Trap::Again), step(&mut core));
        assert_eq!(Ok(()), step(&mut core));
        assert_eq!((0x1002, 0, 9), (core.rip, core.gpr[1], core.countdown.get()));
    }

    #[test]
    fn a_fault_keeps_the_progress_and_the_flags_before() {
        let mut core = long(3);
        core.mem.store(0xA008, 8, 0); // the second 2 MBytes are not present
        (core.gpr[1], core.gpr[7]) = (100, 0x20_0000 - 8);
        let before = core.rflags;
        core.mem.write_bytes(0x1000, &[0xF3, 0xAE]); // repe scasb
        assert_eq!((vector::PF, Some(4)), fault(step(&mut core)));
        assert_eq!((92, 0x20_0000, before, 0x1000), (core.gpr[1], core.gpr[7], core.rflags, core.rip));
    }

    #[test]
    fn comparisons_end_where_they_should() {
        let mut core = protected(0);
        core.mem.write_bytes(0x2000, b"abcdX");
        core.mem.write_bytes(0x3000, b"abcdY");
        (core.gpr[6], core.gpr[7], core.gpr[1]) = (0x2000, 0x3000, 9);
        run(&mut core, &[0xF3, 0xA6]).unwrap();
        assert_eq!((4, 0x2005, CF | SF), (core.gpr[1], core.gpr[6], core.rflags & (CF | SF | ZF)));
        core.gpr[0] = u64::from(b'c');
        (core.gpr[7], core.gpr[1]) = (0x2000, 9);
        run(&mut core, &[0xF2, 0xAE]).unwrap();
        assert_eq!((6, 0x2003, ZF | PF), (core.gpr[1], core.gpr[7], core.rflags & (ZF | PF | CF)));
    }

    #[test]
    fn addresses_wrap_at_the_address_size() {
        let mut core = real();
        core.gpr[7] = 0xFFFF_FFFE;
        core.gpr[1] = 0xABCD_0003;
        core.gpr[0] = 0x55;
        run(&mut core, &[0xF3, 0xAA]).unwrap();
        assert_eq!((0xFFFF_0001, 0xABCD_0000), (core.gpr[7], core.gpr[1]));
        assert_eq!((0x55, 0x55, 0), (core.mem.load(0xFFFF, 1), core.mem.load(0, 1), core.mem.load(1, 1)));
    }

    #[test]
    fn under_single_step_every_iteration_traps() {
        let mut core = protected(0);
        core.rflags |= TF;
        (core.gpr[1], core.gpr[7]) = (2, 0x2000);
        core.mem.write_bytes(0x1000, &[0xF3, 0xAA]);
        assert_eq!((vector::DB, None), fault(step(&mut core)));
        assert_eq!((1, 0x1000), (core.gpr[1], core.rip));
        assert_eq!((vector::DB, None), fault(step(&mut core)));
        assert_eq!((0, 0x1002), (core.gpr[1], core.rip));
    }
}
