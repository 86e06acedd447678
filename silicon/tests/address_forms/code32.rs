//! The same of 32 bits: programs whose bases, indices and displacements lead round 4 GBytes, in segments with
//! a base or without, with addresses of 32 and of 16 bits.
//!
//! XMM7 has the random number, XMM6 where to go on after a fault, XMM5 counts the rounds: memory may be
//! written anywhere.

#![allow(dead_code)]

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register, Register::*};

use super::{DISPLACEMENTS, Form, Program, ROOM, pick};
use crate::random::Rng;

/// Where programs are.
pub const CODE: u32 = 0x10_0000;
/// Where the table of bases and indices is.
pub const TABLE: u32 = 0x21_0000;
/// Words of the table: bases, then indices.
pub const BASES: u32 = 256;
/// See [`BASES`].
pub const INDICES: u32 = 16;

const BASE_REGISTERS: [Register; 5] = [EBX, ESI, EDI, EBP, ESP];
/// Those of 16 bits, which have few forms.
const SHORT: [[Register; 2]; 6] = [[BX, SI], [BX, DI], [BP, SI], [BP, DI], [BX, None], [SI, None]];
const SEGMENTS: [Register; 6] = [FS, GS, GS, SS, ES, CS];
use Register::None;

const FORMS: [Form; 33] = [
    |m| Instruction::with2(Code::Mov_r32_rm32, EAX, m),
    |m| Instruction::with2(Code::Mov_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Mov_rm16_r16, m, AX),
    |m| Instruction::with2(Code::Mov_rm8_r8, m, AL),
    |m| Instruction::with2(Code::Mov_r8_rm8, AH, m),
    |m| Instruction::with2(Code::Mov_rm8_r8, m, AH),
    |m| Instruction::with2(Code::Mov_rm32_imm32, m, -77),
    |m| Instruction::with2(Code::Movzx_r32_rm8, EAX, m),
    |m| Instruction::with2(Code::Movsx_r32_rm16, EAX, m),
    |m| Instruction::with2(Code::Add_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Adc_r32_rm32, EAX, m),
    |m| Instruction::with2(Code::Cmp_rm32_imm8, m, 5),
    |m| Instruction::with2(Code::Test_rm8_r8, m, AL),
    |m| Instruction::with1(Code::Inc_rm32, m),
    |m| Instruction::with1(Code::Not_rm16, m),
    |m| Instruction::with2(Code::Shl_rm32_imm8, m, 3),
    |m| Instruction::with2(Code::Xchg_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Xadd_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Cmpxchg_rm32_r32, m, EAX),
    |m| Instruction::with1(Code::Cmpxchg8b_m64, m),
    |m| Instruction::with3(Code::Imul_r32_rm32_imm32, EAX, m, 12345),
    |m| Instruction::with1(Code::Mul_rm32, m),
    |m| Instruction::with2(Code::Bt_rm32_r32, m, EAX), // far from the operand's own address
    |m| Instruction::with2(Code::Bts_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Movups_xmm_xmmm128, XMM0, m),
    |m| Instruction::with2(Code::Movups_xmmm128_xmm, m, XMM0),
    |m| Instruction::with2(Code::Movaps_xmmm128_xmm, m, XMM0), // #GP where it is not aligned
    |m| Instruction::with2(Code::Movsd_xmm_xmmm64, XMM0, m),
    |m| Instruction::with1(Code::Fld_m80fp, m),
    |m| Instruction::with1(Code::Fstp_m80fp, m),
    |m| Instruction::with1(Code::Fxsave_m512byte, m),
    |m| Instruction::with1(Code::Push_rm32, m),
    |m| Instruction::with1(Code::Pop_rm32, m),
];
/// What ECX says, or one.
const STRINGS: [&[u8]; 12] = [
    &[0xF3, 0xA4],       // rep movsb
    &[0xF3, 0xA5],       // rep movsd
    &[0x66, 0xA5],       // movsw
    &[0xF3, 0xAA],       // rep stosb
    &[0xF3, 0xAB],       // rep stosd
    &[0xAB],             // stosd
    &[0xF3, 0xAC],       // rep lodsb
    &[0xAD],             // lodsd
    &[0xF3, 0xA7],       // repe cmpsd
    &[0xF2, 0xAE],       // repne scasb
    &[0x65, 0xA5],       // movsd with source in GS
    &[0x67, 0xF3, 0xA4], // rep movsb with SI, DI, CX
];
/// What moves the stack pointer, or accesses the stack: EBP and ESP are the base.
const STACK_FORMS: [&[u8]; 13] = [
    &[0x50, 0x50, 0x58],                               // push eax; push eax; pop eax
    &[0x6A, 0xFF, 0x66, 0x50],                         // push -1; push ax
    &[0xE8, 0, 0, 0, 0],                               // call over nothing
    &[0xC9],                                           // leave
    &[0xC8, 0x20, 0, 0],                               // enter 32, 0
    &[0xC8, 0x20, 0, 2],                               // enter 32, 2
    &[0x60],                                           // pushad
    &[0x61],                                           // popad
    &[0x81, 0xEC, 0xFF, 0xFF, 0xFF, 0x7F, 0x50],       // sub esp, 7FFFFFFFh; push eax
    &[0x81, 0xC4, 0xFF, 0xFF, 0xFF, 0x7F, 0x58],       // add esp, 7FFFFFFFh; pop eax
    &[0x29, 0xCC, 0x50],                               // sub esp, ecx; push eax
    &[0x8D, 0x64, 0xCC, 0x7F, 0x9C],                   // lea esp, [esp + ecx * 8 + 127]; pushfd
    &[0x83, 0xE4, 0xE0, 0x89, 0x5C, 0x24, 0xF8, 0x1E], // and esp, -32; mov [esp - 8], ebx; push ds
];

/// An operand of the computer's; its displacement is as short as it can be.
fn operand([base, index]: [Register; 2], scale: u32, displacement: i64, segment: Register) -> MemoryOperand {
    let is_short = base.size().max(index.size()) == 2;
    let displacement = if is_short { i64::from(displacement as i16) } else { displacement };
    let bytes = match i8::try_from(displacement) {
        Ok(0) if base != None && base != EBP && base != BP => 0,
        Ok(_) if base != None => 1,
        _ if is_short => 2,
        _ => 4,
    };
    let scale = if index == None || is_short { 1 } else { scale };
    MemoryOperand::new(base, index, scale, displacement, bytes, false, segment)
}

/// The random program of a seed; with gathers, if wanted.
pub fn program(seed: u64, has_avx: bool) -> Program {
    let mut w = Writer { code: Vec::new(), accesses: 0, rng: Rng(seed ^ 0x32) };
    w.add(&[0x66, 0x0F, 0x7E, 0xE9, 0x41, 0x66, 0x0F, 0x6E, 0xE9]); // movd ecx, xmm5; inc ecx; movd xmm5, ecx
    loop {
        let before = (w.code.len(), w.accesses);
        w.site(has_avx);
        if w.code.len() > ROOM {
            w.code.truncate(before.0);
            w.accesses = before.1;
            break;
        }
    }
    let back = -(w.code.len() as i32 + 5);
    w.add(&[0xE9]); // jmp again
    w.add(&back.to_le_bytes());
    Program { code: w.code, accesses: w.accesses }
}

struct Writer {
    code: Vec<u8>,
    accesses: u64,
    rng: Rng,
}

impl Writer {
    fn add(&mut self, code: &[u8]) {
        self.code.extend(code);
    }

    fn insn(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        let insn = insn.unwrap();
        let mut encoder = Encoder::new(32);
        encoder.encode(&insn, 0).unwrap_or_else(|e| panic!("{insn:?}: {e}"));
        self.code.extend(encoder.take_buffer());
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        pick(&mut self.rng, all)
    }

    /// Registers from the table, and what accesses memory with them.
    fn site(&mut self, has_avx: bool) {
        let base = self.pick(&BASE_REGISTERS);
        let index = self.pick(&[ECX, EDX]);
        let kind = self.rng.below(if has_avx { 12 } else { 11 });
        let (base, index) = match kind {
            0..=5 => (base, index),
            7 | 8 => (EDI, ECX),
            9 => (ESP, ECX),
            10 => (base, ECX),
            _ => (EBX, ECX),
        };
        if base == EDI {
            self.take(ESI, ECX);
        }
        self.take(base, index);
        self.add(&[0xB8]); // mov eax, …: where to go on, which is known when the rest is
        let next = self.code.len();
        self.add(&[0; 4]);
        // A block of its own: movd xmm6, eax; test eax, eax; jnz, to the next instruction
        self.add(&[0x66, 0x0F, 0x6E, 0xF0, 0x85, 0xC0, 0x75, 0]);
        match kind {
            0..=5 => self.plain(base, index),
            6 => self.without_base(),
            7 | 8 => self.string(),
            9 => {
                self.add(&[0x89, 0xE5]); // mov ebp, esp
                let form = self.pick(&STACK_FORMS);
                self.add(form);
                self.accesses += 1;
            }
            10 => self.strides(base),
            _ => self.gather(),
        }
        let here = CODE + self.code.len() as u32;
        self.code[next..next + 4].copy_from_slice(&here.to_le_bytes());
    }

    /// The registers = a base and an index of the table.
    fn take(&mut self, base: Register, index: Register) {
        self.add(&[0x66, 0x0F, 0x7E, 0xFA, 0x69, 0xD2, 0x6D, 0x4E, 0xC6, 0x41]); // movd edx, xmm7; imul edx, edx, 41C64E6Dh
        let more = (self.rng.next() & 0x7FFF_FFFF | 1) as i64;
        self.insn(Instruction::with2(Code::Add_rm32_imm32, EDX, more));
        self.add(&[0x66, 0x0F, 0x6E, 0xFA]); // movd xmm7, edx
        for (shift, mask, register, from) in
            [(22, BASES, base, TABLE), (17, INDICES, index, TABLE + 4 * BASES)]
        {
            // (EDX is the last one that is needed.)
            self.insn(Instruction::with2(Code::Mov_r32_rm32, EAX, EDX));
            self.insn(Instruction::with2(Code::Shr_rm32_imm8, EAX, shift));
            self.insn(Instruction::with2(Code::And_rm32_imm32, EAX, i64::from(mask) - 1));
            let word = MemoryOperand::new(None, EAX, 4, from.into(), 4, false, None);
            self.insn(Instruction::with2(Code::Mov_r32_rm32, register, word));
        }
    }

    fn form(&mut self, m: MemoryOperand) {
        let form = self.pick(&FORMS);
        self.insn(form(m));
        self.accesses += 1;
    }

    /// One form or several, off a base that is moved in between.
    fn plain(&mut self, base: Register, index: Register) {
        for _ in 0..=self.rng.below(3) {
            let by = self.pick(&DISPLACEMENTS);
            match self.rng.below(4) {
                0 => self.insn(Instruction::with2(Code::Add_rm32_imm32, base, by)),
                1 => self.insn(Instruction::with1(Code::Dec_r32, base)),
                _ => {}
            }
            let displacement = self.pick(&DISPLACEMENTS);
            let scale = self.pick(&[1, 2, 4, 8]);
            let index = self.pick(&[index, None]);
            let registers = if self.rng.below(8) == 0 { self.pick(&SHORT) } else { [base, index] };
            let segment = if self.rng.below(4) == 0 { self.pick(&SEGMENTS) } else { None };
            self.form(operand(registers, scale, displacement, segment));
        }
    }

    /// With an index alone, at a constant, and MOV with an address in the instruction.
    fn without_base(&mut self) {
        let displacement = self.pick(&DISPLACEMENTS);
        let scale = self.pick(&[1, 2, 4, 8]);
        let segment = self.pick(&[None, None, FS, GS]);
        match self.rng.below(4) {
            0 => self.form(operand([None, ECX], scale, displacement, segment)),
            1 => self.form(operand([None, None], 1, displacement, segment)),
            2 => {
                let prefix = self.pick(&[0x64, 0x65, 0x3E]);
                let code = self.pick(&[0xA1, 0xA3]); // mov eax, [moffs32], and back
                self.add(&[prefix, code]);
                self.add(&(displacement as i32).to_le_bytes());
                self.accesses += 1;
            }
            _ => {
                self.add(&[0x67, 0xA1]); // mov eax, [moffs16]
                self.add(&(displacement as i16).to_le_bytes());
                self.accesses += 1;
            }
        }
    }

    fn string(&mut self) {
        let most = self.pick(&[0x3F, 0xFF, 0xFFF]);
        self.insn(Instruction::with2(Code::And_rm32_imm32, ECX, most));
        let direction = self.pick(&[0xFD, 0xFC]); // std, or cld
        self.add(&[direction]);
        let string = self.pick(&STRINGS);
        self.add(string);
        self.accesses += 1;
    }

    /// A loop that goes through addresses with a stride.
    fn strides(&mut self, base: Register) {
        self.add(&[0xB9, 12, 0, 0, 0]); // mov ecx, 12
        let begin = self.code.len();
        let displacement = self.pick(&DISPLACEMENTS);
        let form = self.pick(&FORMS[..10]);
        self.insn(form(operand([base, None], 1, displacement, None)));
        let stride = self.pick(&[4, -4, 0x1000, -0x1000, 0x4000_0000, -0x4000_0000]);
        self.insn(Instruction::with2(Code::Add_rm32_imm32, base, stride));
        self.add(&[0x49]); // dec ecx
        let back = begin as i64 - self.code.len() as i64 - 2;
        self.add(&[0x75, back as u8]); // jnz
        self.accesses += 1;
    }

    /// Eight indices of the table's words.
    fn gather(&mut self) {
        let from = TABLE + 4 * self.rng.below(BASES.into()) as u32;
        let words = MemoryOperand::new(None, None, 1, from.into(), 4, false, None);
        self.insn(Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, YMM2, words));
        self.insn(Instruction::with3(Code::VEX_Vpcmpeqd_ymm_ymm_ymmm256, YMM3, YMM3, YMM3));
        let scale = self.pick(&[1, 2, 4, 8]);
        let displacement = self.pick(&DISPLACEMENTS);
        let m = MemoryOperand::new(EBX, YMM2, scale, displacement, 4, false, None);
        self.insn(Instruction::with3(Code::VEX_Vpgatherdd_ymm_vm32y_ymm, YMM0, m, YMM3));
        self.accesses += 1;
    }
}

/// Offsets in a window that operands of these programs have, or would have if they were computed with
/// more bits than 32.
pub fn reached(bases: &[u32]) -> Vec<u64> {
    let far: [u64; 7] = [0, 1 << 31, 1 << 32, 3 << 31, 1 << 33, 1 << 34, 9 << 32];
    let near = [0, 1 << 12, 1 << 16, 1 << 17, 1 << 31, -(1 << 12), -(1 << 16), -(1 << 31), -(1 << 30)];
    let sums = |base: u32| {
        far.into_iter().flat_map(move |f| near.map(|n| (u64::from(base) + f).wrapping_add_signed(n)))
    };
    bases.iter().copied().flat_map(sums).collect()
}
