//! Encodings as such: random prefixes, REX in every place, every map of opcodes, valid or not, up to
//! more bytes than an instruction may have; one instruction a case.
//!
//! Left out is what `generate` leaves out: instructions that need a system, that the machine does not have
//! and this computer has, and those that makers do differently (docs/reference/vendor-differences.md).

use std::fmt::Write;

use silicon::processor::EngineKind;

use crate::case::*;
use crate::computer::{BATCH, Computer, has_bases};
use crate::generate::Generator;
use crate::machine::Machine;
use crate::session::{Options, Summary, compare, describe};
use crate::values;

/// Bytes of an encoding: one more than an instruction may have.
pub const BYTES: usize = 16;
const TF: u64 = 1 << 8;

/// Random bytes with an instruction's structure.
fn random(rng: &mut Rng, bits: u32, vex: u64) -> [u8; BYTES] {
    let mut bytes = Vec::with_capacity(64);
    let count = match rng.below(16) {
        0..6 => 0,
        6..14 => rng.below(4),
        14 => rng.below(16),
        _ => 9 + rng.below(7),
    };
    for _ in 0..count {
        let rex = if bits == 64 { 0x40 | rng.next() as u8 & 15 } else { 0x66 };
        bytes.push(
            rng.pick(&[0x66, 0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, rex, rex]),
        );
    }
    match rng.below(20) {
        _ if rng.percent(vex) => bytes.push(rng.pick(&[0xC4, 0xC5])),
        0..9 => {}
        9..14 => bytes.push(0x0F),
        14..16 => bytes.extend([0x0F, 0x38]),
        16..18 => bytes.extend([0x0F, 0x3A]),
        18 => bytes.push(rng.pick(&[0xC4, 0xC5, 0xC4, 0xC5, 0x62, 0x8F])),
        _ => bytes.push(0xD8 | rng.next() as u8 & 7),
    }
    while bytes.len() < BYTES {
        bytes.extend(rng.next().to_le_bytes());
    }
    // (Displacements of four bytes should lead somewhere, now and then.)
    let mut out = [0; BYTES];
    out.copy_from_slice(&bytes[..BYTES]);
    out
}

/// One encoding, its registers, its place: in the middle, over the end of a page, or at the end of the code.
fn case(generator: &Generator, rng: &mut Rng, bits: u32, is_single: bool) -> Start {
    loop {
        let raw = random(rng, bits, generator.vex);
        let Some((length, is_inside)) = generator.comparable(bits, &raw) else { continue };
        let at = match rng.below(8) {
            _ if is_inside => CODE + 0x100,
            0 | 1 => CODE + PAGE as u64 - 1 - rng.below(16),
            2 => CODE + 2 * PAGE as u64 - 1 - rng.below(16),
            _ => CODE + 0x100,
        };
        let room = (CODE + (CODE_PAGES * PAGE) as u64 - at) as usize;
        let mut s = generator.start(rng, bits, &raw[..length.min(room)], at);
        if is_single {
            s.rflags |= TF;
        }
        return s;
    }
}

/// Fuzz.
///
/// # Errors
/// If the computer refuses processes or memory.
pub fn run(options: &Options) -> std::io::Result<Summary> {
    let mut computer = Computer::new()?;
    let mut machine = Machine::new(options.engine, options.code_bytes)?;
    machine.use_windows(options.windows);
    let generator = Generator::new(has_bases(), false, options.vex);
    let is_single = options.engine == EngineKind::Reference;
    let mut sum = Summary {
        batches: 0,
        cases: 0,
        instructions: 0,
        endings: [0; 32],
        differences: Vec::new(),
        statistics: Vec::new(),
    };
    for batch in options.first.. {
        let mut rng = Rng::new(options.seed, batch);
        let memory = values::memory(&mut rng);
        let mut starts: Vec<Start> = (0..BATCH)
            .map(|_| {
                let bits = if rng.percent(options.wide) { 64 } else { 32 };
                case(&generator, &mut rng, bits, is_single)
            })
            .collect();
        machine.fill(&memory);
        let mut ours = Vec::with_capacity(BATCH);
        for start in &mut starts {
            let outcome = machine.run(start, &memory, &mut 0);
            if outcome.vector == RUNAWAY {
                start.forget();
            }
            ours.push(outcome);
        }
        let native = computer.run(&memory, &starts)?.to_vec();
        for (i, start) in starts.iter().enumerate() {
            if let Some(n) = sum.endings.get_mut(native[i].vector as usize) {
                *n += 1;
            }
            if ours[i].vector == RUNAWAY || compare(start, &native[i], &ours[i]).is_empty() {
                continue;
            }
            // Once more: Linux drops the pointers of the x87 when it switches programs.
            let again = computer.run(&memory, std::slice::from_ref(start))?[0];
            let lines = compare(start, &again, &machine.run(start, &memory, &mut 0));
            if lines.is_empty() {
                continue;
            }
            let mut text = format!("--encodings {} --seed {} --first {batch} (case {i})\n", 1, options.seed);
            let hex: Vec<String> =
                start.code[..start.code_len as usize].iter().map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(text, "  {}", hex.join(" "));
            describe(&mut text, start, &again);
            let _ = writeln!(text, "  {}", lines.join("\n  "));
            sum.differences.push(text);
        }
        sum.batches += 1;
        sum.cases += BATCH as u64;
        sum.instructions = sum.cases;
        if sum.instructions >= options.instructions || sum.differences.len() >= options.patience {
            break;
        }
    }
    Ok(sum)
}
