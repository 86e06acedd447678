//! Lowering of the string instructions: LODS, STOS, MOVS, SCAS, CMPS, and REP STOS, REP MOVS.
//!
//! They go upwards, with the code's own address size; the others are interpreted.  A repeated one
//! runs as itself where each of its operands lies in one page that the first level of the TLB
//! grants: nothing can happen between its elements then.  Where one crosses into another page, all
//! of it is interpreted.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::asm::{Mem, RAX, RCX, RDI, RSI, T0, T1, at, cc, state};
use super::glue::table;
use super::system::flags_register;
use super::tables::Tables;
use super::translate::Translator;
use crate::addr::{FRAME_BYTES, PAGE_OFFSET};
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

fn is_repeated(insn: &Instruction) -> bool {
    insn.has_rep_prefix() || insn.has_repne_prefix()
}

fn kind(insn: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    if !insn.is_string_instruction() {
        return None;
    }
    let kind = match insn.mnemonic() {
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Kind::Load,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::Store,
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => Kind::Move,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => Kind::Scan,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Kind::Compare,
        _ => return None,
    };
    (!is_repeated(insn) || matches!(kind, Kind::Store | Kind::Move)).then_some(kind)
}

/// Whether the instruction is one of those (unless it has an unusual segment or address size).
pub(super) fn is_lowered(insn: &Instruction) -> bool {
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
        self.step_if(insn, cc::NE);
        if is_repeated(insn) {
            self.repeat(insn, kind == Kind::Move, size);
            self.close_sites();
            return true;
        }
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

    /// Interpret the instruction if a condition holds, and go on behind it.
    fn step_if(&mut self, insn: &Instruction, cc: u8) {
        self.leave_if(insn, cc);
        self.open_sites += 1;
    }

    /// REP STOS or REP MOVS with elements of `size` bytes.
    fn repeat(&mut self, insn: &Instruction, is_move: bool, size: usize) {
        let value = state(table(offset_of!(Tables, value)));
        let wide = !self.is_32;
        self.a.rr(wide, &[0x85], RCX, RCX); // test
        let nothing = self.a.jcc_later(cc::E);
        self.a.rr(wide, &[0x81], 7, RCX); // cmp: so that no sum below overflows
        self.a.raw(&(FRAME_BYTES as u32 / size as u32).to_le_bytes());
        self.step_if(insn, cc::A);
        if is_move {
            self.point_to_all(insn, RSI, size, false);
            self.a.store(value, T0);
        }
        self.point_to_all(insn, RDI, size, true);
        if self.is_32 {
            self.a.mov32(RCX, RCX);
        }
        // Host pointers into RDI and RSI; what they differ by from the guest's into T0 and T1.
        self.exchange(RDI, T0);
        if is_move {
            self.a.load(T1, value);
            self.exchange(RSI, T1);
        }
        let prefix: &[u8] = if size == 2 { &[0xF3, 0x66] } else { &[0xF3] };
        self.a.raw(prefix);
        self.a.raw(if size == 8 { &[0x48] } else { &[] });
        let opcode = if is_move { 0xA4 } else { 0xAA };
        self.a.raw(&[opcode + u8::from(size > 1)]);
        self.lea_address(RDI, Mem::new(Some(RDI), Some((T0, 0)), 0));
        if is_move {
            self.lea_address(RSI, Mem::new(Some(RSI), Some((T1, 0)), 0));
        }
        let here = self.a.here();
        self.a.patch(nothing, here);
    }

    /// T0 = the host's pointer to RCX elements at the address in a register.
    fn point_to_all(&mut self, insn: &Instruction, register: u8, size: usize, write: bool) {
        self.point(insn, register, size, write);
        // The host's pages lie like the guest's.
        self.a.mov32(T1, T0);
        self.a.rr(false, &[0x81], 4, T1); // and T1d, imm32
        self.a.raw(&(PAGE_OFFSET as u32).to_le_bytes());
        let scale = size.trailing_zeros() as u8;
        self.a.lea32(T1, Mem::new(Some(T1), Some((RCX, scale)), 0));
        self.a.cmp32_imm(T1, FRAME_BYTES as u32);
        self.step_if(insn, cc::A);
    }

    /// A guest's address becomes the host's in `pointer`, and `pointer` the former minus the latter.
    fn exchange(&mut self, address: u8, pointer: u8) {
        self.a.rr(true, &[0x29], pointer, address); // sub address, pointer
        self.a.rr(true, &[0x87], pointer, address); // xchg
    }

    /// T0 = the host's pointer to `size` bytes at the address in a register.
    fn point(&mut self, insn: &Instruction, register: u8, size: usize, write: bool) {
        self.t0_group = None;
        self.lea_word(T0, register, 0);
        self.check(insn, size, write, None);
    }

    /// An instruction with a register and a memory operand of `size` bytes; `opcode` is that of
    /// the form with bytes, the others' is one more.
    fn sized(&mut self, size: usize, opcode: u8, register: u8, m: Mem) {
        let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
        self.a.rm(prefix, size == 8, &[opcode + u8::from(size > 1)], register, m);
    }
}
