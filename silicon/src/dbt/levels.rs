//! Lowering of SYSCALL and SYSRET: what goes from one privilege level to another.
//!
//! The code on the other side was translated for another mode of the processor, which follows from
//! the mode on this one; the jump is taken through the table of indirect targets of that side, if
//! it is the mode that the table is for.  In all other cases (a level that changes what is counted,
//! a flag that has to be looked after, an address that is none) the instruction is interpreted.

use std::mem::offset_of;

use iced_x86::Instruction;

use super::asm::{Mem, RCX, T0, T1, cc, state};
use super::flags::Flags;
use super::glue::table;
use super::mode::{
    MODE_LEVEL_0, MODE_LIFTED, MODE_TSC, MODE_UNGROUPED, MODE_USER, MODE_WINDOW, MODE_WINDOWS, class_of,
};
use super::system::{flags_register, msr, segment};
use super::tables::Tables;
use super::translate::Translator;
use crate::arch::bits::{cr4, efer, rflags};
use crate::arch::segment::{Segment, seg};
use crate::cpu::state::{Core, Msrs};
use crate::cpu::syscall::{CODE64, DATA, FLAGS_OF_SYSRET};

const R11: u8 = 11;

impl Translator<'_> {
    /// Whether code of this mode can go to another level so, as far as is known.
    pub(super) fn may_change_level(&self, to_user: bool) -> bool {
        let is_from = if to_user { super::mode::is_level_0(self.mode) } else { self.is_user };
        is_from && !self.is_32 && self.shadow_from.is_none()
    }

    /// SYSCALL of a program.
    pub(super) fn syscall(&mut self, insn: &Instruction) -> bool {
        let mode = self.mode & !(MODE_USER | MODE_UNGROUPED | MODE_WINDOWS) | MODE_LEVEL_0;
        self.keep_flags();
        self.require_levels(insn, mode);
        self.test32(msr(offset_of!(Msrs, fmask)), rflags::AC); // else SMAP may be lifted
        self.leave_if(insn, cc::E);
        self.a.load(T1, msr(offset_of!(Msrs, lstar)));
        self.require_canonical(insn);

        self.whole_flags();
        self.a.mov(R11, T1);
        self.a.guest(RCX, insn.next_ip());
        self.a.load(T0, msr(offset_of!(Msrs, fmask)));
        self.a.rr(false, &[0xF7], 2, T0); // not T0d
        self.a.rr(false, &[0x21], T0, T1); // and T1d, T0d
        self.take_flags();
        self.a.load32(T0, msr(offset_of!(Msrs, star) + 4));
        self.a.lea32(T1, Mem::new(Some(T0), None, 8));
        self.a.rr(false, &[0x83], 4, T0); // and T0d, ~3
        self.a.raw(&[0xFC]);
        self.load_flat(seg::CS, T0, CODE64);
        self.load_flat(seg::SS, T1, DATA);
        self.level_is(0);
        self.a.load(T0, msr(offset_of!(Msrs, lstar)));
        self.transfer_to_class(insn, 0, class_of(mode));
        false
    }

    /// SYSRET to 64-bit code.
    pub(super) fn sysret(&mut self, insn: &Instruction) -> bool {
        let mode = self.mode & !(MODE_LEVEL_0 | MODE_LIFTED | MODE_UNGROUPED) | MODE_USER;
        self.keep_flags();
        self.require_levels(insn, mode);
        if mode & MODE_TSC != 0 {
            self.test32(state(offset_of!(Core, cr4)), cr4::TSD);
            self.leave_if(insn, cc::NE);
        }
        self.test_r11(rflags::TF | rflags::AC);
        self.leave_if(insn, cc::NE);
        self.a.mov(T1, RCX);
        self.require_canonical(insn);
        self.test_r11(rflags::IF);
        let stays_clear = self.a.jcc_later(cc::E);
        self.test32(flags_register(), rflags::IF);
        let is_set = self.a.jcc_later(cc::NE);
        self.test32(state(table(offset_of!(Tables, is_open))), 1);
        self.leave_if(insn, cc::E);
        let here = self.a.here();
        self.a.patch(stays_clear, here);
        self.a.patch(is_set, here);

        self.a.mov32(T1, R11);
        self.a.rr(false, &[0x81], 4, T1); // and T1d, imm32
        self.a.raw(&(FLAGS_OF_SYSRET as u32).to_le_bytes());
        self.take_flags();
        self.a.load16(T0, msr(offset_of!(Msrs, star) + 6));
        self.a.lea32(T1, Mem::new(Some(T0), None, 8));
        self.a.rr(false, &[0x83], 1, T1); // or T1d, 3
        self.a.raw(&[3]);
        self.load_flat(seg::SS, T1, DATA | 3 << 5);
        self.a.lea32(T0, Mem::new(Some(T0), None, 16));
        self.a.rr(false, &[0x83], 1, T0); // or T0d, 3
        self.a.raw(&[3]);
        self.load_flat(seg::CS, T0, CODE64 | 3 << 5);
        self.level_is(3);
        self.a.mov(T0, RCX);
        self.transfer_to_class(insn, 0, class_of(mode));
        false
    }

    /// Interpret the instruction unless both are enabled, nobody counts by level, and the table for
    /// code of `mode` is for that mode now.
    fn require_levels(&mut self, insn: &Instruction, mode: u32) {
        self.test32(state(offset_of!(Core, efer)), efer::SCE);
        self.leave_if(insn, cc::E);
        self.a.rm(&[], false, &[0x80], 7, state(offset_of!(Core, pmu.counts))); // cmp byte m, 0
        self.a.raw(&[0]);
        self.leave_if(insn, cc::NE);
        let is_for = state(table(offset_of!(Tables, jump_modes)) + 4 * class_of(mode));
        if mode & MODE_USER == 0 {
            self.a.cmp_mem32_imm(is_for, mode);
            self.leave_if(insn, cc::NE);
            return;
        }
        self.a.load32(T1, is_for);
        self.a.rr(false, &[0x81], 4, T1); // and T1d, imm32
        self.a.raw(&(!MODE_WINDOWS).to_le_bytes());
        self.a.cmp32_imm(T1, mode);
        self.leave_if(insn, cc::NE);
        self.test32(is_for, MODE_WINDOW.into());
        let has_none = self.a.jcc_later(cc::E);
        self.stack_number();
        self.leave_if(insn, cc::NE);
        let here = self.a.here();
        self.a.patch(has_none, here);
    }

    fn test_r11(&mut self, bits: u64) {
        self.a.rr(false, &[0xF7], 0, R11); // test r11d, imm32
        self.a.raw(&(bits as u32).to_le_bytes());
    }

    /// RFLAGS become T1's, but for what is always set.  T0 and T1 are lost.
    fn take_flags(&mut self) {
        self.a.rr(false, &[0x83], 1, T1); // or T1d, 2
        self.a.raw(&[rflags::FIXED1 as u8]);
        self.a.store(flags_register(), T1);
        self.a.mov32(T0, T1);
        self.a.rr(false, &[0x81], 4, T0); // and T0d, SF | ZF | AF | PF | CF
        self.a.raw(&0xD5_u32.to_le_bytes());
        self.a.shift(4, 4, T0, 8);
        self.a.shift(5, 4, T1, 11);
        self.a.rr(false, &[0x83], 4, T1); // and T1d, 1: OF
        self.a.raw(&[1]);
        self.a.rr(false, &[0x09], T0, T1); // or T1d, T0d
        self.saved_is(T1);
        self.flags = Flags::at_head();
        self.t0_group = None;
    }

    /// A segment register becomes a flat one with the selector in a temporary.
    fn load_flat(&mut self, index: usize, selector: u8, attr: u32) {
        self.a.store_imm(segment(index, offset_of!(Segment, base)), 0);
        self.a.store32_imm(segment(index, offset_of!(Segment, limit)), u32::MAX);
        self.a.store32_imm(segment(index, offset_of!(Segment, attr)), attr);
        self.a.store16(segment(index, offset_of!(Segment, selector)), selector);
    }

    fn level_is(&mut self, cpl: u8) {
        self.a.rm(&[], false, &[0xC6], 0, state(offset_of!(Core, cpl))); // mov byte m, imm8
        self.a.raw(&[cpl]);
    }
}
