//! Lowering of memory operands in a window of the guest's ([`crate::mmu::window`]).
//!
//! The computer's GS base is the window's address, and a 32-bit program's operand is an operand of 32
//! bits with that segment: nothing is computed or looked up.  Where the page is not mapped, the access
//! faults, and the instruction is interpreted.  What cannot be taken back when it faults goes through
//! the first level of the TLB, as without a window.

use iced_x86::{Instruction, Register};

use super::asm::{Mem, T0, at};
use super::block::Site;
use super::kinds::has_base;
use super::map::{HOST_OF_RSP, host_of, number, with_width};
use super::translate::Translator;

/// Make the memory operand one in the window; where its segment may have a base, its address is in T0.
pub(super) fn encode(insn: &mut Instruction) {
    if has_base(insn) {
        insn.set_memory_base(with_width(T0, Register::EAX));
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        insn.set_memory_displacement64(0);
        insn.set_memory_displ_size(0);
    } else if insn.memory_base() == Register::ESP {
        insn.set_memory_base(with_width(HOST_OF_RSP, Register::EAX));
    }
    insn.set_segment_prefix(Register::GS);
}

impl Translator<'_> {
    /// Whether the instruction can have its operand in the window: AH … BH and the registers with two
    /// digits cannot be in one instruction.
    pub(super) fn fits_window(&self, insn: &Instruction, has_high_byte: bool) -> bool {
        !has_high_byte || !has_base(insn) && insn.memory_base() != Register::ESP
    }

    /// The instruction accesses memory there, in the window.
    pub(super) fn in_window(&mut self, insn: &Instruction, m: Mem) -> Mem {
        self.access_site = Some(self.site(insn));
        Mem { in_window: true, ..m }
    }

    /// The memory operand, in the window.
    pub(super) fn window_operand(&mut self, insn: &Instruction) -> Mem {
        let place = if has_base(insn) {
            self.keep_flags();
            self.address(insn, 0);
            at(T0)
        } else {
            let host = |r: Register| if r == Register::None { None } else { host_of(number(r)) };
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            let index = host(insn.memory_index()).map(|i| (i, scale));
            Mem::new(host(insn.memory_base()), index, insn.memory_displacement64() as i32)
        };
        self.in_window(insn, place)
    }

    /// The memory operand of an instruction that can be interpreted from its start if the access faults:
    /// in the window, or behind a check.
    pub(super) fn operand(&mut self, insn: &Instruction, size: usize, write: bool) -> Mem {
        if self.has_window {
            self.window_operand(insn)
        } else {
            self.place(insn, size, write, |t, by| t.address(insn, by))
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
