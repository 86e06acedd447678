//! Lowering of the string instructions without a repeat prefix: LODS, STOS, MOVS, SCAS, CMPS.
//!
//! They go upwards, with the code's own address size; the others are interpreted.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Mem, RAX, RDI, RSI, T0, T1, at, cc, state};
use super::glue::table;
use super::system::flags_register;
use super::tables::Tables;
use super::translate::{Cold, Translator};
use crate::arch::bits::rflags;

/// What a string instruction does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Load,
    Store,
    Move,
    Scan,
    Compare,
}

fn kind(insn: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    if !insn.is_string_instruction() || insn.has_rep_prefix() || insn.has_repne_prefix() {
        return None;
    }
    Some(match insn.mnemonic() {
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Kind::Load,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::Store,
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => Kind::Move,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => Kind::Scan,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Kind::Compare,
        _ => return None,
    })
}

/// Whether the instruction is one of those (unless it has an unusual segment or address size).
pub(super) fn is_single(insn: &Instruction) -> bool {
    kind(insn).is_some()
}

/// Whether the source is in a segment that is flat, and the addresses are as wide as the code's.
fn is_plain(insn: &Instruction, is_32: bool) -> bool {
    (0..insn.op_count()).all(|i| match insn.op_kind(i) {
        OpKind::MemorySegESI => is_32 && has_flat_source(insn),
        OpKind::MemorySegRSI => has_flat_source(insn),
        OpKind::MemoryESEDI => is_32,
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemoryESDI => false,
        _ => true,
    })
}

fn has_flat_source(insn: &Instruction) -> bool {
    matches!(insn.segment_prefix(), Register::None | Register::DS | Register::ES | Register::SS)
}

impl Translator<'_> {
    /// Lower an instruction of this group; false, having emitted nothing, if it has to be
    /// interpreted.
    pub(super) fn string(&mut self, insn: &Instruction) -> bool {
        let Some(kind) = kind(insn).filter(|_| is_plain(insn, self.is_32)) else { return false };
        let size = insn.memory_size().size();
        self.registers_before(insn);
        self.keep_flags();
        self.test32(flags_register(), rflags::DF);
        let branch = self.a.jcc_later(cc::NE);
        self.cold.push(Cold::Step { branch, site: self.site(insn) });
        let value = state(table(offset_of!(Tables, value)));
        match kind {
            Kind::Load => {
                self.point(insn, RSI, size, false);
                self.sized(size, 0x8A, RAX, at(T0)); // mov accumulator, [T0]
            }
            Kind::Store => {
                self.point(insn, RDI, size, true);
                self.a.store_sized(size, at(T0), RAX);
            }
            Kind::Move => {
                self.point(insn, RSI, size, false);
                self.sized(size, 0x8A, T1, at(T0));
                self.a.store(value, T1);
                self.point(insn, RDI, size, true);
                self.a.load(T1, value);
                self.a.store_sized(size, at(T0), T1);
            }
            Kind::Scan => {
                self.point(insn, RDI, size, false);
                self.flags_before(insn);
                self.sized(size, 0x3A, RAX, at(T0)); // cmp accumulator, [T0]
            }
            Kind::Compare => {
                self.point(insn, RSI, size, false);
                self.sized(size, 0x8A, T1, at(T0));
                self.a.store(value, T1);
                self.point(insn, RDI, size, false);
                self.flags_before(insn);
                self.a.load(T1, value);
                self.sized(size, 0x3A, T1, at(T0));
            }
        }
        if matches!(kind, Kind::Load | Kind::Move | Kind::Compare) {
            self.lea_word(RSI, RSI, size as i32);
        }
        if kind != Kind::Load {
            self.lea_word(RDI, RDI, size as i32);
        }
        self.flags_after(insn, None);
        self.close_sites();
        true
    }

    /// T0 = the host's pointer to `size` bytes at the address in a register.
    fn point(&mut self, insn: &Instruction, register: u8, size: usize, write: bool) {
        self.t0_group = None;
        self.lea_word(T0, register, 0);
        self.check(insn, size, write, false);
    }

    /// An instruction with a register and a memory operand of `size` bytes; `opcode` is that of
    /// the form with bytes, the others' is one more.
    fn sized(&mut self, size: usize, opcode: u8, register: u8, m: Mem) {
        let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
        self.a.rm(prefix, size == 8, &[opcode + u8::from(size > 1)], register, m);
    }
}
