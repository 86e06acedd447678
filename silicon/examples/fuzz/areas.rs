//! The XSAVE feature set in programs.  This computer has components that the machine has not, so EDX:EAX,
//! ECX and what XGETBV leaves are put where the two are alike.

use iced_x86::{Instruction, MemorySize, Mnemonic};

use crate::case::*;

/// Whether it saves or restores an area, and this computer has it.
pub fn is_area(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Xsave | Xsave64 | Xrstor | Xrstor64 => is_x86_feature_detected!("xsave"),
        Xsaveopt | Xsaveopt64 => is_x86_feature_detected!("xsaveopt"),
        Xsavec | Xsavec64 => is_x86_feature_detected!("xsavec"),
        _ => false,
    }
}

/// Whether it restores one.
pub fn restores(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64)
}

/// Whether its operand is one.
pub fn has_area(insn: &Instruction) -> bool {
    matches!(insn.memory_size(), MemorySize::Xsave | MemorySize::Xsave64)
}

/// MOV EAX, components; XOR EDX, EDX; an instruction with an area.  Or MOV ECX; XGETBV; AND EAX, 3.
/// How many bytes, and whether it restores; what it tells or stores otherwise differs between makers.
pub fn piece(rng: &mut Rng, bits: u32) -> ([u8; 15], usize, bool) {
    let mut b: Vec<u8> = Vec::with_capacity(15);
    let has_optimized = is_x86_feature_detected!("xsaveopt") && is_x86_feature_detected!("xsavec");
    let which = rng.below(if has_optimized { 8 } else { 4 });
    if which == 0 {
        b.push(0xB9);
        // XCR0, XINUSE where there is that, and registers that there are not.
        b.extend((rng.below(if has_optimized { 4 } else { 1 }) as u32).to_le_bytes());
        b.extend([0x0F, 0x01, 0xD0, 0x83, 0xE0, 3]);
    } else {
        b.push(0xB8);
        b.extend((rng.below(4) as u32).to_le_bytes());
        b.extend([0x31, 0xD2]);
        if bits == 64 && rng.percent(60) {
            b.push(0x48);
        }
        let (opcode, group) =
            [(0xAE, 5), (0xAE, 5), (0xAE, 4), (0xAE, 4), (0xAE, 6), (0xC7, 4), (0xC7, 4)][which as usize - 1];
        let base = rng.pick(&[3, 5, 6, 7]);
        b.extend([
            0x0F,
            opcode,
            0x40 | group << 3 | base,
            if rng.percent(90) { 0 } else { rng.next() as u8 },
        ]);
    }
    let mut bytes = [0; 15];
    bytes[..b.len()].copy_from_slice(&b);
    (bytes, b.len(), matches!(which, 1 | 2))
}

/// Give lines of the memory what the parts of an area may have: an MXCSR, or a header.
pub fn prepare(rng: &mut Rng, memory: &mut [u64]) {
    for line in memory.chunks_exact_mut(8) {
        match rng.below(10) {
            0..3 => {
                line.fill(0);
                line[0] = rng.below(4);
                if rng.percent(30) {
                    line[1] = rng.pick(&[1 << 63, 1 << 63 | 1, 1 << 63 | 2, 1 << 63 | 3]);
                } else if rng.percent(5) {
                    line[rng.below(8) as usize] = 1 << rng.below(64);
                }
            }
            3..6 => line[3] = line[3] & !0xFFFF_FFFF | 0x1F80 | rng.next() & 0xE07F,
            _ => {}
        }
    }
}
