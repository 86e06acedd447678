//! Flags that can be made again.
//!
//! Nobody looks at most flags, but they must be exact wherever a guest stops.  So generated code
//! does not save them: while the operands or the result of the instruction that set them are
//! still there, the translator only remembers how to make them again, a [`Recipe`].  When an
//! operand is about to be lost, or a block ends, the recipe goes into the *record* in memory
//! ([`crate::cpu::state::Core::record`]), which costs a store or three and no arithmetic; flags without a recipe are
//! put there as they are.  Between blocks the flags are always in the record (between rounds of a loop that
//! is one block they need not be: [`super::rounds`]).

use super::undefined::Open;
use crate::arch::bits::rflags;
use crate::cpu::flags::{add, logic, mask, sub};
use crate::cpu::shift::shifted;
use crate::cpu::state::Core;

/// How flags are made from `a` and `b`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// They were saved.
    Saved,
    /// Those of a - b.
    Sub,
    /// Those of a & b.
    And,
    /// Those of a logical operation with the result a.
    Logic,
    /// Those of an addition of b with the result a.
    Added,
    /// Those of a subtraction of b with the result a.
    Subtracted,
    /// Those of a negation with the result a.
    Negated,
    /// Those of a << b.
    Left,
    /// Those of a >> b.
    Right,
    /// Those of a >> b with the sign.
    RightSigned,
}

const KINDS: [Kind; 10] = [
    Kind::Saved,
    Kind::Sub,
    Kind::And,
    Kind::Logic,
    Kind::Added,
    Kind::Subtracted,
    Kind::Negated,
    Kind::Left,
    Kind::Right,
    Kind::RightSigned,
];

/// Where an operand of a recipe is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    /// In a guest register (its number).
    Register(u8),
    /// It is this.
    Immediate(i32),
    /// In the record already.
    Recorded,
    /// There is none.
    None,
}

/// How to make flags again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    /// From what.
    pub kind: Kind,
    /// Bytes of the operands.
    pub size: u8,
    /// See [`Kind`].
    pub a: Operand,
    /// See [`Kind`].
    pub b: Operand,
}

/// In the record's `how`: b is the upper half of it.
pub const B_INSIDE: u32 = 1 << 8;

impl Recipe {
    /// Whether an operand is in guest register `n`.
    #[must_use]
    pub fn uses(&self, n: usize) -> bool {
        [self.a, self.b].contains(&Operand::Register(n as u8))
    }

    /// The same, once it was written to the record.
    #[must_use]
    pub fn recorded(self) -> Self {
        let moved = |o| if matches!(o, Operand::Register(_)) { Operand::Recorded } else { o };
        Self { a: moved(self.a), b: moved(self.b), ..self }
    }

    /// What goes into the record's `how`, and whether that has b inside.
    #[must_use]
    pub fn how(&self) -> (u32, bool) {
        let how = self.kind as u32 | u32::from(self.size) << 4;
        match self.b {
            Operand::Immediate(v) if i16::try_from(v).is_ok() => (how | B_INSIDE | (v as u32) << 16, true),
            Operand::None => (how, true),
            _ => (how, false),
        }
    }

    /// What a record's `how` tells; `None` if the flags were saved.
    #[must_use]
    pub fn of(how: u32) -> Option<Self> {
        let kind = KINDS[(how & 15) as usize % KINDS.len()];
        let inside = Operand::Immediate(how.cast_signed() >> 16);
        let b = if how & B_INSIDE != 0 { inside } else { Operand::Recorded };
        let size = (how >> 4 & 15) as u8;
        (kind != Kind::Saved).then_some(Self { kind, size, a: Operand::Recorded, b })
    }

    /// The flags, made from the registers and the record.
    #[must_use]
    pub fn flags(&self, core: &Core) -> u64 {
        let value = |o: Operand, recorded: u64| match o {
            Operand::Register(n) => core.gpr[usize::from(n)],
            Operand::Immediate(v) => i64::from(v).cast_unsigned(),
            Operand::Recorded => recorded,
            Operand::None => 0,
        };
        let (a, b) = (value(self.a, core.record.a), value(self.b, core.record.b));
        evaluate(self.kind, self.size.into(), a, b)
    }
}

fn evaluate(kind: Kind, size: usize, a: u64, b: u64) -> u64 {
    let low = a & mask(size);
    let count = b as u32;
    match kind {
        Kind::Saved => a,
        Kind::Sub => sub(size, a, b, 0).1,
        Kind::And => logic(size, a & b).1,
        Kind::Logic => logic(size, a).1,
        Kind::Added => add(size, a.wrapping_sub(b), b, 0).1,
        Kind::Subtracted => sub(size, a.wrapping_add(b), b, 0).1,
        Kind::Negated => sub(size, 0, a.wrapping_neg(), 0).1,
        Kind::Left => shifted(Open::Shl, size, low, 0, count, 0).1,
        Kind::Right => shifted(Open::Shr, size, low, 0, count, 0).1,
        Kind::RightSigned => shifted(Open::Sar, size, low, 0, count, 0).1,
    }
}

/// The record between blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// [`Recipe::how`].
    pub how: u32,
    /// Saved flags as LAHF and SETO leave them.
    pub saved: u32,
    /// First operand.
    pub a: u64,
    /// Second operand.
    pub b: u64,
}

/// RFLAGS bits as LAHF and SETO leave AX.
fn to_ax(f: u64) -> u64 {
    (f & 0xD5) << 8 | u64::from(f & rflags::OF != 0)
}

/// The reverse of [`to_ax`].
fn from_ax(v: u64) -> u64 {
    let of = if v & 1 != 0 { rflags::OF } else { 0 };
    (v >> 8 & 0xD5) | of
}

impl Core {
    /// Put the arithmetic flags where generated code takes them from: its record, and the form
    /// that it loads.
    pub fn flags_to_jit(&mut self) {
        let ax = to_ax(self.rflags);
        self.jit.flags = ax;
        (self.record.how, self.record.saved) = (Kind::Saved as u32, ax as u32);
    }

    /// Take the arithmetic flags that generated code had in the computer's.
    pub fn flags_from_live(&mut self) {
        self.set_arith(from_ax(self.jit.flags));
    }

    /// Take the arithmetic flags from the record.
    pub fn flags_from_record(&mut self) {
        let record = self.record;
        let flags = match Recipe::of(record.how) {
            Some(recipe) => recipe.flags(self),
            None => from_ax(record.saved.into()),
        };
        self.set_arith(flags);
    }
}
