//! A few host instructions, emitted by hand.
//!
//! Registers are numbers 0..=15 (RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15).  Guest instructions
//! themselves are re-encoded by iced-x86; this is only for the code around them.

use super::moved::{Move, What, is_wide};

/// RAX.
pub const RAX: u8 = 0;
/// RCX.
pub const RCX: u8 = 1;
/// RDX.
pub const RDX: u8 = 2;
/// RSP: points at the processor's state while generated code runs.
pub const RSP: u8 = 4;
/// RBP.
pub const RBP: u8 = 5;
/// RSI.
pub const RSI: u8 = 6;
/// RDI.
pub const RDI: u8 = 7;
/// First temporary: addresses.
pub const T0: u8 = 14;
/// Second temporary.
pub const T1: u8 = 15;

/// A memory operand: base + index * scale + disp.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    /// Base register.
    pub base: Option<u8>,
    /// Index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
    /// It is in the guest's window.
    pub through: Option<Through>,
}

/// How an operand leads into the guest's window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Through {
    /// As an offset of 32 bits in GS.
    Bits32,
    /// As an offset in GS.
    High,
    /// As it is: what is added to it is another.
    Own,
}

impl Mem {
    /// In the computer's own addresses.
    #[must_use]
    pub fn new(base: Option<u8>, index: Option<(u8, u8)>, disp: i32) -> Self {
        Self { base, index, disp, through: None }
    }
}

/// `[rsp + disp]`: the processor's state.
#[must_use]
pub fn state(disp: usize) -> Mem {
    Mem::new(Some(RSP), None, disp as i32)
}

/// `[reg]`.
#[must_use]
pub fn at(reg: u8) -> Mem {
    Mem::new(Some(reg), None, 0)
}

/// Conditions, as encoded in Jcc.
pub mod cc {
    #![allow(missing_docs)]
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const S: u8 = 8;
    pub const E: u8 = 4;
}

/// What two-operand instructions take besides a register.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// A register.
    Register(u8),
    /// Memory.
    Memory(Mem),
    /// A constant.
    Immediate(i32),
}

/// Two-operand instructions, as encoded: the /digit of their immediate form.
pub mod alu {
    #![allow(missing_docs)]
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
    /// Not one of them, but with the same operands.
    pub const MOV: u8 = 17;
}

/// A growing piece of code that will live at a known host address.
#[derive(Default)]
pub struct Asm {
    /// The bytes so far.
    pub bytes: Vec<u8>,
    /// Where the first byte will live.
    pub base: u64,
    /// Where instructions are that access the guest's window, and nobody has noted yet.
    pub accesses: Vec<u64>,
    /// What has to change where the piece is moved.
    pub moves: Vec<Move>,
    /// It cannot be moved.
    pub is_fixed: bool,
}

impl Asm {
    /// An empty piece at `base`.
    #[must_use]
    pub fn new(base: u64) -> Self {
        Self { bytes: Vec::with_capacity(1024), base, ..Self::default() }
    }

    /// The host address of the next byte.
    #[must_use]
    pub fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Raw bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn imm32(&mut self, v: u32) {
        self.raw(&v.to_le_bytes());
    }

    /// An instruction with a register and a memory operand.
    pub fn rm(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: u8, m: Mem) {
        if let Some(through) = m.through {
            self.accesses.push(self.here());
            self.raw(match through {
                Through::Bits32 => &[0x65, 0x67], // GS, 32-bit address
                Through::High => &[0x65],
                Through::Own => &[],
            });
        }
        self.raw(prefix);
        let x = m.index.map_or(0, |(i, _)| i >> 3);
        let b = m.base.map_or(0, |b| b >> 3);
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(opcode);
        let reg = (reg & 7) << 3;
        let small = i8::try_from(m.disp).is_ok();
        let Some(base) = m.base else {
            let (i, s) = m.index.map_or((4, 0), |(i, s)| (i & 7, s));
            self.raw(&[reg | 4, s << 6 | i << 3 | 5]);
            self.imm32(m.disp.cast_unsigned());
            return;
        };
        let mode = if m.disp == 0 && base & 7 != 5 {
            0
        } else if small {
            0x40
        } else {
            0x80
        };
        match m.index {
            Some((i, s)) => self.raw(&[mode | reg | 4, s << 6 | (i & 7) << 3 | (base & 7)]),
            None if base & 7 == 4 => self.raw(&[mode | reg | 4, 0x24]),
            None => self.bytes.push(mode | reg | (base & 7)),
        }
        match mode {
            0x40 => self.bytes.push(m.disp as i8 as u8),
            0x80 => self.imm32(m.disp.cast_unsigned()),
            _ => {}
        }
    }

    /// An instruction with two register operands (ModRM.reg, ModRM.rm).
    pub fn rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(opcode);
        self.bytes.push(0xC0 | (reg & 7) << 3 | (rm & 7));
    }

    /// `mov dst, src` (64 bits).
    pub fn mov(&mut self, dst: u8, src: u8) {
        if dst != src {
            self.rr(true, &[0x89], src, dst);
        }
    }
    /// `mov dst, qword m`.
    pub fn load(&mut self, dst: u8, m: Mem) {
        self.rm(&[], true, &[0x8B], dst, m);
    }
    /// `mov qword m, src`.
    pub fn store(&mut self, m: Mem, src: u8) {
        self.rm(&[], true, &[0x89], src, m);
    }
    /// `mov dst, dword m` (zero-extended).
    pub fn load32(&mut self, dst: u8, m: Mem) {
        self.rm(&[], false, &[0x8B], dst, m);
    }
    /// `mov dword m, src`.
    pub fn store32(&mut self, m: Mem, src: u8) {
        self.rm(&[], false, &[0x89], src, m);
    }
    /// `mov dword m, imm32`.
    pub fn store32_imm(&mut self, m: Mem, v: u32) {
        self.rm(&[], false, &[0xC7], 0, m);
        self.imm32(v);
    }
    /// `mov dst, src` (32 bits, zero-extended).
    pub fn mov32(&mut self, dst: u8, src: u8) {
        self.rr(false, &[0x89], src, dst);
    }
    /// `cmp reg, imm32` (32 bits).
    pub fn cmp32_imm(&mut self, reg: u8, imm: u32) {
        self.rr(false, &[0x81], 7, reg);
        self.imm32(imm);
    }
    /// `movzx dst, word m`.
    pub fn load16(&mut self, dst: u8, m: Mem) {
        self.rm(&[], false, &[0x0F, 0xB7], dst, m);
    }
    /// `mov word m, src`.
    pub fn store16(&mut self, m: Mem, src: u8) {
        self.rm(&[0x66], false, &[0x89], src, m);
    }
    /// `lea dst, m` (64 bits).
    pub fn lea(&mut self, dst: u8, m: Mem) {
        self.rm(&[], true, &[0x8D], dst, m);
    }
    /// `lea dst, m` (32 bits, zero-extended).
    pub fn lea32(&mut self, dst: u8, m: Mem) {
        self.rm(&[], false, &[0x8D], dst, m);
    }
    /// `add dst, qword m`.
    pub fn add_mem(&mut self, dst: u8, m: Mem) {
        self.rm(&[], true, &[0x03], dst, m);
    }
    /// `sub dst, qword m`.
    pub fn sub_mem(&mut self, dst: u8, m: Mem) {
        self.rm(&[], true, &[0x2B], dst, m);
    }
    /// `sub qword m, imm8` (0..=127).
    pub fn sub_mem_imm(&mut self, m: Mem, imm: u8) {
        self.rm(&[], true, &[0x83], 5, m);
        self.bytes.push(imm);
    }
    /// `cmp reg, imm32`.
    pub fn cmp_imm(&mut self, reg: u8, imm: u32) {
        self.rr(true, &[0x81], 7, reg);
        self.imm32(imm);
    }
    /// `cmp dword m, imm32`.
    pub fn cmp_mem32_imm(&mut self, m: Mem, imm: u32) {
        self.rm(&[], false, &[0x81], 7, m);
        self.imm32(imm);
    }
    /// Load any constant.
    pub fn imm(&mut self, dst: u8, v: u64) {
        if let Ok(v) = u32::try_from(v) {
            if dst >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xB8 | (dst & 7));
            self.imm32(v);
        } else if let Ok(v) = i32::try_from(v.cast_signed()) {
            self.rr(true, &[0xC7], 0, dst);
            self.imm32(v.cast_unsigned());
        } else {
            self.raw(&[0x48 | dst >> 3, 0xB8 | (dst & 7)]);
            self.raw(&v.to_le_bytes());
        }
    }
    /// `mov qword m, imm` through T1 where the constant is wide.
    pub fn store_imm(&mut self, m: Mem, v: u64) {
        if let Ok(v) = i32::try_from(v.cast_signed()) {
            self.rm(&[], true, &[0xC7], 0, m);
            self.imm32(v.cast_unsigned());
        } else {
            self.imm(T1, v);
            self.store(m, T1);
        }
    }
    /// `mov dword m, imm`.
    pub fn store_imm32(&mut self, m: Mem, v: u32) {
        self.rm(&[], false, &[0xC7], 0, m);
        self.imm32(v);
    }
    /// `operation m, source` on 4 or 8 bytes, from a register or a constant.
    pub fn alu_mem(&mut self, operation: u8, size: usize, m: Mem, source: Source) {
        match source {
            Source::Register(r) => self.rm(&[], size == 8, &[operation << 3 | 1], r, m),
            Source::Immediate(v) => {
                let (opcode, digit) = if operation == alu::MOV { (0xC7, 0) } else { (0x81, operation) };
                self.rm(&[], size == 8, &[opcode], digit, m);
                self.imm32(v as u32);
            }
            Source::Memory(_) => unreachable!("no instruction has two such operands"),
        }
    }
    /// `operation dst, source` on `size` bytes; for one or two bytes `dst` is R8 or above.
    pub fn alu(&mut self, operation: u8, size: usize, dst: u8, source: Source) {
        debug_assert!(dst >= 8 || size > 2); // so that there is a REX prefix, and no high byte
        let (wide, is_byte) = (size == 8, u8::from(size > 1));
        let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
        let opcode = operation << 3 | 2 | is_byte; // operation reg, r/m
        match source {
            Source::Register(r) => {
                self.raw(prefix);
                self.rr(wide, &[opcode], dst, r);
            }
            Source::Memory(m) => self.rm(prefix, wide, &[opcode], dst, m),
            Source::Immediate(v) if operation == alu::MOV => self.imm(dst, i64::from(v).cast_unsigned()),
            Source::Immediate(v) => {
                self.raw(prefix);
                self.rr(wide, &[0x80 | is_byte], operation, dst);
                match size {
                    1 => self.bytes.push(v as u8),
                    2 => self.raw(&(v as u16).to_le_bytes()),
                    _ => self.imm32(v as u32),
                }
            }
        }
    }
    /// `neg reg` on `size` bytes; `reg` is R8 or above.
    pub fn neg(&mut self, size: usize, reg: u8) {
        self.raw(if size == 2 { &[0x66] } else { &[] });
        self.rr(size == 8, &[0xF6 | u8::from(size > 1)], 3, reg);
    }
    /// A shift of `reg`, R8 or above, by a constant; `operation` is its /digit.
    pub fn shift(&mut self, operation: u8, size: usize, reg: u8, count: u8) {
        self.raw(if size == 2 { &[0x66] } else { &[] });
        self.rr(size == 8, &[0xC0 | u8::from(size > 1)], operation, reg);
        self.bytes.push(count);
    }
    /// `mov[zx] dst, m` of `size` bytes.
    pub fn load_sized(&mut self, size: usize, dst: u8, m: Mem) {
        match size {
            1 => self.rm(&[], false, &[0x0F, 0xB6], dst, m),
            2 => self.load16(dst, m),
            _ => self.rm(&[], size == 8, &[0x8B], dst, m),
        }
    }
    /// `mov m, src` of `size` bytes; `src` is RAX to RBX, or R8 and above.
    pub fn store_sized(&mut self, size: usize, m: Mem, src: u8) {
        let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
        self.rm(prefix, size == 8, &[0x88 | u8::from(size > 1)], src, m);
    }
    fn rel32(&mut self, target: u64) {
        let rel = target.wrapping_sub(self.here() + 4);
        self.imm32(rel as u32);
        if target < self.base {
            self.moves(What::Host, 4);
        }
    }
    /// What was emitted last but for so many bytes has to change where the piece is moved.
    pub fn moves(&mut self, what: What, from_end: usize) {
        match u16::try_from(self.bytes.len() - from_end) {
            Ok(at) => self.moves.push(Move { at, what }),
            Err(_) => self.is_fixed = true,
        }
    }
    /// Load an address of the guest's that moves with its code.
    pub fn guest(&mut self, dst: u8, v: u64) {
        self.imm(dst, v);
        if is_wide(v) { self.moves(What::Guest, 8) } else { self.is_fixed = true }
    }
    /// `mov qword m, v` of such an address, through T1.
    pub fn store_guest(&mut self, m: Mem, v: u64) {
        if is_wide(v) {
            self.guest(T1, v);
            self.store(m, T1);
        } else {
            self.store_imm(m, v);
            self.is_fixed = true;
        }
    }
    /// `jmp target`.
    pub fn jmp(&mut self, target: u64) {
        self.bytes.push(0xE9);
        self.rel32(target);
    }
    /// `call target`.
    pub fn call(&mut self, target: u64) {
        self.bytes.push(0xE8);
        self.rel32(target);
    }
    /// `jcc target`.
    pub fn jcc(&mut self, cc: u8, target: u64) {
        self.raw(&[0x0F, 0x80 | cc]);
        self.rel32(target);
    }
    /// `jcc ?`: returns the place of the displacement for [`Asm::patch`].
    pub fn jcc_later(&mut self, cc: u8) -> usize {
        self.raw(&[0x0F, 0x80 | cc, 0, 0, 0, 0]);
        self.bytes.len() - 4
    }
    /// `jmp ?`.
    pub fn jmp_later(&mut self) -> usize {
        self.raw(&[0xE9, 0, 0, 0, 0]);
        self.bytes.len() - 4
    }
    /// Let the jump whose displacement is at `place` go to `target`.
    pub fn patch(&mut self, place: usize, target: u64) {
        let next = self.base + place as u64 + 4;
        let rel = target.wrapping_sub(next) as u32;
        self.bytes[place..place + 4].copy_from_slice(&rel.to_le_bytes());
    }
    /// Save the arithmetic flags in a word at `m`; T1 lost.
    pub fn save_flags(&mut self, m: Mem) {
        self.mov(T1, RAX);
        self.raw(&[0x9F, 0x0F, 0x90, 0xC0]); // lahf; seto al
        self.store16(m, RAX);
        self.mov(RAX, T1);
    }
    /// Load the arithmetic flags from the word at `m`; T1 lost.
    pub fn load_flags(&mut self, m: Mem) {
        self.mov(T1, RAX);
        self.load16(RAX, m);
        self.raw(&[0x04, 0x7F, 0x9E]); // add al, 0x7F; sahf
        self.mov(RAX, T1);
    }
}
