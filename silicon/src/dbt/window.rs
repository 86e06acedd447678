//! Lowering of memory operands in a window of the guest's ([`crate::mmu::window`]).
//!
//! Of a 32-bit program: the computer's GS base is the window's address, and the program's operand is an
//! operand of 32 bits with that segment: nothing is computed or looked up.  Of a 64-bit program:
//! [`super::arena`].  Where the page is not mapped, the access faults, and the instruction is
//! interpreted.

use iced_x86::{Instruction, Register};

use super::arena::{Compute, Far, Reach};
use super::asm::{Mem, T0, Through, at};
use super::block::Site;
use super::kinds::has_base;
use super::map::{host_of, number, with_width};
use super::tables::{NOWHERE, Tables};
use super::translate::Translator;
use crate::mmu::window::{Current, HIGH, LOW};

/// Bytes of an x87 register in memory.
const TEN_BYTES: usize = 10;

/// Make the instruction's memory operand this one.
pub(super) fn encode(insn: &mut Instruction, mem: Mem) {
    let is_short = mem.through == Some(Through::Bits32);
    let width = if is_short { Register::EAX } else { Register::RAX };
    let register = |r: Option<u8>| r.map_or(Register::None, |r| with_width(r, width));
    let (index, scale) = mem.index.unzip();
    insn.set_memory_base(register(mem.base));
    insn.set_memory_index(register(index));
    insn.set_memory_index_scale(1 << scale.unwrap_or(0));
    let bytes = match (i8::try_from(mem.disp), mem.base) {
        (Ok(0), Some(_)) => 0,
        (Ok(_), Some(_)) => 1,
        _ if is_short => 4,
        _ => 8,
    };
    let is_whole = is_short && bytes == 4;
    let disp =
        if is_whole { u64::from(mem.disp.cast_unsigned()) } else { i64::from(mem.disp).cast_unsigned() };
    insn.set_memory_displacement64(disp);
    insn.set_memory_displ_size(bytes);
    let is_own = mem.through == Some(Through::Own);
    insn.set_segment_prefix(if is_own { Register::None } else { Register::GS });
}

/// Let operands lead into a window from now on.
pub(super) fn enter(tables: &mut Tables, Current { base, low, .. }: Current) {
    super::gate::set_window(base);
    for number in HIGH {
        tables.distances[number as usize] = base;
    }
    tables.distances[LOW as usize] = low.unwrap_or(NOWHERE);
}

impl Translator<'_> {
    /// How the instruction's operand is accessed in the window, if it is.  AH … BH and the registers with
    /// two digits cannot be in one instruction.
    pub(super) fn reach_window(&self, insn: &Instruction, has_high_byte: bool) -> Option<Reach> {
        if !self.has_window {
            return None;
        }
        let reach = if self.is_32 { Self::reach_32(insn) } else { self.reach(insn) };
        let is_old = |r: u8| r < 8;
        reach.filter(|Reach { mem, .. }| {
            !has_high_byte || mem.base.is_none_or(is_old) && mem.index.is_none_or(|(i, _)| is_old(i))
        })
    }

    /// A 32-bit program's operand.  Of one of ten bytes the computer accesses the last two apart, and
    /// computes their address with 32 bits again: at the end of the window they would be the first ones of it.
    fn reach_32(insn: &Instruction) -> Option<Reach> {
        if insn.memory_size().size() == TEN_BYTES {
            return None;
        }
        let (compute, mem) = if has_base(insn) {
            (Compute::Address, at(T0))
        } else {
            let host = |r: Register| if r == Register::None { None } else { host_of(number(r)) };
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            let index = host(insn.memory_index()).map(|i| (i, scale));
            let disp = insn.memory_displacement64() as i32;
            (Compute::Nothing, Mem::new(host(insn.memory_base()), index, disp))
        };
        Some(Reach {
            compute,
            check: None,
            far: Far::Not,
            mem: Mem { through: Some(Through::Bits32), ..mem },
            proves: None,
        })
    }

    /// The instruction accesses memory there, in the window.
    pub(super) fn in_window(&mut self, insn: &Instruction, m: Mem) -> Mem {
        debug_assert!(m.through.is_some());
        self.access_site = Some(self.site(insn));
        m
    }

    /// The memory operand of an instruction that can be interpreted from its start if the access faults:
    /// in the window, or behind a check.
    pub(super) fn operand(&mut self, insn: &Instruction, size: usize, write: bool) -> Mem {
        match self.reach_window(insn, false) {
            Some(reach) => self.approach(insn, reach),
            None => self.place(insn, size, write, |t, by| t.address(insn, by)),
        }
    }

    /// Note where the instruction accesses the window; after a fault it is interpreted, and code goes
    /// on at `next`.
    pub(super) fn note_accesses(&mut self, next: u64) {
        let accesses = std::mem::take(&mut self.a.accesses);
        let Some(site) = self.access_site.take() else {
            debug_assert!(accesses.is_empty());
            return;
        };
        let number = self.tools.sites.push(Site { next, ..site });
        for at in accesses {
            self.tools.faults.push((at, number));
        }
    }
}
