//! Lowering of what kernels do all the time: the short ones of the instructions that touch
//! segment registers, RFLAGS beyond the arithmetic flags, and bits far from their operand.
//!
//! Each does what its function in `cpu/` does, for the cases that can be told here; for all others
//! (privilege, exceptions, an interrupt that waits) the instruction is interpreted.
//!
//! STI: the instruction behind it runs with the interrupt shadow in `Core::shadow`, where whatever
//! interrupts it finds it, and the shadow ends with it ([`Translator::end_shadow`]).

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Mem, T0, T1, at, cc, state};
use super::glue::{slot, table};
use super::kinds::{has_base, is_short};
use super::map::{host_of, number};
use super::mode::is_level_0;
use super::tables::Tables;
use super::translate::{Cold, Translator};
use crate::arch::bits::{cr4, rflags};
use crate::arch::segment::{Segment, seg};
use crate::cpu::state::{Core, Msrs, Shadow};

pub(super) fn segment(index: usize, field: usize) -> Mem {
    state(offset_of!(Core, seg) + index * size_of::<Segment>() + field)
}

fn base_of(index: usize) -> Mem {
    segment(index, offset_of!(Segment, base))
}

/// Where the selector of a segment register is.
pub(super) fn selector_of(r: Register) -> Mem {
    segment(r.number(), offset_of!(Segment, selector))
}

/// Where an MSR is: its field's offset among them.
pub(super) fn msr(field: usize) -> Mem {
    state(offset_of!(Core, msr) + field)
}

pub(super) fn flags_register() -> Mem {
    state(offset_of!(Core, rflags))
}

impl Translator<'_> {
    /// Lower an instruction of this group; false, having emitted nothing, if it has to be
    /// interpreted.
    pub(super) fn system(&mut self, insn: &Instruction) -> bool {
        use Mnemonic as M;
        let is_level_0 = is_level_0(self.mode);
        self.registers_before(insn);
        match insn.mnemonic() {
            M::Swapgs if is_level_0 => self.swap_gs(),
            M::Cli if is_level_0 => self.change_flags(4, !rflags::IF),
            M::Cld => self.change_flags(4, !rflags::DF),
            M::Std => self.change_flags(1, rflags::DF),
            M::Sti if is_level_0 && self.index + 1 < self.plan.len() => self.sti(insn),
            M::Pushfq => self.push_flags(insn),
            M::Pushfd if self.is_32 => self.push_flags(insn),
            M::Rdfsbase => self.read_base(insn, seg::FS),
            M::Rdgsbase => self.read_base(insn, seg::GS),
            M::Wrfsbase => self.write_base(insn, seg::FS),
            M::Wrgsbase => self.write_base(insn, seg::GS),
            M::Rdpkru => self.read_keys(insn),
            M::Mov if insn.op1_kind() == OpKind::Register && insn.op1_register().is_segment_register() => {
                return self.store_selector(insn);
            }
            M::Bt | M::Bts | M::Btr | M::Btc if super::kinds::is_far_bit(insn) => return self.far_bit(insn),
            _ => return false,
        }
        true
    }

    fn swap_gs(&mut self) {
        let kernel = msr(offset_of!(Msrs, kernel_gs_base));
        self.t0_group = None;
        self.a.load(T0, base_of(seg::GS));
        self.a.load(T1, kernel);
        self.a.store(base_of(seg::GS), T1);
        self.a.store(kernel, T0);
    }

    /// AND (4) or OR (1) bits that are not arithmetic flags into RFLAGS.
    fn change_flags(&mut self, operation: u8, bits: u64) {
        self.keep_flags();
        self.a.rm(&[], true, &[0x81], operation, flags_register());
        self.a.raw(&(bits as u32).to_le_bytes());
    }

    /// `test dword m, imm`.
    pub(super) fn test32(&mut self, m: Mem, bits: u64) {
        self.a.rm(&[], false, &[0xF7], 0, m); // test dword m, imm32
        self.a.raw(&(bits as u32).to_le_bytes());
    }

    fn shadow_is(&mut self, shadow: Shadow) {
        self.a.rm(&[], false, &[0xC6], 0, state(offset_of!(Core, shadow))); // mov byte m, imm8
        self.a.raw(&[shadow as u8]);
    }

    fn sti(&mut self, insn: &Instruction) {
        self.end_shadow();
        self.keep_flags();
        self.test32(flags_register(), rflags::IF);
        let is_set = self.a.jcc_later(cc::NE);
        self.test32(state(table(offset_of!(Tables, is_open))), 1);
        self.leave_if(insn, cc::E);
        self.change_flags(1, rflags::IF);
        self.shadow_is(Shadow::Sti);
        let here = self.a.here();
        self.a.patch(is_set, here);
        self.shadow_from = Some(self.index);
    }

    /// The instruction that is being lowered can raise nothing more: if it stands behind STI, the
    /// shadow ends (flags untouched).  Returns whether it did.
    pub(super) fn end_shadow(&mut self) -> bool {
        let ends = self.shadow_from.is_some_and(|i| i < self.index);
        if ends {
            self.shadow_is(Shadow::None);
            self.shadow_from = None;
        }
        ends
    }

    fn push_flags(&mut self, insn: &Instruction) {
        let value = state(table(offset_of!(Tables, value)));
        self.whole_flags();
        self.a.rm(&[], false, &[0x89], T1, value); // mov dword m, T1d
        let place = self.stack_place(insn);
        self.a.rm(&[], false, &[0x8B], T1, value); // mov T1d, dword m
        self.store_word(place, T1);
        self.move_stack(-self.word());
        self.close_sites();
    }

    /// T1 = RFLAGS as programs see them: without VM and RF.
    pub(super) fn whole_flags(&mut self) {
        let value = state(table(offset_of!(Tables, value)));
        self.keep_flags();
        self.make_live();
        self.a.raw(&[0x9C]); // pushfq
        self.a.rm(&[], false, &[0x8F], 0, value); // pop qword m
        self.keep_flags();
        self.a.load(T1, flags_register());
        self.a.rr(false, &[0x81], 4, T1); // and T1d, imm32
        self.a.raw(&(!(rflags::VM | rflags::RF | rflags::ARITH) as u32).to_le_bytes());
        self.a.rm(&[], false, &[0x81], 4, value); // and dword m, imm32
        self.a.raw(&(rflags::ARITH as u32).to_le_bytes());
        self.a.rm(&[], false, &[0x0B], T1, value); // or T1d, dword m
    }

    /// Interpret the instruction unless CR4.FSGSBASE is set.
    fn require_fsgsbase(&mut self, insn: &Instruction) {
        self.keep_flags();
        self.test32(state(offset_of!(Core, cr4)), cr4::FSGSBASE);
        self.leave_if(insn, cc::E);
    }

    /// Interpret the instruction on this condition, and look up where it leads.
    pub(super) fn leave_if(&mut self, insn: &Instruction, condition: u8) {
        let branch = self.a.jcc_later(condition);
        self.cold.push(Cold::Step { branch, site: self.site(insn) });
    }

    fn read_base(&mut self, insn: &Instruction, index: usize) {
        self.require_fsgsbase(insn);
        let r = insn.op0_register();
        let host = host_of(number(r)).unwrap_or(T1);
        self.a.rm(&[], r.size() == 8, &[0x8B], host, base_of(index));
        if host == T1 {
            self.a.store(state(slot(number(r))), T1);
        }
    }

    fn write_base(&mut self, insn: &Instruction, index: usize) {
        self.require_fsgsbase(insn);
        let r = insn.op0_register();
        let is_wide = r.size() == 8;
        self.t0_group = None;
        match host_of(number(r)) {
            Some(h) => self.a.rr(is_wide, &[0x89], h, T0),
            None => self.a.rm(&[], is_wide, &[0x8B], T0, state(slot(number(r)))),
        }
        if is_wide {
            self.a.mov(T1, T0);
            self.require_canonical(insn);
        }
        self.a.store(base_of(index), T0);
    }

    fn read_keys(&mut self, insn: &Instruction) {
        self.keep_flags();
        self.test32(state(offset_of!(Core, cr4)), cr4::PKE);
        self.leave_if(insn, cc::E);
        self.a.rr(false, &[0x85], 1, 1); // test ecx, ecx
        self.leave_if(insn, cc::NE);
        self.a.rm(&[], false, &[0x8B], 0, state(offset_of!(Core, pkru))); // mov eax, m
        self.a.imm(2, 0);
    }

    fn store_selector(&mut self, insn: &Instruction) -> bool {
        let source = selector_of(insn.op1_register());
        if insn.op0_kind() == OpKind::Memory {
            let place = self.place(insn, 2, true, |t, by| t.address(insn, by));
            self.a.load16(T1, source);
            self.a.store16(place, T1);
            self.close_sites();
            return true;
        }
        let r = insn.op0_register();
        match host_of(number(r)) {
            Some(h) if r.size() == 2 => self.a.rm(&[0x66], false, &[0x8B], h, source),
            Some(h) => self.a.load16(h, source),
            None => {
                self.a.load16(T1, source);
                let m = state(slot(number(r)));
                if r.size() == 2 { self.a.store16(m, T1) } else { self.a.store(m, T1) }
            }
        }
        true
    }

    /// BT and its kin with an offset that reaches beyond the operand.
    fn far_bit(&mut self, insn: &Instruction) -> bool {
        let size = insn.memory_size().size();
        let r = insn.op1_register();
        if !matches!(size, 4 | 8)
            || r.size() != size
            || if self.is_32 { has_base(insn) } else { is_short(insn) }
        {
            return false;
        }
        let is_wide = size == 8;
        let write = insn.mnemonic() != Mnemonic::Bt;
        let opcode = match insn.mnemonic() {
            Mnemonic::Bt => 0xA3,
            Mnemonic::Bts => 0xAB,
            Mnemonic::Btr => 0xB3,
            _ => 0xBB,
        };
        self.keep_flags();
        self.address(insn, 0);
        self.offset(r, is_wide);
        self.a.rr(true, &[0xC1], 7, T1); // sar T1, 5 or 6
        self.a.raw(&[if is_wide { 6 } else { 5 }]);
        let scale = if is_wide { 3 } else { 2 };
        self.lea_address(T0, Mem::new(Some(T0), Some((T1, scale)), 0));
        self.check(insn, size, write, None);
        self.t0_group = None;
        let pinned = host_of(number(r));
        if write && (insn.has_lock_prefix() || pinned.is_none()) {
            let value = state(table(offset_of!(Tables, value)));
            self.offset(r, is_wide);
            self.a.rr(false, &[0x83], 4, T1); // and T1d, 31 or 63
            self.a.raw(&[8 * size as u8 - 1]);
            self.a.store(value, T1);
            self.flags_before(insn);
            self.a.load(T1, value);
            let lock: &[u8] = if insn.has_lock_prefix() { &[0xF0] } else { &[] };
            self.a.rm(lock, is_wide, &[0x0F, opcode], T1, at(T0));
        } else if write {
            self.flags_before(insn);
            self.a.rm(&[], is_wide, &[0x8B], T1, at(T0));
            self.a.rr(is_wide, &[0x0F, opcode], pinned.unwrap_or(T1), T1);
            self.a.rm(&[], is_wide, &[0x89], T1, at(T0));
        } else {
            self.flags_before(insn);
            self.a.rm(&[], is_wide, &[0x8B], T0, at(T0));
            let h = pinned.unwrap_or_else(|| {
                self.a.load(T1, state(slot(number(r))));
                T1
            });
            self.a.rr(is_wide, &[0x0F, opcode], h, T0);
        }
        self.flags_after(insn, None);
        self.close_sites();
        true
    }

    /// T1 = a register's value, sign-extended.
    fn offset(&mut self, r: Register, is_wide: bool) {
        let opcode: &[u8] = if is_wide { &[0x8B] } else { &[0x63] }; // mov, movsxd
        match host_of(number(r)) {
            Some(h) => self.a.rr(true, opcode, T1, h),
            None => self.a.rm(&[], true, opcode, T1, state(slot(number(r)))),
        }
    }
}
