//! Which function executes an instruction, and a cache of decoded instructions.
//!
//! The cache trusts nothing: it is asked with the bytes that are in memory now, so that whoever
//! changes code needs to tell nobody.

use iced_x86::{
    CpuidFeature, Decoder, DecoderError, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind,
};

use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, ud};
use crate::cpu::{
    arith, bits, control, far, logic, mov, pointers, shift, stack, string, system, undefined, vector,
};
use crate::dbt::zeroed::Zeroed;

/// Executes an instruction.  RIP already names the next one; a branch overwrites it.
pub type Execute = fn(&mut Core, &Instruction) -> Exec<()>;

/// Most bytes an instruction may have.
pub const MAX_LENGTH: usize = 15;
const SLOTS: usize = 8192;

/// For each length the bits of the two words that belong to the instruction.
const KEEP: [(u64, u64); MAX_LENGTH + 1] = {
    let mut t = [(0, 0); MAX_LENGTH + 1];
    let mut n = 1;
    while n <= MAX_LENGTH {
        t[n] = if n <= 8 { (u64::MAX >> (64 - 8 * n), 0) } else { (u64::MAX, u64::MAX >> (128 - 8 * n)) };
        n += 1;
    }
    t
};

/// A decoded instruction; all zeros (no code is of 0 bits): none.
#[derive(Clone, Copy)]
pub struct Slot {
    rip: u64,
    bytes: (u64, u64),
    length: u8,
    bits: u8,
    insn: Instruction,
    execute: Option<Execute>,
}

/// Where the last instruction was fetched from, and all that this depends on.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct FetchKey {
    /// Linear page number.
    pub vpn: u64,
    /// The TLB's space numbers.
    pub spaces: (u32, u32),
    /// CPL 3; CR4.SMEP.
    pub rules: (bool, bool),
    /// The TLB's count of vanished translations.
    pub epoch: u64,
    /// Walks so far: each may have replaced a translation.
    pub walks: u64,
}

/// Decoded instructions, and the last page they came from.
#[derive(Default)]
pub struct Decoded {
    /// Made when the first instruction is decoded.
    slots: Option<Zeroed<Slot>>,
    /// The last fetch.
    pub page_key: FetchKey,
    /// Its page's host-physical address, and whether it is special.
    pub page: (u64, bool),
}

impl Decoded {
    /// The instruction at `rip` if it is known and its bytes are still these; `available` is how
    /// many of the bytes count.
    #[inline]
    #[must_use]
    pub fn find(
        &self,
        rip: u64,
        bits: u8,
        bytes: (u64, u64),
        available: usize,
    ) -> Option<(Instruction, Execute)> {
        let s = self.slots.as_ref()?.get(rip as usize % SLOTS)?;
        let keep = KEEP[s.length as usize & 15];
        let same = s.rip == rip
            && s.bits == bits
            && s.bytes == (bytes.0 & keep.0, bytes.1 & keep.1)
            && s.length as usize <= available;
        if same { s.execute.map(|execute| (s.insn, execute)) } else { None }
    }

    /// Remember an instruction.
    pub fn keep(&mut self, bits: u8, bytes: (u64, u64), insn: &Instruction, execute: Execute) {
        if self.slots.is_none() {
            self.slots = Zeroed::new(SLOTS).ok();
        }
        let Some(slots) = &mut self.slots else { return };
        let (rip, length) = (insn.ip(), insn.len());
        let mask = KEEP[length & 15];
        slots[rip as usize % SLOTS] = Slot {
            rip,
            bytes: (bytes.0 & mask.0, bytes.1 & mask.1),
            length: length as u8,
            bits,
            insn: *insn,
            execute: Some(execute),
        };
    }
}

/// What a decoder says of some bytes.
pub enum Verdict {
    /// An instruction.
    Instruction(Instruction),
    /// More bytes are needed.
    Incomplete,
    /// No instruction (#UD).
    Undefined,
    /// Longer than 15 bytes (#GP).
    TooLong,
}

/// Decode one instruction.
#[must_use]
pub fn decode(bits: u8, rip: u64, bytes: &[u8]) -> Verdict {
    let mut decoder = Decoder::with_ip(u32::from(bits), bytes, rip, DecoderOptions::NONE);
    let mut insn = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => {
            pointers::tag(&mut insn, bits, bytes);
            Verdict::Instruction(insn)
        }
        DecoderError::NoMoreBytes if bytes.len() < MAX_LENGTH => Verdict::Incomplete,
        DecoderError::NoMoreBytes => Verdict::TooLong,
        _ => again_as_nop(bits, rip, bytes),
    }
}

/// 0F 18 … 0F 1F are hints to processors that know them and do nothing on the others.
fn again_as_nop(bits: u8, rip: u64, bytes: &[u8]) -> Verdict {
    let mut decoder = Decoder::with_ip(u32::from(bits), bytes, rip, DecoderOptions::FORCE_RESERVED_NOP);
    let insn = decoder.decode();
    match decoder.last_error() {
        DecoderError::None if insn.mnemonic() == Mnemonic::Reservednop => Verdict::Instruction(insn),
        _ => undefined_encoding(bits, rip, bytes),
    }
}

/// No instruction: but it may be too long to be found out, or not be all there.
fn undefined_encoding(bits: u8, rip: u64, bytes: &[u8]) -> Verdict {
    // (A LOCK where there may be none.)
    let mut decoder = Decoder::with_ip(u32::from(bits), bytes, rip, DecoderOptions::NO_INVALID_CHECK);
    let insn = decoder.decode();
    let length = match decoder.last_error() {
        DecoderError::None => insn.len(),
        DecoderError::NoMoreBytes => bytes.len() + 1,
        _ => undefined::length(bits, bytes),
    };
    match length {
        n if n <= bytes.len() => Verdict::Undefined,
        _ if bytes.len() < MAX_LENGTH => Verdict::Incomplete,
        _ => Verdict::TooLong,
    }
}

fn no_instruction(_core: &mut Core, _insn: &Instruction) -> Exec<()> {
    Err(ud())
}

/// Who executes an instruction.
#[must_use]
pub fn route(insn: &Instruction) -> Execute {
    use Mnemonic::*;
    match insn.mnemonic() {
        Mov | Push | Pop if has_system_register(insn) => system::execute,
        Call | Jmp if is_far(insn) => far::execute,
        Retf | Iret | Iretd | Iretq | Int | Int1 | Int3 | Into => far::execute,
        Mov => mov::mov,
        Movzx | Movsx | Movsxd | Movnti | Lea | Xchg | Bswap | Movbe | Xlatb | Salc | Cbw | Cwde | Cdqe
        | Cwd | Cdq | Cqo | Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle
        | Cmovne | Cmovno | Cmovnp | Cmovns | Cmovo | Cmovp | Cmovs | Seta | Setae | Setb | Setbe | Sete
        | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns | Seto | Setp | Sets => mov::execute,
        Add | Adc | Sub | Sbb | Cmp | Inc | Dec | Neg | Mul | Imul | Div | Idiv | Xadd | Cmpxchg
        | Cmpxchg8b | Cmpxchg16b | Daa | Das | Aaa | Aas | Aam | Aad => arith::execute,
        And | Or | Xor | Not | Test | Clc | Stc | Cmc | Cld | Std | Lahf | Sahf => logic::execute,
        Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar | Shld | Shrd => shift::execute,
        Bt | Bts | Btr | Btc | Bsf | Bsr | Tzcnt | Lzcnt | Popcnt | Crc32 | Andn | Bextr | Blsi | Blsmsk
        | Blsr | Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Adcx | Adox
            if !is_xop(insn) =>
        {
            bits::execute
        }
        Push | Pop | Pusha | Pushad | Popa | Popad | Enter | Leave => stack::execute,
        Movsb | Movsw | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd | Lodsq | Scasb
        | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsq => string::execute,
        // MOVSD and CMPSD name SSE2 instructions too.
        Movsd | Cmpsd if insn.is_string_instruction() => string::execute,
        Jmp | Call | Ret | Ja | Jae | Jb | Jbe | Je | Jg | Jge | Jl | Jle | Jne | Jno | Jnp | Jns | Jo
        | Jp | Js | Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz | Bound | Nop | Reservednop | Endbr32
        | Endbr64 | Prefetch | Prefetchit0 | Prefetchit1 | Prefetchnta | Prefetcht0 | Prefetcht1
        | Prefetcht2 | Prefetchw | Prefetchwt1 | Clflush | Clflushopt | Clwb | Cldemote | Lfence | Mfence
        | Sfence | Serialize => control::execute,
        // Without shadow stacks this is one of the hints that do nothing.
        Rdsspd | Rdsspq => control::execute,
        Ud0 | Ud1 | Ud2 => no_instruction,
        Wait => vector::execute,
        _ if is_vector(insn) => vector::execute,
        _ => system::execute,
    }
}

fn is_xop(insn: &Instruction) -> bool {
    insn.encoding() == EncodingKind::XOP
}

fn is_far(insn: &Instruction) -> bool {
    insn.is_call_far() || insn.is_jmp_far() || insn.is_call_far_indirect() || insn.is_jmp_far_indirect()
}

fn has_system_register(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        let r = insn.op_register(i);
        insn.op_kind(i) == OpKind::Register
            && (r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr())
    })
}

/// Everything of the x87, MMX and SSE, and all that is encoded with VEX and its kin.
fn is_vector(insn: &Instruction) -> bool {
    use CpuidFeature::*;
    insn.encoding() != EncodingKind::Legacy
        || (0..insn.op_count()).any(|i| {
            let r = insn.op_register(i);
            insn.op_kind(i) == OpKind::Register
                && (r.is_xmm() || r.is_ymm() || r.is_zmm() || r.is_mm() || r.is_st())
        })
        || insn.cpuid_features().iter().any(|f| {
            matches!(
                f,
                FPU | FPU287
                    | FPU287XL_ONLY
                    | FPU387
                    | FPU387SL_ONLY
                    | MMX
                    | SSE
                    | SSE2
                    | SSE3
                    | SSSE3
                    | SSE4_1
                    | SSE4_2
                    | SSE4A
                    | AES
                    | PCLMULQDQ
                    | SHA
                    | FXSR
                    | GFNI
                    | D3NOW
                    | D3NOWEXT
            )
        })
}
