//! Lowering of the instructions that use the stack or go elsewhere.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::asm::{Mem, RBP, RCX, T0, T1, Through, cc, state};
use super::glue::{slot, table};
use super::map::{HOST_OF_RSP, host_of, number};
use super::system::selector_of;
use super::tables::Tables;
use super::translate::{Cold, Translator};

impl Translator<'_> {
    /// The value of a register operand in a host register: itself, or loaded into `temp`.
    fn value_of(&mut self, r: Register, temp: u8) -> u8 {
        host_of(number(r)).unwrap_or_else(|| {
            if temp == T0 {
                self.t0_group = None;
            }
            self.a.load(temp, state(slot(number(r))));
            temp
        })
    }

    /// Bytes of an address, and of what a push pushes.
    pub(super) fn word(&self) -> i32 {
        if self.is_32 { 4 } else { 8 }
    }

    /// `lea` as wide as an address.
    pub(super) fn lea_address(&mut self, dst: u8, m: Mem) {
        if self.is_32 { self.a.lea32(dst, m) } else { self.a.lea(dst, m) }
    }

    pub(super) fn lea_word(&mut self, dst: u8, base: u8, disp: i32) {
        self.lea_address(dst, Mem::new(Some(base), None, disp));
    }

    fn load_word(&mut self, dst: u8, m: Mem) {
        if self.is_32 { self.a.load32(dst, m) } else { self.a.load(dst, m) }
    }

    pub(super) fn store_word(&mut self, m: Mem, src: u8) {
        if self.is_32 { self.a.store32(m, src) } else { self.a.store(m, src) }
    }

    fn store_word_imm(&mut self, m: Mem, v: u64) {
        if self.is_32 { self.a.store32_imm(m, v as u32) } else { self.a.store_imm(m, v) }
    }

    fn store_address(&mut self, m: Mem, v: u64) {
        if self.is_32 { self.a.store32_imm(m, v as u32) } else { self.a.store_guest(m, v) }
    }

    fn move_word(&mut self, dst: u8, src: u8) {
        if self.is_32 { self.a.mov32(dst, src) } else { self.a.mov(dst, src) }
    }

    /// The host place of the word below the guest's stack pointer.
    pub(super) fn stack_place(&mut self, insn: &Instruction) -> Mem {
        let word = self.word();
        if self.has_window {
            return self.stack_in_window(insn, HOST_OF_RSP, -word);
        }
        self.place(insn, word as usize, true, |t, by| t.lea_word(T0, HOST_OF_RSP, by - word))
    }

    /// The host place of the word that `register` (RSP, RBP) points at.
    fn stack_top(&mut self, insn: &Instruction, register: u8) -> Mem {
        if self.has_window {
            return self.stack_in_window(insn, register, 0);
        }
        self.place(insn, self.word() as usize, false, |t, by| t.lea_word(T0, register, by))
    }

    fn stack_in_window(&mut self, insn: &Instruction, register: u8, disp: i32) -> Mem {
        if self.is_32 {
            let m = Mem::new(Some(register), None, disp);
            return self.in_window(insn, Mem { through: Some(Through::Bits32), ..m });
        }
        self.stack_word(insn, register, disp)
    }

    pub(super) fn move_stack(&mut self, by: i32) {
        self.lea_word(HOST_OF_RSP, HOST_OF_RSP, by);
    }

    fn value_slot() -> Mem {
        state(table(offset_of!(Tables, value)))
    }

    /// Load a memory operand of a word into `value`.
    fn fetch_operand(&mut self, insn: &Instruction) {
        let place = self.operand(insn, self.word() as usize, false);
        self.load_word(T1, place);
        self.a.store(Self::value_slot(), T1);
    }

    pub(super) fn push(&mut self, insn: &Instruction) -> bool {
        self.about_to_write(4);
        match insn.op0_kind() {
            OpKind::Register if insn.op0_register().is_segment_register() => {
                let place = self.stack_place(insn);
                self.a.load16(T1, selector_of(insn.op0_register()));
                self.store_word(place, T1);
            }
            OpKind::Register => {
                let place = self.stack_place(insn);
                let v = self.value_of(insn.op0_register(), T1);
                self.store_word(place, v);
            }
            OpKind::Memory => {
                self.fetch_operand(insn);
                let place = self.stack_place(insn);
                self.a.load(T1, Self::value_slot());
                self.store_word(place, T1);
            }
            _ => {
                let place = self.stack_place(insn);
                self.store_word_imm(place, insn.immediate(0));
            }
        }
        self.move_stack(-self.word());
        self.close_sites();
        true
    }

    pub(super) fn pop(&mut self, insn: &Instruction) -> bool {
        let r = insn.op0_register();
        self.about_to_write(4);
        self.about_to_write(number(r));
        let place = self.stack_top(insn, HOST_OF_RSP);
        if let Some(h) = host_of(number(r)) {
            self.load_word(h, place);
        } else {
            self.a.load(T1, place);
            self.a.store(state(slot(number(r))), T1);
        }
        if number(r) != 4 {
            self.move_stack(self.word());
        }
        self.close_sites();
        true
    }

    pub(super) fn leave(&mut self, insn: &Instruction) -> bool {
        self.about_to_write(4);
        self.about_to_write(5);
        let place = self.stack_top(insn, RBP);
        self.load_word(T1, place);
        self.lea_word(HOST_OF_RSP, RBP, self.word());
        self.a.mov(RBP, T1);
        self.close_sites();
        true
    }

    fn push_return(&mut self, insn: &Instruction) {
        let place = self.stack_place(insn);
        self.store_address(place, insn.next_ip());
        self.move_stack(-self.word());
    }

    pub(super) fn call(&mut self, insn: &Instruction) -> bool {
        self.settle_before(insn);
        self.about_to_write(4);
        self.push_return(insn);
        let target = insn.near_branch_target();
        self.transfer(target);
        false
    }

    /// Interpret the instruction unless the address in T1 is canonical; T1 and the computer's flags
    /// are lost.
    pub(super) fn require_canonical(&mut self, insn: &Instruction) {
        self.a.rr(true, &[0xC1], 7, T1); // sar T1, 47
        self.a.raw(&[47]);
        self.a.rr(true, &[0xFF], 0, T1); // inc T1
        self.a.cmp_imm(T1, 1);
        self.leave_if(insn, cc::A);
    }

    pub(super) fn call_indirect(&mut self, insn: &Instruction) -> bool {
        self.settle_before(insn);
        self.about_to_write(4);
        self.keep_flags();
        if insn.op0_kind() == OpKind::Register {
            let v = self.value_of(insn.op0_register(), T0);
            self.move_word(T1, v);
            self.a.store(Self::value_slot(), T1);
        } else {
            self.fetch_operand(insn);
        }
        if !self.is_32 {
            // A non-canonical target faults before anything is pushed.
            self.require_canonical(insn);
        }
        self.push_return(insn);
        self.a.load(T0, Self::value_slot());
        self.transfer_indirect(insn, 0);
        false
    }

    pub(super) fn jump_indirect(&mut self, insn: &Instruction) -> bool {
        self.settle_stack(insn.ip(), self.count - self.index);
        if insn.op0_kind() == OpKind::Register {
            self.keep_flags();
            let v = self.value_of(insn.op0_register(), T0);
            self.move_word(T0, v);
        } else {
            self.keep_flags();
            let place = self.operand(insn, self.word() as usize, false);
            self.load_word(T0, place);
        }
        self.transfer_indirect(insn, 0);
        false
    }

    /// The transfers that depend on RCX, or ECX by address size: JRCXZ, LOOP and their kin, which
    /// leave the flags alone.  False, having emitted nothing, if it is none of them.
    pub(super) fn transfer_by_count(&mut self, insn: &Instruction) -> bool {
        use Mnemonic as M;
        let wide = match insn.code() {
            Code::Jrcxz_rel8_64 | Code::Loop_rel8_64_RCX => true,
            Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX => true,
            Code::Jecxz_rel8_64 | Code::Loop_rel8_64_ECX => false,
            Code::Loope_rel8_64_ECX | Code::Loopne_rel8_64_ECX => false,
            Code::Jecxz_rel8_32 | Code::Loop_rel8_32_ECX => false,
            Code::Loope_rel8_32_ECX | Code::Loopne_rel8_32_ECX => false,
            _ => return false,
        };
        let condition = match insn.mnemonic() {
            M::Loope => Some(cc::E),
            M::Loopne => Some(cc::NE),
            _ => None,
        };
        let is_jump = matches!(insn.mnemonic(), M::Jrcxz | M::Jecxz);
        self.end_shadow();
        self.settle_stack(insn.ip(), self.count - self.index);
        if condition.is_some() {
            self.make_live();
        }
        let rest = (self.count - self.index - 1) as u8;
        if rest == 0 {
            self.record_flags();
            self.record_x87();
        }
        if !is_jump {
            // The block ends here: no recipe outlives the old count.
            debug_assert!(rest == 0);
            let less = Mem::new(Some(RCX), None, -1);
            if wide { self.a.lea(RCX, less) } else { self.a.lea32(RCX, less) }
        }
        self.a.raw(if wide { &[0xE3] } else { &[0x67, 0xE3] }); // jrcxz, jecxz
        let branch = match condition {
            Some(cc) => {
                self.a.raw(&[6]);
                self.a.jcc_later(cc)
            }
            None if is_jump => {
                self.a.raw(&[2, 0xEB, 5]); // over a jump over the jump
                self.a.jmp_later()
            }
            None => {
                self.a.raw(&[5]);
                self.a.jmp_later()
            }
        };
        let target = insn.near_branch_target();
        self.cold.push(Cold::Exit { branch, target, flags: self.flags, x87: self.x87, rest });
        true
    }

    pub(super) fn ret(&mut self, insn: &Instruction) -> bool {
        self.settle_before(insn);
        self.about_to_write(4);
        self.keep_flags();
        let place = self.stack_top(insn, HOST_OF_RSP);
        self.load_word(T0, place);
        let extra = if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
        self.move_stack(self.word() + extra);
        self.transfer_indirect(insn, self.word() + extra);
        false
    }
}
