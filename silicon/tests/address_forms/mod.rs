//! Programs that access memory by every address form, with bases and indices that a table gives.
//!
//! A program is sites, for ever.  Each takes the next of its random numbers, a base and an index from the
//! table at R12, says in R15 where to go on if it faults, and accesses memory, mostly several times.  R8
//! counts the rounds.

#![allow(dead_code)]

pub mod code32;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register, Register::*};

use crate::random::Rng;

/// Words of the table: bases, then indices.
pub const BASES: u64 = 1024;
/// Bases of one place; the last ones are of all.
pub const PLACE: u64 = BASES / 4;
/// See [`BASES`].
pub const INDICES: u64 = 16;
/// Bytes that a program may have: a page, and a jump back to its start.
const ROOM: usize = 4096 - 5;

/// What a base is moved by before it is used again, and how far from it operands are.
const DISPLACEMENTS: [i64; 14] = [
    0,
    8,
    -8,
    -1,
    127,
    -128,
    0x1000,
    -0x1000,
    0x7FFF_FFFF,
    0x7FFF_FFF8,
    0x7FFF_F000,
    -0x8000_0000,
    -0x7FFF_FFF9,
    -0x4000_0000,
];
const BASE_REGISTERS: [Register; 9] = [RBX, RSI, RDI, RBP, RSP, R9, R10, R11, R14];
const INDEX_REGISTERS: [Register; 3] = [RCX, RDX, R9];

/// An instruction with a memory operand, and RAX, XMM0 or YMM0 as the other one.
type Form = fn(MemoryOperand) -> Result<Instruction, iced_x86::IcedError>;

const FORMS: [Form; 33] = [
    |m| Instruction::with2(Code::Mov_r64_rm64, RAX, m),
    |m| Instruction::with2(Code::Mov_rm64_r64, m, RAX),
    |m| Instruction::with2(Code::Mov_r32_rm32, EAX, m),
    |m| Instruction::with2(Code::Mov_rm32_r32, m, EAX),
    |m| Instruction::with2(Code::Mov_rm16_r16, m, AX),
    |m| Instruction::with2(Code::Mov_rm8_r8, m, AL),
    |m| Instruction::with2(Code::Mov_rm64_imm32, m, -77),
    |m| Instruction::with2(Code::Movzx_r32_rm8, EAX, m),
    |m| Instruction::with2(Code::Movsx_r64_rm16, RAX, m),
    |m| Instruction::with2(Code::Movsxd_r64_rm32, RAX, m),
    |m| Instruction::with2(Code::Add_rm64_r64, m, RAX),
    |m| Instruction::with2(Code::Adc_r64_rm64, RAX, m),
    |m| Instruction::with2(Code::Cmp_rm64_imm8, m, 5),
    |m| Instruction::with2(Code::Test_rm8_r8, m, AL),
    |m| Instruction::with1(Code::Inc_rm32, m),
    |m| Instruction::with1(Code::Not_rm16, m),
    |m| Instruction::with2(Code::Shl_rm64_imm8, m, 3),
    |m| Instruction::with2(Code::Xchg_rm64_r64, m, RAX),
    |m| Instruction::with2(Code::Xadd_rm64_r64, m, RAX),
    |m| Instruction::with2(Code::Cmpxchg_rm32_r32, m, EAX),
    |m| Instruction::with3(Code::Imul_r64_rm64_imm32, RAX, m, 12345),
    |m| Instruction::with1(Code::Mul_rm64, m),
    |m| Instruction::with2(Code::Bt_rm64_r64, m, RAX), // far from the operand's own address
    |m| Instruction::with2(Code::Bts_rm64_r64, m, RAX),
    |m| Instruction::with2(Code::Movups_xmm_xmmm128, XMM0, m),
    |m| Instruction::with2(Code::Movups_xmmm128_xmm, m, XMM0),
    |m| Instruction::with2(Code::Movaps_xmmm128_xmm, m, XMM0), // #GP where it is not aligned
    |m| Instruction::with2(Code::Movsd_xmm_xmmm64, XMM0, m),
    |m| Instruction::with1(Code::Fld_m80fp, m),
    |m| Instruction::with1(Code::Fstp_m80fp, m),
    |m| Instruction::with1(Code::Fxsave_m512byte, m),
    |m| Instruction::with1(Code::Push_rm64, m),
    |m| Instruction::with1(Code::Pop_rm64, m),
];
const AVX_FORMS: [Form; 3] = [
    |m| Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, YMM0, m),
    |m| Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, m, YMM0),
    |m| Instruction::with3(Code::VEX_Vpaddd_ymm_ymm_ymmm256, YMM0, YMM1, m),
];
/// Two of each that moves by the size of its elements: what RCX says, or one.
const STRINGS: [&[u8]; 10] = [
    &[0xF3, 0xA4],       // rep movsb
    &[0xF3, 0x48, 0xA5], // rep movsq
    &[0x66, 0xA5],       // movsw
    &[0xF3, 0xAA],       // rep stosb
    &[0xF3, 0x48, 0xAB], // rep stosq
    &[0xAB],             // stosd
    &[0xF3, 0xAC],       // rep lodsb
    &[0x48, 0xAD],       // lodsq
    &[0xF3, 0x48, 0xA7], // repe cmpsq
    &[0xF2, 0xAE],       // repne scasb
];
/// What moves the stack pointer, or accesses the stack: RBP and RSP are the base.
const STACK_FORMS: [&[u8]; 12] = [
    &[0x50, 0x50, 0x58],                                     // push rax; push rax; pop rax
    &[0x6A, 0xFF, 0x66, 0x50],                               // push -1; push ax
    &[0xE8, 0, 0, 0, 0],                                     // call over nothing
    &[0xC9],                                                 // leave
    &[0xC8, 0x20, 0, 0],                                     // enter 32, 0
    &[0xC8, 0x20, 0, 2],                                     // enter 32, 2
    &[0x48, 0x81, 0xEC, 0xFF, 0xFF, 0xFF, 0x7F, 0x50],       // sub rsp, 7FFFFFFFh; push rax
    &[0x48, 0x81, 0xC4, 0xFF, 0xFF, 0xFF, 0x7F, 0x58],       // add rsp, 7FFFFFFFh; pop rax
    &[0x48, 0x29, 0xCC, 0x50],                               // sub rsp, rcx; push rax
    &[0x48, 0x8D, 0x64, 0xCC, 0x7F, 0x9C],                   // lea rsp, [rsp + rcx * 8 + 127]; pushfq
    &[0x48, 0x83, 0xE4, 0xE0, 0x48, 0x89, 0x5C, 0x24, 0xF8], // and rsp, -32; mov [rsp - 8], rbx
    &[0x48, 0x8D, 0xA4, 0x24, 0, 0, 0, 0x80, 0x50, 0x8F, 0x04, 0x24], // lea rsp, [rsp - 2 G]; push rax; pop [rsp]
];

/// A program, and how many accesses to memory each of its rounds tries at least.
pub struct Program {
    /// Its code, that goes anywhere.
    pub code: Vec<u8>,
    /// See above.
    pub accesses: u64,
}

/// The random program of a seed; with YMM registers and gathers, if wanted.
pub fn program(seed: u64, has_avx: bool) -> Program {
    let mut rng = Rng(seed);
    let mut made = Program { code: vec![0x49, 0xFF, 0xC0], accesses: 0 }; // again: inc r8
    loop {
        let site = Site::new(&mut rng, has_avx);
        if made.code.len() + site.code.len() > ROOM {
            break;
        }
        made.code.extend(site.code);
        made.accesses += site.accesses;
    }
    let back = -(made.code.len() as i32 + 5);
    made.code.push(0xE9); // jmp again
    made.code.extend(back.to_le_bytes());
    made
}

/// An operand; of the computer's two sizes of displacements the smaller one that will do.
fn operand(
    base: Register,
    index: Register,
    scale: u32,
    displacement: i64,
    segment: Register,
) -> MemoryOperand {
    let is_short = base.is_gpr32() || index.is_gpr32();
    let bytes = match i8::try_from(displacement) {
        Ok(0) if base != Register::None => 0,
        Ok(_) if base != Register::None => 1,
        _ if is_short => 4,
        _ => 8,
    };
    MemoryOperand::new(base, index, scale, displacement, bytes, false, segment)
}

/// One of them.
struct Site {
    code: Vec<u8>,
    accesses: u64,
}

fn pick<T: Copy>(rng: &mut Rng, all: &[T]) -> T {
    all[rng.below(all.len() as u64) as usize]
}

fn encode(insn: &Instruction) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    encoder.encode(insn, 0).unwrap_or_else(|e| panic!("{insn:?}: {e}"));
    encoder.take_buffer()
}

impl Site {
    fn new(rng: &mut Rng, has_avx: bool) -> Self {
        let (base, index) = (pick(rng, &BASE_REGISTERS), pick(rng, &INDEX_REGISTERS));
        let mut all = Self { code: Vec::new(), accesses: 0 };
        all.next_number(rng);
        let base = match rng.below(if has_avx { 12 } else { 10 }) {
            0..6 => {
                let (base, index) = if base == index { (R10, index) } else { (base, index) };
                all.take(rng, base, index);
                all.with_recovery(|body| body.plain(rng, base, index, has_avx));
                return all;
            }
            6 => {
                all.take(rng, RBX, RCX);
                all.with_recovery(|body| body.without_base(rng));
                return all;
            }
            7 => RDI,
            8 => pick(rng, &[RSP, RBP]),
            9 => pick(rng, &BASE_REGISTERS),
            _ => RBX,
        };
        match base {
            RDI if rng.below(8) != 0 => {
                all.take(rng, RSI, RCX);
                all.next_number(rng);
                all.take(rng, RDI, RCX);
                all.with_recovery(|body| body.string(rng));
            }
            RBX if has_avx && rng.below(8) != 0 => {
                all.take(rng, RBX, RCX);
                all.with_recovery(|body| body.gather(rng));
            }
            RSP | RBP => {
                all.take(rng, RSP, RCX);
                all.with_recovery(|body| body.stack(rng));
            }
            base => {
                all.take(rng, base, RCX);
                all.with_recovery(|body| body.strides(rng, base));
            }
        }
        all
    }

    fn add(&mut self, code: &[u8]) {
        self.code.extend(code);
    }

    fn insn(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        self.code.extend(encode(&insn.unwrap()));
    }

    /// R13 = the next random number.
    fn next_number(&mut self, rng: &mut Rng) {
        self.add(&[0x4D, 0x69, 0xED, 0x95, 0xF4, 0x45, 0x25]); // imul r13, r13, 2545F495h
        self.insn(Instruction::with2(Code::Add_rm64_imm32, R13, (rng.next() & 0x7FFF_FFFF | 1) as i64));
    }

    /// The registers = a base and an index of the table.
    fn take(&mut self, rng: &mut Rng, base: Register, index: Register) {
        let place = pick(rng, &[0, 0, 1, 2, 3]) * PLACE;
        let words = operand(R12, index, 8, 8 * place as i64, Register::None);
        let more = operand(R12, index, 8, 8 * BASES as i64, Register::None);
        for (shift, mask, register, from) in [(45, PLACE, base, words), (33, INDICES, index, more)] {
            self.insn(Instruction::with2(Code::Mov_r64_rm64, index, R13));
            self.insn(Instruction::with2(Code::Shr_rm64_imm8, index, shift));
            self.insn(Instruction::with2(Code::And_rm64_imm32, index, mask as i64 - 1));
            self.insn(Instruction::with2(Code::Mov_r64_rm64, register, from));
        }
    }

    /// What may fault, behind what says where to go on then.
    fn with_recovery(&mut self, make: impl FnOnce(&mut Self)) {
        let mut body = Self { code: Vec::new(), accesses: 0 };
        // A block of its own: when it is translated, the registers tell where operands are likely to lead.
        body.add(&[0x4D, 0x85, 0xC0, 0x75, 0]); // test r8, r8; jnz, to the next instruction
        make(&mut body);
        self.add(&[0x4C, 0x8D, 0x3D]); // lea r15, [rip + …]
        self.add(&(body.code.len() as u32).to_le_bytes());
        self.add(&body.code);
        self.accesses += body.accesses;
    }

    /// One form or several, off a base that is moved in between.
    fn plain(&mut self, rng: &mut Rng, base: Register, index: Register, has_avx: bool) {
        match rng.below(4) {
            0 => self.insn(Instruction::with2(
                Code::Mov_r32_rm32,
                index.full_register32(),
                index.full_register32(),
            )),
            1 => self.insn(Instruction::with2(Code::Movsxd_r64_rm32, index, index.full_register32())),
            _ => {}
        }
        let (scale, is_indexed) = (pick(rng, &[1, 2, 4, 8]), rng.below(3) == 0);
        for turn in 0..=rng.below(4) {
            let by = pick(rng, &DISPLACEMENTS);
            match rng.below(6) {
                _ if turn == 0 => {}
                0 => self.insn(Instruction::with2(Code::Add_rm64_imm32, base, by)),
                1 => self.insn(Instruction::with2(Code::Sub_rm64_imm32, base, by)),
                2 => self.insn(Instruction::with2(
                    Code::Lea_r64_m,
                    base,
                    operand(base, Register::None, 1, by, Register::None),
                )),
                3 => self.insn(Instruction::with1(Code::Inc_rm64, base)),
                _ => {}
            }
            let displacement = pick(rng, &DISPLACEMENTS);
            let index = if is_indexed || rng.below(3) == 0 { index } else { Register::None };
            let scale = if index == Register::None { 1 } else { scale };
            let segment = if rng.below(8) == 0 { pick(rng, &[FS, GS]) } else { Register::None };
            // With 67H: an address of 32 bits.
            let is_short = rng.below(8) == 0;
            let width = |r: Register| if is_short && r != Register::None { r.full_register32() } else { r };
            let m = operand(width(base), width(index), scale, displacement, segment);
            self.form(rng, m, has_avx);
        }
    }

    fn form(&mut self, rng: &mut Rng, m: MemoryOperand, has_avx: bool) {
        let form = if has_avx && rng.below(8) == 0 { pick(rng, &AVX_FORMS) } else { pick(rng, &FORMS) };
        self.insn(form(m));
        self.accesses += 1;
    }

    /// Relative to RIP, with an index alone, at a constant, and MOV with an address of 64 bits.
    fn without_base(&mut self, rng: &mut Rng) {
        let displacement = pick(rng, &DISPLACEMENTS);
        let scale = pick(rng, &[1, 2, 4, 8]);
        self.accesses += 1;
        match rng.below(5) {
            0 => {
                self.add(&[0x48, 0x8B, 0x05]); // mov rax, [rip + …]
                self.add(&(displacement as i32).to_le_bytes());
            }
            1 => {
                self.add(&[0x48, 0x8B, 0x04, 0x25]); // mov rax, [constant]
                self.add(&(displacement as i32).to_le_bytes());
            }
            2 => {
                let m = operand(Register::None, RCX, scale, displacement, Register::None);
                self.insn(Instruction::with2(Code::Mov_rm64_r64, m, RAX));
            }
            3 => {
                let m = operand(Register::None, RBX, scale, displacement, Register::None);
                self.insn(Instruction::with2(Code::Mov_r64_rm64, RAX, m));
            }
            _ => {
                let edge = pick(rng, &crate::arena_bed::edges());
                self.add(&pick(rng, &[[0x48, 0xA1], [0x48, 0xA3]])); // mov rax, [moffs64], and back
                self.add(&edge.to_le_bytes());
            }
        }
    }

    fn string(&mut self, rng: &mut Rng) {
        self.add(&[0x81, 0xE1, pick(rng, &[0x3F, 0xFF]), pick(rng, &[0, 0, 0x0F]), 0, 0]); // and ecx, …
        self.add(&[pick(rng, &[0xFD, 0xFC])]); // std, or cld
        self.add(pick(rng, &STRINGS));
        self.accesses += 1;
    }

    fn stack(&mut self, rng: &mut Rng) {
        self.add(&[0x48, 0x89, 0xE5]); // mov rbp, rsp
        self.add(pick(rng, &STACK_FORMS));
        self.accesses += 1;
    }

    /// A loop that goes through addresses with a stride.
    fn strides(&mut self, rng: &mut Rng, base: Register) {
        let begin = self.code.len() + 5;
        self.add(&[0xB9, 12, 0, 0, 0]); // mov ecx, 12
        let form = pick(rng, &FORMS[..8]);
        let m = operand(base, Register::None, 1, pick(rng, &DISPLACEMENTS), Register::None);
        self.insn(form(m));
        let stride = pick(rng, &[8, -8, 0x1000, -0x1000, 0x4000_0000, -0x4000_0000]);
        self.insn(Instruction::with2(Code::Add_rm64_imm32, base, stride));
        self.add(&[0xFF, 0xC9]); // dec ecx
        self.add(&[0x75, (begin as i64 - self.code.len() as i64 - 2) as u8]); // jnz
        self.accesses += 1;
    }

    /// Four indices of the table, each an address's distance from the next one.
    fn gather(&mut self, rng: &mut Rng) {
        let is_quad = rng.below(2) == 0;
        let from = if is_quad { 8 * BASES as i64 } else { 8 * rng.below(BASES) as i64 };
        let words = operand(R12, Register::None, 1, from, Register::None);
        self.insn(Instruction::with2(Code::VEX_Vmovdqu_ymm_ymmm256, YMM6, words));
        self.insn(Instruction::with3(Code::VEX_Vpcmpeqd_ymm_ymm_ymmm256, YMM5, YMM5, YMM5));
        let scale = pick(rng, &[1, 2, 4, 8]);
        let displacement = pick(rng, &DISPLACEMENTS);
        let m = operand(RBX, YMM6, scale, displacement, Register::None);
        let code =
            if is_quad { Code::VEX_Vpgatherqq_ymm_vm64y_ymm } else { Code::VEX_Vpgatherdd_ymm_vm32y_ymm };
        self.insn(Instruction::with3(code, YMM0, m, YMM5));
        self.accesses += 1;
    }
}

/// Addresses that operands of these programs may have: with the bases, and what leads furthest from them.
pub fn reached(bases: &[u64]) -> Vec<u64> {
    let far: [u64; 7] = [0, 1 << 31, 1 << 32, 1 << 34, 1 << 35, 1 << 36, 1 << 40];
    let near = [0, 1 << 31, -(1 << 31), -(1 << 30)];
    let sums = |base: u64| {
        far.into_iter().flat_map(move |f| near.map(|n| base.wrapping_add(f).wrapping_add_signed(n)))
    };
    bases.iter().copied().flat_map(sums).collect()
}
