//! Random programs: a form from the decoder's own tables, random everything else, decoded again.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, MandatoryPrefix,
    Mnemonic, OpCodeTableKind, OpKind, Register,
};

use silicon::cpu::pointers;
use silicon::features::is_amd;

use crate::areas;
use crate::case::*;
use crate::makers::{differs_by_maker, has_mask, is_lax_on_amd, is_the_makers, is_vague};
use crate::values::{fill_fx, fill_upper, pointer, value};
use crate::vex;

/// One instruction of a program.
#[derive(Clone, Copy)]
pub struct Piece {
    bytes: [u8; 15],
    len: usize,
    /// A branch: place and size of its displacement, and a number that chooses its target.
    branch: Option<(usize, usize, u64)>,
    /// Relative to RIP: place of the displacement, and the address meant.
    relative: Option<(usize, u64)>,
    /// Stores something that differs between processors.
    is_last: bool,
    /// May leave a state component as it is after reset: whether it is then in use is the processor's choice.
    resets: bool,
}

/// A way to encode an instruction.
struct Form {
    legacy: Vec<u8>,
    escape: Vec<u8>,
    opcode: Vec<u8>,
    group: i32,
    rm_group: i32,
    wide: bool,
    vex: Option<vex::Prefix>,
}

pub struct Generator {
    /// For 32-bit and 64-bit code: integer, x87, vector forms, and those of AVX.
    forms: [[Vec<Form>; 4]; 2],
    /// How many of 100 forms are of AVX.
    pub vex: u64,
    /// Whether FS and GS bases can be set.
    pub has_bases: bool,
    /// Let 32-bit code have segments that Linux does not give it.
    pub has_segments: bool,
    is_amd: bool,
}

/// Whether the machine and this computer both have the instruction, and a program may use it
/// without an operating system.
fn is_allowed(insn: &Instruction) -> bool {
    use CpuidFeature::*;
    let known = insn.cpuid_features().iter().all(|f| match f {
        INTEL8086 | INTEL8086_ONLY | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | FPU | FPU287
        | FPU387 | MMX | CMOV | SSE | SSE2 | FXSR | CX8 | MULTIBYTENOP | CLFSH | PAUSE => true,
        CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        SSE3 => is_x86_feature_detected!("sse3"),
        SSSE3 => is_x86_feature_detected!("ssse3"),
        SSE4_1 => is_x86_feature_detected!("sse4.1"),
        SSE4_2 => is_x86_feature_detected!("sse4.2"),
        POPCNT => is_x86_feature_detected!("popcnt"),
        AES => is_x86_feature_detected!("aes"),
        PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        SHA => is_x86_feature_detected!("sha"),
        BMI1 => is_x86_feature_detected!("bmi1"),
        BMI2 => is_x86_feature_detected!("bmi2"),
        ADX => is_x86_feature_detected!("adx"),
        LZCNT => is_x86_feature_detected!("lzcnt"),
        MOVBE => is_x86_feature_detected!("movbe"),
        PREFETCHW => true,
        f => vex::has(*f),
    });
    known && !needs_system(insn) && !differs_by_maker(insn)
}

/// A repeat prefix, which LOOPE and LOOPNE take for their own condition on some processors.
fn has_repeat(raw: &[u8]) -> bool {
    raw.iter().any(|b| matches!(b, 0xF2 | 0xF3))
}

fn needs_system(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let to_segment = |i: u32| {
        insn.op_kind(i) == OpKind::Register
            && (insn.op_register(i).is_segment_register()
                || insn.op_register(i).is_cr()
                || insn.op_register(i).is_dr()
                || insn.op_register(i).is_tr())
    };
    matches!(
        insn.mnemonic(),
        Int | Int1
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Lds
            | Les
            | Lfs
            | Lgs
            | Lss
            | Lar
            | Lsl
            | Verr
            | Verw
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lgdt
            | Lidt
            | Lldt
            | Ltr
            | Lmsw
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Cli
            | Sti
            | Hlt
            | Syscall
            | Sysenter
            | Sysexit
            | Sysret
            | Sysexitq
            | Sysretq
            | Cpuid
            | Rdtsc
            | Rdpmc
            | Rdmsr
            | Wrmsr
            | Invd
            | Wbinvd
            | Invlpg
            | Clts
            | Rsm
            | Fnstdw
            | Fnstsg
            | Fstdw
            | Fstsg
            | Loadall
            | Monitor
            | Mwait
            | Swapgs
    ) || insn.flow_control() == FlowControl::Interrupt && insn.mnemonic() != Int3 && insn.mnemonic() != Into
        || matches!(insn.flow_control(), FlowControl::UnconditionalBranch | FlowControl::Call)
            && matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || insn.is_jmp_far_indirect()
        || insn.is_call_far_indirect()
        || insn.op_count() > 0 && to_segment(0) && !matches!(insn.mnemonic(), Push)
        || insn.op_count() > 1 && to_segment(1) && insn.mnemonic() != Mov
}

fn form_of(code: Code, bits: u32) -> Option<(usize, Form)> {
    let o = code.op_code();
    let fits = if bits == 64 { o.mode64() } else { o.mode32() };
    if !o.is_instruction() || !fits || !o.cpl3() {
        return None;
    }
    let mut insn = Instruction::default();
    insn.set_code(code);
    let mut form = Form {
        legacy: Vec::new(),
        escape: Vec::new(),
        opcode: o.op_code().to_be_bytes()[4 - o.op_code_len() as usize..].to_vec(),
        group: o.group_index(),
        rm_group: o.rm_group_index(),
        wide: o.operand_size() == 64 && !o.default_op_size64(),
        vex: None,
    };
    let (escape, map): (&[u8], u8) = match o.table() {
        OpCodeTableKind::Normal => (&[], 0),
        OpCodeTableKind::T0F => (&[0x0F], 1),
        OpCodeTableKind::T0F38 => (&[0x0F, 0x38], 2),
        OpCodeTableKind::T0F3A => (&[0x0F, 0x3A], 3),
        _ => return None,
    };
    let (prefix, pp): (&[u8], u8) = match o.mandatory_prefix() {
        MandatoryPrefix::P66 => (&[0x66], 1),
        MandatoryPrefix::PF3 => (&[0xF3], 2),
        MandatoryPrefix::PF2 => (&[0xF2], 3),
        _ => (&[], 0),
    };
    match o.encoding() {
        EncodingKind::Legacy => {
            form.legacy.extend(prefix);
            form.escape.extend(escape);
            if o.operand_size() == 16 {
                form.legacy.push(0x66);
            }
        }
        EncodingKind::VEX => form.vex = Some(vex::Prefix { map, pp, w: o.w() as u8, l: o.l() as u8 }),
        _ => return None,
    }
    use CpuidFeature::*;
    let f = code.cpuid_features();
    let class = if f.iter().any(|f| vex::is_of(*f)) {
        3
    } else if f.iter().any(|f| matches!(f, FPU | FPU287 | FPU387)) {
        1
    } else {
        let vector = |f: &CpuidFeature| {
            matches!(f, MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA | FXSR)
        };
        if f.iter().any(vector) { 2 } else { 0 }
    };
    Some((class, form))
}

impl Generator {
    pub fn new(has_bases: bool, has_segments: bool, vex: u64) -> Self {
        let mut forms: [[Vec<Form>; 4]; 2] = Default::default();
        for (i, bits) in [(0, 32), (1, 64)] {
            for code in Code::values() {
                let mut probe = Instruction::default();
                probe.set_code(code);
                if let (true, Some((class, form))) = (is_allowed(&probe), form_of(code, bits)) {
                    forms[i][class].push(form);
                }
            }
        }
        let vex = if forms[1][3].is_empty() { 0 } else { vex };
        Self { forms, vex, has_bases, has_segments, is_amd: is_amd() }
    }

    /// A random program of 1 to 12 instructions.
    pub fn program(&self, rng: &mut Rng, bits: u32) -> Vec<Piece> {
        let n = 1 + rng.below(12) as usize;
        let mut pieces = Vec::with_capacity(n);
        while pieces.len() < n {
            let has_reset = pieces.iter().any(|p: &Piece| p.resets);
            let piece = self.piece(rng, bits, has_reset);
            pieces.push(piece);
            // Nothing may read what differs between processors.
            if piece.is_last {
                break;
            }
        }
        pieces
    }

    fn piece(&self, rng: &mut Rng, bits: u32, has_reset: bool) -> Piece {
        let has_areas = (self.is_amd || self.has_segments) && is_x86_feature_detected!("xsave");
        if has_areas && rng.percent(2) {
            let (bytes, len, resets) = areas::piece(rng, bits);
            if resets || !has_reset {
                return Piece { bytes, len, branch: None, relative: None, is_last: !resets, resets };
            }
        }
        loop {
            let mut raw = [0; 40];
            for chunk in raw.chunks_mut(8) {
                chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
            }
            if !rng.percent(8) {
                self.encode(rng, bits, &mut raw);
            }
            if let Some(piece) = self.accept(rng, bits, &raw[..15]) {
                return piece;
            }
        }
    }

    /// Put a random form in front of the random bytes.
    fn encode(&self, rng: &mut Rng, bits: u32, raw: &mut [u8; 40]) {
        let class = if rng.percent(self.vex) { 3 } else { rng.pick(&[0, 0, 0, 0, 0, 1, 2, 2, 2]) };
        let forms = &self.forms[usize::from(bits == 64)][class];
        let form = &forms[rng.below(forms.len() as u64) as usize];
        let mut b: Vec<u8> = Vec::with_capacity(24);
        for (chance, byte) in [(3, 0x66), (4, 0x67), (4, 0xF0), (2, 0xF2), (3, 0xF3)] {
            if rng.percent(chance) && (form.vex.is_none() || byte == 0x67) {
                b.push(byte);
            }
        }
        if rng.percent(if self.has_segments { 30 } else { 4 }) {
            b.push(rng.pick(&[0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65]));
        }
        let mut modrm = rng.next() as u8;
        let operand_is_memory = rng.percent(55);
        if operand_is_memory {
            modrm &= 0x7F | (rng.next() as u8 & 0x80);
            if modrm >> 6 == 3 {
                modrm &= 0x7F;
            }
        } else {
            modrm |= 0xC0;
        }
        if form.group >= 0 {
            modrm = modrm & !0x38 | (form.group as u8) << 3;
        }
        if form.rm_group >= 0 {
            modrm = 0xC0 | modrm & 0x38 | form.rm_group as u8;
        }
        if let Some(prefix) = form.vex {
            prefix.write(rng, bits, &mut b);
        } else {
            b.extend(&form.legacy);
            if bits == 64 && (form.wide || rng.percent(50)) {
                b.push(0x40 | rng.next() as u8 & 7 | if form.wide || rng.percent(40) { 8 } else { 0 });
            }
            b.extend(&form.escape);
        }
        b.extend(&form.opcode);
        if let Some(last) = b.last_mut() {
            // "+r" forms; others are then some other opcode, which is as good.
            if rng.percent(20) {
                *last ^= rng.next() as u8 & 7;
            }
        }
        b.push(modrm);
        if rng.percent(50) && b.len() + 1 < 15 && modrm & 7 == 4 {
            // a SIB byte without index is otherwise rare
            b.push(rng.next() as u8 & 0xC7 | 0x20);
        }
        raw[..b.len()].copy_from_slice(&b);
    }

    /// How many of some bytes are to be run as one encoding: the instruction's, or all if they are none; and
    /// whether that has to be where no length matters.  `None`: what they do here is no measure for the machine.
    pub fn comparable(&self, bits: u32, raw: &[u8]) -> Option<(usize, bool)> {
        let opcode = raw.iter().position(|&b| !pointers::is_prefix(b, bits as u8))?;
        // UD0 and UD1, of which the length differs; EXTRQ and INSERTQ; LOCK VERW, which is one for AMD.
        if matches!(raw[opcode..], [0x0F, 0x00 | 0x78 | 0xB9 | 0xFF, ..]) {
            return None;
        }
        let insn = Decoder::with_ip(bits, raw, CODE, DecoderOptions::NONE).decode();
        let amd = Decoder::with_ip(bits, raw, CODE, DecoderOptions::AMD).decode();
        if insn.is_invalid() {
            // How long VEX, EVEX and XOP encodings are that mean nothing, no manual says.
            let is_extended = matches!(raw[opcode], 0xC4 | 0xC5 | 0x62 | 0x8F);
            // So is a near branch with 66 in 64-bit code; 0F 01 with a register operand is the system's.
            let is_branch =
                bits == 64 && matches!(raw[opcode..], [0xE8 | 0xE9, ..] | [0x0F, 0x80..=0x8F, ..]);
            let is_system = matches!(raw[opcode..], [0x0F, 0x01, 0xC0..=0xFF, ..]);
            // Nor what some of their bits are to each processor.
            let is_open = raw[opcode] == 0x8F
                || vex::is_lax(&raw[opcode..])
                || is_extended && opcode > 2
                || is_branch && raw[..opcode].contains(&0x66)
                || is_system;
            return (amd.is_invalid() && !is_open).then_some((raw.len(), is_extended));
        }
        let may_run = areas::is_area(&insn) || self.may_run(&insn, raw);
        (amd == insn && may_run).then_some((insn.len(), false))
    }

    /// Whether the machine and this computer should do the same on it.
    fn may_run(&self, insn: &Instruction, raw: &[u8]) -> bool {
        let is_loop = matches!(insn.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne);
        is_allowed(insn)
            && !(self.is_amd && is_lax_on_amd(insn))
            && !(is_loop && has_repeat(&raw[..insn.len()]))
            && (self.is_amd || self.has_segments || !is_vague(insn) && !is_the_makers(insn))
            && (self.has_bases || !matches!(insn.segment_prefix(), Register::FS | Register::GS))
    }

    /// Take random bytes as an instruction if they may be run.
    fn accept(&self, rng: &mut Rng, bits: u32, raw: &[u8]) -> Option<Piece> {
        let mut decoder = Decoder::with_ip(bits, raw, CODE, DecoderOptions::NONE);
        let insn = decoder.decode();
        let mut piece = Piece {
            bytes: [0; 15],
            len: insn.len(),
            branch: None,
            relative: None,
            is_last: has_mask(&insn),
            resets: matches!(insn.mnemonic(), Mnemonic::Fninit | Mnemonic::Fnsave | Mnemonic::Vzeroall),
        };
        piece.bytes.copy_from_slice(raw);
        if insn.is_invalid() {
            let is_whole = decoder.last_error() == iced_x86::DecoderError::InvalidInstruction;
            let amd = Decoder::with_ip(bits, raw, CODE, DecoderOptions::AMD).decode();
            let is_lax = raw
                .iter()
                .position(|&b| !pointers::is_prefix(b, bits as u8))
                .is_none_or(|at| vex::is_lax(&raw[at..]));
            let is_fine = is_whole && amd.is_invalid() && !is_lax && insn.len() > 0;
            return (is_fine && rng.percent(1)).then_some(piece);
        }
        let amd = Decoder::with_ip(bits, raw, CODE, DecoderOptions::AMD).decode();
        if amd != insn || !self.may_run(&insn, raw) {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&insn);
        let is_near =
            matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
        if insn.op_count() > 0 && is_near {
            if insn.op0_kind() == OpKind::NearBranch16 {
                return None; // EIP is cut to 16 bits: leaves the code at once
            }
            piece.branch = Some((offsets.immediate_offset(), offsets.immediate_size(), rng.next()));
        } else if offsets.has_displacement() && offsets.displacement_size() >= 4 {
            self.aim(rng, &insn, &mut piece, offsets.displacement_offset(), offsets.displacement_size());
        }
        Some(piece)
    }

    /// Give a displacement a value that leads somewhere.
    fn aim(&self, rng: &mut Rng, insn: &Instruction, piece: &mut Piece, at: usize, size: usize) {
        if insn.is_ip_rel_memory_operand() {
            piece.relative = Some((at, pointer(rng)));
            return;
        }
        let v = if insn.memory_base() == Register::None && insn.memory_index() == Register::None {
            pointer(rng)
        } else if insn.memory_base() == Register::None {
            pointer(rng).wrapping_sub(rng.below(64))
        } else if rng.percent(90) {
            rng.below(0x2000).wrapping_sub(0x1000)
        } else {
            return;
        };
        piece.bytes[at..at + size].copy_from_slice(&v.to_le_bytes()[..size]);
    }

    /// Registers for a program: those that address memory point there.
    pub fn start(&self, rng: &mut Rng, bits: u32, code: &[u8], at: u64) -> Start {
        let mut s = Start {
            gpr: [0; 16],
            rip: at,
            cs: if bits == 64 { CS64 } else { CS32 },
            rflags: 0x202 | rng.next() & 0x8D5,
            rsp: 0,
            ss: SS,
            fs_base: 0,
            gs_base: 0,
            ds: if bits == 64 { 0 } else { SS },
            fx: Fx([0; 512]),
            upper: [[0; 16]; 16],
            code: [0xCC; CODE_BYTES],
            code_len: code.len() as u64,
            segments: [0; 5],
        };
        for (chance, flag) in [(10, 1 << 10), (3, 1 << 18)] {
            if rng.percent(chance) {
                s.rflags |= flag; // DF, AC
            }
        }
        s.code[..code.len()].copy_from_slice(code);
        for r in &mut s.gpr {
            *r = value(rng);
        }
        s.gpr[4] = (STACK + 0x800 + rng.below(0x1000)) & if rng.percent(85) { !7 } else { !0 };
        if bits == 64 {
            s.rip += rng.pick(&ALIASES);
            s.gpr[4] += if rng.percent(80) { ALIASES[2] } else { rng.pick(&ALIASES) };
        }
        fill_fx(rng, &mut s.fx);
        fill_upper(rng, &mut s.upper);
        let mut is_set = 0_u32;
        for insn in &mut Decoder::with_ip(bits, code, at, DecoderOptions::NONE) {
            aim_registers(rng, &mut s, &insn, &mut is_set);
            vex::aim(rng, &mut s, &insn);
        }
        if self.has_bases && bits == 64 {
            (s.fs_base, s.gs_base) = (pointer(rng), rng.pick(&[0, DATA, 0x40]));
        }
        if bits == 32 && self.has_segments {
            for (i, kind) in s.segments.iter_mut().enumerate() {
                *kind = if i < 3 && rng.percent(90) { 0 } else { rng.below(8) as u8 };
            }
            (s.fs_base, s.gs_base) = (DATA + 0x800, rng.pick(&[0, 0x40, 0xFFFF_FFF0, STACK]));
        }
        if bits == 32 {
            s.gpr.iter_mut().for_each(|r| *r &= 0xFFFF_FFFF);
        }
        s.rsp = s.gpr[4];
        s
    }
}

fn aim_registers(rng: &mut Rng, s: &mut Start, insn: &Instruction, is_set: &mut u32) {
    let is_64 = s.bits() == 64;
    let elsewhere = |rng: &mut Rng| if is_64 { rng.pick(&ALIASES) } else { 0 };
    let mut set = |r: Register, v: u64| {
        if r.is_gpr() && r != Register::RSP && r != Register::ESP {
            let n = r.full_register().number();
            if *is_set >> n & 1 == 0 {
                *is_set |= 1 << n;
                s.gpr[n] = v;
            }
        }
    };
    if areas::has_area(insn) {
        set(Register::RAX, rng.below(4));
        set(Register::RDX, 0);
    }
    if insn.is_string_instruction() || (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::MemorySegRDI) {
        set(Register::RSI, pointer(rng) + elsewhere(rng));
        set(Register::RDI, pointer(rng) + elsewhere(rng));
        set(Register::RCX, rng.below(40));
    }
    if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
        let displacement = if insn.memory_displ_size() > 1 { 0 } else { insn.memory_displacement64() };
        let has_base = insn.memory_base() != Register::None;
        let aligned = if areas::has_area(insn) && rng.percent(90) {
            !63
        } else if insn.memory_size().size() >= 16 && rng.percent(80) {
            if insn.memory_size().size() == 32 { !31 } else { !15 }
        } else {
            !0
        };
        let is_based = matches!(insn.segment_prefix(), Register::FS | Register::GS);
        let place = if is_based && rng.percent(50) {
            rng.below(64).wrapping_sub(32)
        } else {
            pointer(rng) + elsewhere(rng)
        };
        let base = (place & aligned).wrapping_sub(displacement);
        set(insn.memory_base(), base);
        let small = if aligned == !0 { rng.below(32).wrapping_sub(8) } else { (!aligned + 1) * rng.below(2) };
        set(insn.memory_index(), if has_base { small } else { small & 0xF });
    }
}

/// Put a program together at an address.  `None` if its bytes could make a system call.
pub fn assemble(pieces: &[Piece], at: u64) -> Option<Vec<u8>> {
    let mut starts = Vec::with_capacity(pieces.len() + 1);
    let mut n = 0;
    for p in pieces {
        starts.push(n);
        n += p.len;
    }
    starts.push(n);
    let mut code = Vec::with_capacity(n + 1);
    for (i, p) in pieces.iter().enumerate() {
        let mut bytes = p.bytes;
        let next = starts[i + 1];
        if let Some((offset, size, number)) = p.branch {
            // Now and then backwards: a loop, perhaps an endless one.
            let choice = number >> 8;
            let index = if number & 7 == 0 {
                (choice % (i + 1) as u64) as usize
            } else {
                i + 1 + (choice % (pieces.len() - i) as u64) as usize
            };
            let distance = starts[index].wrapping_sub(next) as u64;
            bytes[offset..offset + size].copy_from_slice(&distance.to_le_bytes()[..size]);
        }
        if let Some((offset, target)) = p.relative {
            let distance = target.wrapping_sub(at + next as u64);
            bytes[offset..offset + 4].copy_from_slice(&distance.to_le_bytes()[..4]);
        }
        code.extend(&bytes[..p.len]);
    }
    code.push(0xCC);
    let calls = |w: &[u8]| w[0] == 0xCD || w[0] == 0x0F && matches!(w[1], 5 | 0x34) || w[0] == 0xF1;
    (!code.windows(2).any(calls)).then_some(code)
}
