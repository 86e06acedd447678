//! Leaving word of the last x87 instruction ([`crate::cpu::pointers`]): a store or four behind each, and
//! nothing else until somebody asks.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic};

use super::asm::{T0, state};
use super::glue::table;
use super::kinds::has_memory;
use super::tables::Tables;
use super::translate::Translator;
use crate::cpu::pointers::{Last, Pointers, are_noted_for};
use crate::cpu::state::Core;

impl Translator<'_> {
    /// Leave word of an x87 instruction that was just emitted.
    pub(super) fn note_x87(&mut self, insn: &Instruction) {
        let field = |at: usize| state(table(at));
        if insn.mnemonic() == Mnemonic::Fninit {
            self.a.store_imm32(field(offset_of!(Tables, x87)), 0);
            self.a.store_imm32(field(offset_of!(Tables, x87_memory)), 0);
            for at in (0..size_of::<Pointers>()).step_by(8) {
                self.a.store_imm(state(offset_of!(Core, pointers) + at), 0);
            }
        } else if are_noted_for(insn) {
            self.tools.x87.push(Last::of(insn));
            let number = self.tools.x87.len() as u32;
            self.a.store_imm32(field(offset_of!(Tables, x87)), number);
            if has_memory(insn) {
                self.a.store_imm32(field(offset_of!(Tables, x87_memory)), number);
                self.operand_offset(insn, 0);
                self.a.store(field(offset_of!(Tables, x87_data)), T0);
            }
        }
    }
}
