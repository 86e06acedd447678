//! Generate, run on both sides, compare; make a difference small.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, Mnemonic, NasmFormatter, OpKind};
use silicon::dbt::promotion::Windows;
use silicon::features::is_amd;
use silicon::processor::EngineKind;

use crate::areas;
use crate::case::*;
use crate::computer::{BATCH, Computer, has_bases};
use crate::generate::{self, Generator, Piece};
use crate::machine::Machine;
use crate::makers::{self, is_masked_by_bytes};
use crate::values;

/// Starts of one program.
const VARIANTS: usize = 4;

/// Batches after which windows are closed, so that another program decides which kind is opened.
const RENEWAL: u64 = 16;

pub struct Options {
    pub seed: u64,
    pub instructions: u64,
    /// The first batch.
    pub first: u64,
    pub engine: EngineKind,
    /// Bytes that it has for code.
    pub code_bytes: usize,
    /// How many of 100 programs are 64-bit code; the others are 32-bit code.
    pub wide: u64,
    /// Compare with the reference engine, not with this computer.
    pub with_reference: bool,
    /// How many of 100 forms are encoded with VEX and work on AVX state.
    pub vex: u64,
    /// Differences to report before giving up.
    pub patience: usize,
    /// Which programs access memory in windows.
    pub windows: Windows,
}

pub struct Summary {
    pub batches: u64,
    pub cases: u64,
    pub instructions: u64,
    /// How often a case ended with each vector.
    pub endings: [u64; 32],
    pub differences: Vec<String>,
    /// What the engine counted.
    pub statistics: Vec<(&'static str, u64)>,
}

struct Program {
    pieces: Vec<Piece>,
    at: u64,
}

/// Who knows what has to come out.
enum Oracle {
    Computer(Computer),
    Reference(Machine),
}

impl Oracle {
    /// What is different, in words: the oracle's value first.
    fn compare(&self, s: &Start, theirs: &Outcome, ours: &Outcome) -> Vec<String> {
        match self {
            Oracle::Computer(_) => compare(s, theirs, ours),
            Oracle::Reference(_) => compare_all(theirs, ours),
        }
    }

    fn run(&mut self, memory: &[u64], starts: &[Start]) -> std::io::Result<Vec<Outcome>> {
        match self {
            Oracle::Computer(computer) => Ok(computer.run(memory, starts)?.to_vec()),
            Oracle::Reference(machine) => {
                machine.fill(memory);
                Ok(starts.iter().map(|s| machine.run(s, memory, &mut 0)).collect())
            }
        }
    }
}

struct Session {
    oracle: Oracle,
    machine: Machine,
    generator: Generator,
    executed: u64,
}

/// Fuzz.
///
/// # Errors
/// If the computer refuses processes or memory.
pub fn run(options: &Options) -> std::io::Result<Summary> {
    let mut session = Session {
        oracle: if options.with_reference {
            Oracle::Reference(Machine::new(EngineKind::Reference, 0)?)
        } else {
            Oracle::Computer(Computer::new()?)
        },
        machine: Machine::new(options.engine, options.code_bytes)?,
        generator: Generator::new(options.with_reference || has_bases(), options.with_reference, options.vex),
        executed: 0,
    };
    let mut sum = Summary {
        batches: 0,
        cases: 0,
        instructions: 0,
        endings: [0; 32],
        differences: Vec::new(),
        statistics: Vec::new(),
    };
    session.machine.use_windows(options.windows);
    for batch in options.first.. {
        let (memory, programs, mut starts) = session.batch(options, batch);
        if batch % RENEWAL == 0 {
            session.machine.use_windows(options.windows);
        }
        session.machine.fill(&memory);
        let mut ours = Vec::with_capacity(starts.len());
        for start in &mut starts {
            let outcome = session.machine.run(start, &memory, &mut session.executed);
            if outcome.vector == RUNAWAY {
                start.forget(); // a loop: the computer might never come back
            }
            ours.push(outcome);
        }
        let native = session.oracle.run(&memory, &starts)?;
        let mut blamed = usize::MAX;
        for (i, start) in starts.iter().enumerate() {
            if let Some(n) = sum.endings.get_mut(native[i].vector as usize) {
                *n += 1;
            }
            if ours[i].vector == RUNAWAY || blamed == i / VARIANTS {
                continue;
            }
            let found = session.oracle.compare(start, &native[i], &ours[i]);
            if found.is_empty() {
                continue;
            }
            // The pointers may have been lost on the way: only what comes twice counts.
            if any(start, makers::has_pointers) && session.differs(&memory, start)?.0.is_empty() {
                continue;
            }
            blamed = i / VARIANTS;
            let report = session.explain(&memory, &programs[i / VARIANTS], start, &found)?;
            sum.differences.push(format!("--seed {} --first {batch} (case {i})\n{report}", options.seed));
            if sum.differences.len() >= options.patience {
                break;
            }
        }
        sum.batches += 1;
        sum.cases += starts.len() as u64;
        sum.instructions = session.executed;
        if session.executed >= options.instructions || sum.differences.len() >= options.patience {
            break;
        }
    }
    sum.statistics = session.machine.statistics();
    Ok(sum)
}

impl Session {
    fn batch(&self, options: &Options, batch: u64) -> (Vec<u64>, Vec<Program>, Vec<Start>) {
        let mut rng = Rng::new(options.seed, batch);
        let memory = values::memory(&mut rng);
        let (mut programs, mut starts) = (Vec::new(), Vec::new());
        while starts.len() < BATCH {
            let bits = if rng.percent(options.wide) { 64 } else { 32 };
            let pieces = self.generator.program(&mut rng, bits);
            let room = (CODE_PAGES * PAGE - CODE_BYTES) as u64;
            let at = CODE + if rng.percent(30) { 4096 - rng.below(60) } else { rng.below(room) };
            let Some(code) = generate::assemble(&pieces, at) else { continue };
            for _ in 0..VARIANTS {
                starts.push(self.generator.start(&mut rng, bits, &code, at));
            }
            programs.push(Program { pieces, at });
        }
        (memory, programs, starts)
    }

    fn differs(&mut self, memory: &[u64], s: &Start) -> std::io::Result<(Vec<String>, Outcome)> {
        let ours = self.machine.run(s, memory, &mut 0);
        if ours.vector == RUNAWAY {
            return Ok((Vec::new(), Outcome::NOTHING));
        }
        let native = self.oracle.run(memory, std::slice::from_ref(s))?[0];
        Ok((self.oracle.compare(s, &native, &ours), native))
    }

    /// Leave out instructions while the difference stays, then describe it.
    fn explain(
        &mut self,
        memory: &[u64],
        program: &Program,
        start: &Start,
        found: &[String],
    ) -> std::io::Result<String> {
        let with = |pieces: &[Piece]| {
            let code = generate::assemble(pieces, program.at)?;
            let mut s = *start;
            s.code = [0xCC; CODE_BYTES];
            s.code[..code.len()].copy_from_slice(&code);
            s.code_len = code.len() as u64;
            Some(s)
        };
        let mut pieces = program.pieces.clone();
        let mut small = *start;
        let mut i = 0;
        while i < pieces.len() {
            let mut fewer = pieces.clone();
            fewer.remove(i);
            match with(&fewer) {
                Some(s) if !self.differs(memory, &s)?.0.is_empty() => (pieces, small) = (fewer, s),
                _ => i += 1,
            }
        }
        let (lines, native) = self.differs(memory, &small)?;
        let mut text = String::new();
        if lines.is_empty() {
            let _ = writeln!(text, "  (only after what ran before it: not reproduced alone)");
        }
        describe(&mut text, &small, &native);
        for line in if lines.is_empty() { found } else { &lines } {
            let _ = writeln!(text, "  {line}");
        }
        Ok(text)
    }
}

pub fn describe(text: &mut String, s: &Start, native: &Outcome) {
    let code = &s.code[..s.code_len as usize];
    let mut decoder = Decoder::with_ip(s.bits(), code, s.rip, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    while decoder.can_decode() {
        let at = decoder.position();
        let insn = decoder.decode();
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let hex: String = code[at..at + insn.len()].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "  {}: {:x}  {hex:24} {line}", s.bits(), insn.ip());
    }
    let names = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let gprs: Vec<String> = names.iter().zip(s.gpr).map(|(n, v)| format!("{n}={v:x}")).collect();
    let _ = writeln!(text, "  before: {}", gprs.join(" "));
    let word = |at: usize| u16::from_le_bytes([s.fx.0[at], s.fx.0[at + 1]]);
    let _ = writeln!(
        text,
        "  flags={:x} fs={:x} gs={:x} fcw={:x} fsw={:x} ftw={:x} mxcsr={:x}",
        s.rflags,
        s.fs_base,
        s.gs_base,
        word(0),
        word(2),
        s.fx.0[4],
        word(24)
    );
    let _ = writeln!(
        text,
        "  the computer ends with vector {} error {:x} at {:x} cr2 {:x}",
        native.vector, native.error, native.rip, native.cr2
    );
}

/// What is different at all, in words.
fn compare_all(theirs: &Outcome, ours: &Outcome) -> Vec<String> {
    let mut out = Vec::new();
    let mut check = |name: &str, a: u64, b: u64| {
        if a != b {
            out.push(format!("{name}: {a:x}, engine {b:x}"));
        }
    };
    check("vector", theirs.vector.into(), ours.vector.into());
    check("error code", theirs.error.into(), ours.error.into());
    check("rip", theirs.rip, ours.rip);
    check("cr2", theirs.cr2, ours.cr2);
    check("rflags", theirs.rflags, ours.rflags);
    for i in 0..16 {
        check(&format!("gpr {i}"), theirs.gpr[i], ours.gpr[i]);
    }
    for (i, (a, b)) in theirs.fx.0.iter().zip(ours.fx.0).enumerate() {
        check(&format!("fxsave {i}"), (*a).into(), b.into());
    }
    for (i, (a, b)) in theirs.upper.as_flattened().iter().zip(ours.upper.as_flattened()).enumerate() {
        check(&format!("upper half {}, byte {}", i / 16, i % 16), (*a).into(), (*b).into());
    }
    for (a, b) in theirs.pointers.iter().zip(ours.pointers) {
        check("a pointer of the x87", *a, b);
    }
    check("words of memory changed", theirs.changed, ours.changed);
    for (a, b) in theirs.changes().iter().zip(ours.changes()) {
        check("address of a change", address_of(a.0), address_of(b.0));
        check(&format!("[{:x}]", address_of(a.0)), a.1, b.1);
    }
    out
}

/// What is different, in words: the computer's value first.
pub fn compare(s: &Start, native: &Outcome, ours: &Outcome) -> Vec<String> {
    if native.vector == RUNAWAY {
        return Vec::new();
    }
    let mut out = Vec::new();
    let mut check = |name: &str, a: u64, b: u64| {
        if a != b {
            out.push(format!("{name}: {a:x}, machine {b:x}"));
        }
    };
    let is_64 = s.bits() == 64;
    // Bit 17 of MXCSR exists on AMD's processors.
    let takes_mxcsr = |i: &Instruction| {
        matches!(
            i.mnemonic(),
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Fxrstor | Mnemonic::Fxrstor64
        ) || areas::restores(i)
    };
    // A fault in the middle of PUSHA or POPA: the processors leave what was done, we undo it.
    let is_partial = |i: &Instruction| {
        matches!(i.mnemonic(), Mnemonic::Pusha | Mnemonic::Pushad | Mnemonic::Popa | Mnemonic::Popad)
    };
    if native.vector == 14 && ours.vector == 14 && native.cr2 == ours.cr2 && any(s, is_partial) {
        return Vec::new();
    }
    // AMD's processors try the words of a long operand each for itself, also one that wraps at 4 GBytes.
    let is_at_end = !is_64 && native.vector == 14 && native.cr2.wrapping_add(0x200) as u32 <= 0x400;
    let is_lax = any(s, takes_mxcsr)
        || is_at_end
            && (has_long_operand(s) || any(s, |i| is_masked_by_bytes(i) || i.memory_size().size() == 10));
    if is_lax && matches!(ours.vector, 12 | 13) && (native.vector != 13 || native.rip != ours.rip) {
        return Vec::new();
    }
    // Of two faults that one instruction has, no manual says which comes first.
    let compares = |i: &Instruction| {
        use Mnemonic as M;
        matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq) && i.is_string_instruction()
    };
    let is_either = match (native.vector, ours.vector) {
        (13, 12) if any(s, takes_mxcsr) => true,
        (12..=14 | 17, 12..=14 | 17) if any(s, compares) => true,
        (17, 12..=14) if any(s, is_masked_by_bytes) => true,
        // One that is misaligned, and would wrap at 4 GBytes.
        (17, 12 | 13) | (13, 12) => !is_64 && has_long_operand(s),
        _ => false,
    };
    if is_either && native.rip == ours.rip {
        return Vec::new();
    }
    if !is_amd() && makers::excuse(s, native, ours) {
        return Vec::new();
    }
    check("vector", native.vector.into(), ours.vector.into());
    check("rip", native.rip, ours.rip);
    if native.vector == ours.vector && native.vector != 1 {
        // For addresses of the kernel Linux says "protection", whatever the tables say.
        let is_kernels = native.cr2 >= 0x7FFF_FFFF_F000;
        let hidden = u32::from(is_kernels || has_long_operand(s));
        check("error code", (native.error | hidden).into(), (ours.error | hidden).into());
        // Of a long operand AMD's processors try the last byte first, Intel's go in order.
        if !has_long_operand(s) {
            check("cr2", native.cr2, ours.cr2);
        }
    }
    // What a string instruction that was cut short, with addresses of 32 bits, leaves in the upper halves.
    let is_short = !is_amd()
        && any(s, |i| {
            use OpKind as K;
            let is = |kind| matches!(kind, K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI);
            i.op_kinds().any(is) && (i.has_rep_prefix() || i.has_repne_prefix())
        });
    for i in 0..16 {
        if is_64 || i < 8 {
            let is_narrow = !is_64 || is_short && matches!(i, 1 | 6 | 7);
            let mask = if is_narrow { 0xFFFF_FFFF } else { u64::MAX };
            check(&format!("gpr {i}"), native.gpr[i] & mask, ours.gpr[i] & mask);
        }
    }
    // At a fault in the middle the manual wants the flags as before, AMD's processors vary.
    let repeats = |i: &Instruction| {
        i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()) && i.rflags_modified() != 0
    };
    let is_cut = native.vector >= 12 || native.vector == 1 && !is_amd();
    if !is_cut || !any(s, repeats) {
        check("rflags", native.rflags & FLAGS, ours.rflags & FLAGS);
    }
    let (a, mut b) = (&native.fx.0, &ours.fx.0);
    if matches!(native.vector, 12..=17) && any(s, makers::is_eager) {
        b = a;
    }
    let word = |b: &[u8; 512], at: usize| u64::from(u16::from_le_bytes([b[at], b[at + 1]]));
    let long = |b: &[u8; 512], at: usize| b[at..at + 8].iter().rev().fold(0, |v, x| v << 8 | u64::from(*x));
    check("fcw", word(a, 0), word(b, 0));
    check("fsw", word(a, 2), word(b, 2));
    check("ftw", a[4].into(), b[4].into());
    check("mxcsr", word(a, 24), word(b, 24));
    for i in 0..8 {
        let at = 32 + 16 * i;
        check(&format!("st{i} exponent"), word(a, at + 8), word(b, at + 8));
        check(&format!("st{i} mantissa"), long(a, at), long(b, at));
    }
    for i in 0..if is_64 { 32 } else { 16 } {
        check(&format!("xmm{}.{}", i / 2, i % 2), long(a, 160 + 8 * i), long(b, 160 + 8 * i));
    }
    for i in 0..if is_64 { 16 } else { 8 } {
        let half = |upper: &Upper, at: usize| {
            upper[i][at..at + 8].iter().rev().fold(0, |v, x| v << 8 | u64::from(*x))
        };
        for at in [0, 8] {
            check(&format!("ymm{i}.{}", 2 + at / 8), half(&native.upper, at), half(&ours.upper, at));
        }
    }
    // (The mask of MXCSR, as it is stored, has that bit 17.)
    let mask = if any(s, makers::has_mask) { 1 << 49 } else { 0 };
    check("words of memory changed", native.changed, ours.changed);
    for (x, y) in native.changes().iter().zip(ours.changes()) {
        check("address of a change", address_of(x.0), address_of(y.0));
        let masked = if x.1 ^ y.1 == mask { mask } else { 0 };
        check(&format!("[{:x}]", address_of(x.0)), x.1 ^ masked, y.1);
    }
    out
}

pub fn any(s: &Start, test: impl Fn(&Instruction) -> bool) -> bool {
    let code = &s.code[..s.code_len as usize];
    Decoder::with_ip(s.bits(), code, s.rip, DecoderOptions::NONE).iter().any(|i| test(&i))
}

fn has_long_operand(s: &Start) -> bool {
    any(s, |i| {
        i.memory_size().size() > 10 && i.memory_size().size() != 16
            || i.mnemonic() == Mnemonic::Fxrstor
            || i.mnemonic() == Mnemonic::Fxrstor64
            || areas::is_area(i)
            || makers::has_mask(i)
            || makers::has_pointers(i)
    })
}
