//! The last x87 instruction ([`crate::cpu::pointers`]) of generated code.
//!
//! Which it is at a place of a block is known when the block is translated: a [`Report`], whose
//! number each [`super::block::Site`] has.  So an x87 instruction emits nothing for it; a block
//! stores a number on its way out, and the offset of the last memory operand there, or before a
//! register changes that it is made of.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, Register};

use super::Dbt;
use super::asm::{Mem, RAX, T1, state};
use super::glue::{slot, table};
use super::groups::adjustment;
use super::kinds::has_memory;
use super::map::{host_of, number};
use super::tables::Tables;
use super::translate::Translator;
use crate::cpu::operand::segment_of;
use crate::cpu::pointers::{Last, Pointers, are_noted_for};
use crate::cpu::state::Core;

/// What there is to say at a place of a block.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// The last instruction.
    last: Last,
    /// The last one's memory operand that had one: its segment and offset.
    memory: Option<(u8, Offset)>,
}

/// The offset of a memory operand.
#[derive(Clone, Copy, Debug)]
enum Offset {
    /// In [`Tables::x87_data`].
    Stored,
    /// It is this.
    Constant(u64),
    /// The sum of registers, as they are now.
    Sum(Sum),
}

/// What an offset is made of.
#[derive(Clone, Copy, Debug)]
struct Sum {
    base: Option<u8>,
    /// With the logarithm of its scale.
    index: Option<(u8, u8)>,
    disp: i32,
    is_short: bool,
}

impl Sum {
    fn registers(self) -> impl Iterator<Item = u8> {
        self.base.into_iter().chain(self.index.map(|(i, _)| i))
    }

    /// The same sum once a register has grown by a constant.
    fn after(self, register: u8, by: i64) -> Option<Self> {
        let base = if self.base == Some(register) { by } else { 0 };
        let index = self
            .index
            .filter(|i| i.0 == register)
            .map_or(Some(0), |(_, scale)| by.checked_mul(1 << scale))?;
        let disp = i64::from(self.disp).checked_sub(base)?.checked_sub(index)?;
        Some(Self { disp: i32::try_from(disp).ok()?, ..self })
    }
}

impl Offset {
    fn of(insn: &Instruction, is_32: bool) -> Self {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let is_short = is_32 || super::kinds::is_short(insn);
        let disp = insn.memory_displacement64();
        let is_absolute = base == Register::None && index == Register::None;
        if is_absolute || matches!(base, Register::RIP | Register::EIP) {
            return Self::Constant(if is_32 { disp & 0xFFFF_FFFF } else { disp });
        }
        let of = |r: Register| (r != Register::None).then(|| number(r) as u8);
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let index = of(index).map(|i| (i, scale));
        Self::Sum(Sum { base: of(base), index, disp: disp as i32, is_short })
    }

    fn value(self, core: &Core) -> u64 {
        match self {
            Self::Stored => core.jit.x87_data,
            Self::Constant(v) => v,
            Self::Sum(Sum { base, index, disp, is_short }) => {
                let get = |r: u8| core.gpr[usize::from(r)];
                let index = index.map_or(0, |(i, scale)| get(i) << scale);
                let sum = base.map_or(0, get).wrapping_add(index).wrapping_add_signed(disp.into());
                if is_short { sum & 0xFFFF_FFFF } else { sum }
            }
        }
    }
}

fn data_place() -> Mem {
    state(table(offset_of!(Tables, x87_data)))
}

/// Half of [`Tables::x87`].
fn number_place(half: usize) -> Mem {
    state(table(offset_of!(Tables, x87)) + 4 * half)
}

impl Translator<'_> {
    fn report(&self) -> Option<Report> {
        self.tools.x87.get(self.x87.wrapping_sub(1)).copied()
    }

    fn set_report(&mut self, report: Report) {
        self.x87 = self.tools.x87.push(report) + 1;
    }

    /// An x87 instruction was just emitted.
    pub(super) fn note_x87(&mut self, insn: &Instruction) {
        if insn.mnemonic() == Mnemonic::Fninit {
            self.x87 = 0;
            self.a.store_imm(number_place(0), 0);
            for at in (0..size_of::<Pointers>()).step_by(8) {
                self.a.store_imm(state(offset_of!(Core, pointers) + at), 0);
            }
        } else if are_noted_for(insn) {
            let last = Last::of(insn);
            let memory = if last.has_memory {
                Some((segment_of(insn) as u8, Offset::of(insn, self.is_32)))
            } else {
                self.report().and_then(|r| r.memory)
            };
            self.set_report(Report { last, memory });
        }
    }

    /// Before an instruction: keep the offset of an operand whose registers it changes.  T1 is lost.
    pub(super) fn keep_x87_data(&mut self, insn: &Instruction) {
        let Some(Report { last, memory: Some((segment, Offset::Sum(sum))) }) = self.report() else { return };
        let written = super::kinds::written(&mut self.tools.info, insn);
        if !sum.registers().any(|r| written[usize::from(r)]) {
            return;
        }
        // (One that cannot be left before it is done.)
        let is_plain = !has_memory(insn) && !insn.is_stack_instruction();
        let step = if is_plain { adjustment(insn, self.word().into()) } else { None };
        match step.and_then(|(register, by)| sum.after(register as u8, by)) {
            Some(sum) => self.set_report(Report { last, memory: Some((segment, Offset::Sum(sum))) }),
            None => self.store_x87_data(),
        }
    }

    /// Store the offset of the last memory operand, if it is to be stored.  T1 is lost, nothing else.
    fn store_x87_data(&mut self) {
        let Some(Report { last, memory: Some((segment, Offset::Sum(sum))) }) = self.report() else { return };
        let home = |r: u8| state(slot(r.into()));
        let host = |r: u8| host_of(r.into());
        let index = sum.index.map(|(i, scale)| (host(i).unwrap_or(T1), scale));
        let mut m = Mem::new(sum.base.map(|b| host(b).unwrap_or(T1)), index, sum.disp);
        let mut homeless = sum.registers().filter(|&r| host(r).is_none());
        let (one, other) = (homeless.next(), homeless.next());
        if let Some(r) = other {
            self.a.load(T1, home(r));
            self.a.store(data_place(), RAX);
            m.base = Some(RAX);
        }
        if let Some(r) = one {
            self.a.load(if other.is_some() { RAX } else { T1 }, home(r));
        }
        if sum.is_short {
            self.a.lea32(T1, m);
        } else {
            self.a.lea(T1, m);
        }
        if other.is_some() {
            self.a.load(RAX, data_place());
        }
        self.a.store(data_place(), T1);
        self.set_report(Report { last, memory: Some((segment, Offset::Stored)) });
    }

    /// Before the block is left: store what there is to say (flags untouched).  T1 is lost.
    pub(super) fn record_x87(&mut self) {
        self.store_x87_data();
        match self.report() {
            Some(Report { memory: Some(_), .. }) => self.a.store_imm(number_place(0), self.x87.into()),
            Some(_) => self.a.store32_imm(number_place(1), self.x87),
            None => {}
        }
        self.x87 = 0;
    }
}

impl Dbt {
    /// Take over which x87 instruction generated code executed last: `number` is that of the report of the
    /// place where it was left.
    pub(super) fn tell_x87(&mut self, core: &mut Core, number: u32, is_pending: impl Fn(&Core) -> bool) {
        let stored = std::mem::take(&mut core.jit.x87);
        let numbers = [stored as u32, (stored >> 32) as u32, number];
        let Some(last) = numbers.iter().rposition(|&n| n != 0) else { return };
        let is_pending = is_pending(core);
        for (i, n) in numbers.into_iter().enumerate().filter(|&(_, n)| n != 0) {
            let Report { last: insn, memory } = self.tools.x87[n - 1];
            let data = memory.map(|(segment, offset)| (segment, offset.value(core)));
            core.note_x87(insn, data, i == last && is_pending);
        }
    }
}
