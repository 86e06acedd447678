//! Instructions encoded with VEX that work on AVX state.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, OpKind, Register};

use crate::case::*;

/// Whether a feature is one of AVX's.
pub fn is_of(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(feature, AVX | AVX2 | FMA | F16C)
}

/// Whether this computer has such a feature.
pub fn has(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    match feature {
        AVX => is_x86_feature_detected!("avx"),
        AVX2 => is_x86_feature_detected!("avx2"),
        FMA => is_x86_feature_detected!("fma"),
        F16C => is_x86_feature_detected!("f16c"),
        _ => false,
    }
}

/// Whether bytes that mean nothing may be an instruction to some processors all the same: because of the highest
/// bit of what names one of eight masks, VPERMQ and VPERMPD without W (AMD's), or a bit of EVEX.
pub fn is_lax(bytes: &[u8]) -> bool {
    match bytes {
        [0xC5, _, code, ..] | [0xC4, _, _, code, ..] if matches!(code, 0x41..=0x4B | 0x90..=0x93 | 0x98 | 0x99) => {
            true
        }
        [0xC4, map, _, 0 | 1, ..] => map & 0x1F == 3,
        [0x62, ..] => is_x86_feature_detected!("avx512f"),
        _ => false,
    }
}

/// What the prefix of a form says.
#[derive(Clone, Copy)]
pub struct Prefix {
    pub map: u8,
    pub pp: u8,
    pub w: u8,
    pub l: u8,
}

impl Prefix {
    /// Write the prefix, the rest of it random: of two bytes if it can be, now and then.
    pub fn write(self, rng: &mut Rng, bits: u32, b: &mut Vec<u8>) {
        let Self { map, pp, w, l } = self;
        let high = if bits == 64 { rng.next() as u8 & 0xE0 } else { 0xE0 };
        let vvvv = if rng.percent(40) { 0x78 } else { rng.next() as u8 & 0x78 };
        let vvvv = if bits == 64 { vvvv } else { vvvv | 0x40 };
        let last = vvvv | (l & 1) << 2 | pp;
        if map == 1 && w == 0 && rng.percent(40) {
            b.extend([0xC5, high & 0x80 | last]);
        } else {
            b.extend([0xC4, high | map, (w & 1) << 7 | last]);
        }
    }
}

/// Give a gather's indices values that lead somewhere, and its mask some of each sign; and the mask of a masked
/// move.
pub fn aim(rng: &mut Rng, s: &mut Start, insn: &Instruction) {
    if insn.encoding() != EncodingKind::VEX {
        return;
    }
    let mut set = |r: Register, at: usize, word: u64| {
        let half = match at {
            0 | 8 => &mut s.fx.0[160 + 16 * r.number() + at..][..8],
            _ => &mut s.upper[r.number()][at - 16..][..8],
        };
        half.copy_from_slice(&word.to_le_bytes());
    };
    if insn.is_vsib() {
        let is_far = rng.percent(10);
        for at in [0, 8, 16, 24] {
            let mut small = || rng.below(if is_far { 0x1000 } else { 64 }).wrapping_sub(16);
            let word = if insn.is_vsib64() { small() } else { small() << 32 | small() & 0xFFFF_FFFF };
            set(insn.memory_index(), at, word);
            set(insn.op2_register(), at, rng.next());
        }
    }
    let is_masked = insn.op_count() == 3
        && insn.op1_kind() == OpKind::Register
        && matches!(insn.code().op_code().op_code(), 0x2C..=0x2F | 0x8C | 0x8E);
    if is_masked && insn.op1_register().is_vector_register() {
        for at in [0, 8, 16, 24] {
            let word = rng.next();
            set(insn.op1_register(), at, if rng.percent(30) { 0 } else { word });
        }
    }
}
