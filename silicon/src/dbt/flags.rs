//! What instructions do to the arithmetic flags, and where they are kept meanwhile
//! ([`super::record`]).

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::asm::{Asm, Mem, Source, T1, alu, cc, state};
use super::glue::slot;
use super::kinds::{Way, has_memory, way};
use super::map::{host_of, is_high_byte, number};
use super::record::{Kind, Operand, Recipe, Record};
use super::translate::{Cold, Translator};
use crate::cpu::state::Core;

/// What an instruction does to the six arithmetic flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing.
    None,
    /// Sets all six from its operands alone.
    Overwrites,
    /// Reads some, changes none.
    Reads,
    /// Changes some, and leaves others as they were.
    Merges,
    /// Changes some, and the result depends on what they were.
    Changes,
}

const ARITH: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// See [`Effect`].
#[must_use]
pub fn effect(insn: &Instruction) -> Effect {
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        // Processors recompute OF even where the rotation comes full circle.
        return Effect::Changes;
    }
    let modified = insn.rflags_modified() & ARITH;
    let undefined = insn.rflags_undefined() & ARITH;
    let read = insn.rflags_read() & ARITH;
    if modified == 0 {
        return if read != 0 { Effect::Reads } else { Effect::None };
    }
    let is_certain = match insn.mnemonic() {
        Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test => true,
        // A count of zero leaves the flags alone; CL may be zero.
        Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Sal => {
            let mask =
                if insn.op0_register().size() == 8 || insn.memory_size().size() == 8 { 63 } else { 31 };
            insn.op1_kind() != OpKind::Register && insn.immediate(1) & mask != 0
        }
        _ => undefined == 0,
    };
    match read {
        0 if modified == ARITH && is_certain => Effect::Overwrites,
        0 => Effect::Merges,
        _ => Effect::Changes,
    }
}

/// Where the guest's arithmetic flags are at a point of the translation.  Several may hold at
/// once; none does where they are not needed any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flags {
    /// In the computer's flags.
    pub live: bool,
    /// In the record.
    pub recorded: bool,
    /// They can be made like this.
    pub recipe: Option<Recipe>,
}

/// Where the flags are when an instruction is interpreted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Whereabouts {
    /// Generated code stored them as it left.
    #[default]
    Live,
    /// In the record.
    Record,
    /// They have to be made.
    Recipe(Recipe),
}

impl Flags {
    /// In the record alone, as at the head of a block.
    pub fn at_head() -> Self {
        Self { recorded: true, ..Self::default() }
    }

    fn whereabouts(&self) -> Whereabouts {
        match self {
            Self { live: true, .. } => Whereabouts::Live,
            Self { recorded: true, .. } => Whereabouts::Record,
            Self { recipe: Some(r), .. } => Whereabouts::Recipe(*r),
            _ => {
                debug_assert!(false, "flags that were taken for dead are needed");
                Whereabouts::Live
            }
        }
    }
}

/// For each instruction whether the flags that hold behind it are looked at, or have to be kept,
/// before all of them are overwritten.  The last one may have to be interpreted if it `crosses`
/// into another page.
pub(super) fn needs(insns: &[Instruction], crosses: bool) -> Vec<bool> {
    let mut needed = true;
    let mut out = vec![true; insns.len()];
    for (i, insn) in insns.iter().enumerate().rev() {
        needed |= may_lose_stack(insn);
        out[i] = needed;
        needed = match effect(insn) {
            _ if may_leave(insn) || (crosses && i + 1 == insns.len()) => true,
            Effect::Overwrites => false,
            Effect::None | Effect::Merges => needed,
            Effect::Reads | Effect::Changes => true,
        };
    }
    out
}

/// Whether the block may have to be left behind the instruction ([`Translator::follow`]).
fn may_lose_stack(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Leave
        || (0..insn.op_count()).any(|i| insn.op_register(i).full_register() == Register::RSP)
}

/// Whether the translation of the instruction may be left before it is done.
fn may_leave(insn: &Instruction) -> bool {
    let is_memory = has_memory(insn) && insn.mnemonic() != Mnemonic::Lea;
    let is_plain = match way(insn) {
        Way::Nothing => return false,
        Way::Native => !is_memory && !insn.is_stack_instruction(),
        Way::Vector | Way::Avx | Way::Step => false,
    };
    let homeless = |i: u32| {
        insn.op_kind(i) == OpKind::Register
            && insn.op_register(i).is_gpr()
            && host_of(number(insn.op_register(i))).is_none()
    };
    let is_simple = (0..insn.op_count()).filter(|&i| homeless(i)).count() <= 1;
    let is_odd = match insn.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv => true,
        Mnemonic::Lea => insn.op0_register().size() == 2,
        _ => (0..insn.op_count())
            .any(|i| insn.op_kind(i) == OpKind::Register && is_high_byte(insn.op_register(i))),
    };
    !is_plain || !is_simple || is_odd
}

/// A constant operand, if instructions can take it as one.
pub(super) fn immediate(insn: &Instruction, i: u32) -> Option<i32> {
    match insn.op_kind(i) {
        OpKind::Immediate32 => Some(insn.immediate32().cast_signed()),
        _ => i32::try_from(insn.immediate(i).cast_signed()).ok(),
    }
}

fn operand(insn: &Instruction, i: u32) -> Option<Operand> {
    match insn.op_kind(i) {
        OpKind::Register => {
            let r = insn.op_register(i);
            (r.is_gpr() && !is_high_byte(r)).then(|| Operand::Register(number(r) as u8))
        }
        OpKind::Memory => None,
        _ => immediate(insn, i).map(Operand::Immediate),
    }
}

/// How the flags that an instruction leaves can be made again.  For an operand in memory, whose
/// value the lowering puts into the record, `memory` is `Recorded`.
pub(super) fn recipe(insn: &Instruction, memory: Option<Operand>) -> Option<Recipe> {
    use Mnemonic as M;
    if effect(insn) != Effect::Overwrites || insn.op_count() == 0 {
        return None;
    }
    let get = |i: u32| if insn.op_kind(i) == OpKind::Memory { memory } else { operand(insn, i) };
    let size = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    };
    if !matches!(size, 1 | 2 | 4 | 8) {
        return None;
    }
    let of = |kind, a, b| Some(Recipe { kind, size: size as u8, a, b });
    let a = get(0)?;
    let (kind, b) = match insn.mnemonic() {
        M::Cmp => (Kind::Sub, get(1)?),
        M::Test => (Kind::And, get(1)?),
        M::And | M::Or | M::Xor => return of(Kind::Logic, a, Operand::None),
        M::Neg => return of(Kind::Negated, a, Operand::None),
        M::Add => (Kind::Added, get(1)?),
        M::Sub => (Kind::Subtracted, get(1)?),
        _ => return None,
    };
    // x + x and x - x have lost x.
    (a != b || matches!(kind, Kind::Sub | Kind::And)).then_some(())?;
    of(kind, a, b)
}

/// The recipe of a shift by a constant, whose operand goes into the record beforehand.
pub(super) fn shift_recipe(insn: &Instruction) -> Option<Recipe> {
    use Mnemonic as M;
    let kind = match insn.mnemonic() {
        M::Shl | M::Sal => Kind::Left,
        M::Shr => Kind::Right,
        M::Sar => Kind::RightSigned,
        _ => return None,
    };
    let Some(Operand::Register(_)) = operand(insn, 0) else { return None };
    (effect(insn) == Effect::Overwrites).then_some(())?;
    let size = insn.op0_register().size();
    let count = insn.immediate(1) as i32 & if size == 8 { 63 } else { 31 };
    Some(Recipe { kind, size: size as u8, a: Operand::Recorded, b: Operand::Immediate(count) })
}

impl Translator<'_> {
    /// Make it safe to spoil the computer's flags.
    pub fn keep_flags(&mut self) {
        if self.flags.live && !self.flags.recorded && self.flags.recipe.is_none() {
            self.save();
        }
        self.flags.live = false;
    }

    /// Put the computer's flags into the record.  T1 is lost.
    fn save(&mut self) {
        self.a.save_flags(record(offset_of!(Record, saved)));
        self.a.store_imm32(record(offset_of!(Record, how)), Kind::Saved as u32);
        self.flags.recorded = true;
    }

    /// The record has flags that are in `register` as LAHF and SETO leave AX.
    pub fn saved_is(&mut self, register: u8) {
        self.a.store32(record(offset_of!(Record, saved)), register);
        self.a.store_imm32(record(offset_of!(Record, how)), Kind::Saved as u32);
    }

    /// Put the flags into the record (the computer's are untouched).  T1 is lost.
    pub fn record_flags(&mut self) {
        if self.flags.recorded {
            return;
        }
        match self.flags.recipe {
            Some(recipe) => self.write_recipe(recipe),
            None => self.save(),
        }
        self.flags.recorded = true;
    }

    fn write_recipe(&mut self, recipe: Recipe) {
        let (how, is_inside) = recipe.how();
        self.a.store_imm32(record(offset_of!(Record, how)), how);
        self.write_operand(recipe.a, offset_of!(Record, a));
        if !is_inside {
            self.write_operand(recipe.b, offset_of!(Record, b));
        }
    }

    fn write_operand(&mut self, o: Operand, field: usize) {
        match o {
            Operand::Register(n) => {
                let host = host_of(n.into()).unwrap_or_else(|| {
                    self.a.load(T1, state(slot(n.into())));
                    T1
                });
                self.a.store(record(field), host);
            }
            Operand::Immediate(v) => self.a.store_imm(record(field), i64::from(v).cast_unsigned()),
            Operand::Recorded | Operand::None => {}
        }
    }

    /// Bring the guest's flags into the computer's.  T1 is lost.
    pub fn make_live(&mut self) {
        if self.flags.live {
            return;
        }
        match self.flags.recipe {
            Some(recipe) => self.make(recipe),
            None => self.load_record(),
        }
        self.flags.live = true;
    }

    fn load_record(&mut self) {
        debug_assert!(self.flags.recorded);
        // How the flags were recorded when the block was translated is how they mostly are.
        let how = self.how_at_head.unwrap_or(Kind::Saved as u32);
        self.a.cmp_mem32_imm(record(offset_of!(Record, how)), how);
        let branch = self.a.jcc_later(cc::NE);
        match Recipe::of(how) {
            Some(recipe) => self.make(recipe),
            None => self.load_saved(),
        }
        let back = self.a.here();
        self.cold.push(Cold::Flags { branch, back });
    }

    fn load_saved(&mut self) {
        self.a.load_flags(record(offset_of!(Record, saved)));
    }

    fn make(&mut self, recipe: Recipe) {
        let a = self.operand_place(recipe.a, offset_of!(Record, a));
        let b = self.operand_place(recipe.b, offset_of!(Record, b));
        self.a.alu(alu::MOV, 8, T1, a);
        make(&mut self.a, recipe.kind, recipe.size.into(), b);
    }

    fn operand_place(&self, o: Operand, field: usize) -> Source {
        match o {
            Operand::Register(n) => {
                host_of(n.into()).map_or_else(|| Source::Memory(state(slot(n.into()))), Source::Register)
            }
            Operand::Immediate(v) => Source::Immediate(v),
            Operand::Recorded | Operand::None => Source::Memory(record(field)),
        }
    }

    /// Guest register `n` is going to change, the flags are not.  This comes before the
    /// instruction's checks: a part of it that was interpreted would be missed.  T1 is lost.
    pub fn about_to_write(&mut self, n: usize) {
        if !self.flags.recipe.is_some_and(|r| r.uses(n)) {
            return;
        }
        debug_assert!(self.open_sites == 0);
        let is_needed = self.index == 0 || self.needed[self.index - 1];
        if is_needed {
            self.record_flags();
            self.flags.recipe = self.flags.recipe.map(Recipe::recorded);
        } else {
            self.flags.recipe = None;
        }
    }

    /// Before the native form of an instruction and its checks.  T1 is lost.
    pub fn registers_before(&mut self, insn: &Instruction) {
        if self.flags.recipe.is_some() && matches!(effect(insn), Effect::None | Effect::Reads) {
            let written = super::kinds::written(&mut self.tools.info, insn);
            for n in (0..16).filter(|&n| written[n]) {
                self.about_to_write(n);
            }
        }
    }

    /// Behind its checks: flags as it needs them.  T1 is lost.
    pub fn flags_before(&mut self, insn: &Instruction) {
        match effect(insn) {
            Effect::Reads | Effect::Changes => self.make_live(),
            Effect::Merges if self.needed[self.index] => self.make_live(),
            Effect::None | Effect::Merges | Effect::Overwrites => {}
        }
    }

    /// After it: as it left them.
    pub fn flags_after(&mut self, insn: &Instruction, recipe: Option<Recipe>) {
        match effect(insn) {
            Effect::None | Effect::Reads => {}
            Effect::Merges if !self.needed[self.index] => self.flags = Flags::default(),
            _ => self.flags = Flags { live: true, recorded: false, recipe },
        }
    }

    /// Where an interpreted instruction finds the flags.
    pub fn whereabouts(&self) -> Whereabouts {
        self.flags.whereabouts()
    }
}

/// Make flags again: T1 is the first operand.  T1 is lost.
pub(super) fn make(asm: &mut Asm, kind: Kind, size: usize, b: Source) {
    match kind {
        Kind::Sub => asm.alu(alu::CMP, size, T1, b),
        Kind::And => asm.alu(alu::AND, size, T1, b),
        Kind::Logic => asm.alu(alu::AND, size, T1, Source::Register(T1)),
        Kind::Added => {
            asm.alu(alu::SUB, size, T1, b);
            asm.alu(alu::ADD, size, T1, b);
        }
        Kind::Subtracted => {
            asm.alu(alu::ADD, size, T1, b);
            asm.alu(alu::CMP, size, T1, b);
        }
        Kind::Negated => {
            asm.neg(size, T1);
            asm.neg(size, T1);
        }
        Kind::Left | Kind::Right | Kind::RightSigned => {
            let operation = match kind {
                Kind::Left => 4,
                Kind::Right => 5,
                _ => 7,
            };
            let Source::Immediate(count) = b else { unreachable!("shifts are by constants") };
            asm.shift(operation, size, T1, count as u8);
        }
        Kind::Saved => unreachable!("no recipe"),
    }
}

/// A field of the record.
fn record(field: usize) -> Mem {
    state(offset_of!(Core, record) + field)
}
