//! Lowering of RDTSC and RDTSCP: on the virtual clock, where time is the number of instructions, and
//! on the computer's, which a helper asks for.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic};

use super::asm::{Mem, RAX, RCX, RDX, T1, state};
use super::mode::{MODE_TSC, MODE_TSC_OFFSET, MODE_WALL};
use super::system::msr;
use super::translate::Translator;
use crate::cpu::countdown::BESIDE;
use crate::cpu::state::{Core, Msrs};
use crate::vmx::Vmx;
use crate::vmx::controls::Controls;

impl Translator<'_> {
    /// Lower an instruction of this group; false, having emitted nothing, if it has to be
    /// interpreted.
    pub(super) fn time_stamp(&mut self, insn: &Instruction) -> bool {
        let is_p = insn.mnemonic() == Mnemonic::Rdtscp;
        if self.mode & MODE_TSC == 0 || !(is_p || insn.mnemonic() == Mnemonic::Rdtsc) {
            return false;
        }
        self.registers_before(insn);
        self.keep_flags();
        if self.mode & MODE_WALL != 0 {
            self.t0_group = None;
            self.a.call(self.tools.glue.time);
        } else {
            // Retired so far: the horizon less the countdown, which the block has reduced by its length.
            let remaining = i32::from(self.site(insn).remaining);
            self.a.load(T1, state(offset_of!(Core, countdown)));
            self.a.shift(4, 8, T1, BESIDE as u8); // shl
            self.a.shift(7, 8, T1, BESIDE as u8); // sar
            self.a.neg(8, T1);
            self.a.add_mem(T1, state(offset_of!(Core, horizon)));
            self.a.lea(T1, Mem::new(Some(T1), None, -remaining));
        }
        self.a.add_mem(T1, state(offset_of!(Core, tsc_skew)));
        self.a.add_mem(T1, msr(offset_of!(Msrs, tsc_adjust)));
        if self.mode & MODE_TSC_OFFSET != 0 {
            let controls = offset_of!(Core, vmx) + offset_of!(Vmx, controls);
            self.a.add_mem(T1, state(controls + offset_of!(Controls, tsc_offset)));
        }
        self.a.mov32(RAX, T1);
        self.a.mov(RDX, T1);
        self.a.rr(true, &[0xC1], 5, RDX); // shr rdx, 32
        self.a.raw(&[32]);
        if is_p {
            self.a.load32(RCX, msr(offset_of!(Msrs, tsc_aux)));
        }
        true
    }
}
