//! Numbers with a point to them: addresses, integers, floating point of every kind.

use crate::areas;
use crate::case::*;

/// An address in or near the data.
pub fn pointer(rng: &mut Rng) -> u64 {
    let base = if rng.percent(85) { DATA } else { STACK };
    match rng.below(10) {
        0..6 => (base + rng.below(0x1FC0)) & rng.pick(&[!0, !15, !7, !3]),
        6..8 => base + 0x1000 + rng.below(32) - 16,
        8 => base + rng.below(6) * 0x1000 + rng.below(40) - 20,
        _ => base + rng.below(0x5000),
    }
}

/// A number with a point to it.
pub fn value(rng: &mut Rng) -> u64 {
    match rng.below(16) {
        0..3 => pointer(rng),
        3..6 => rng.below(130).wrapping_sub(65),
        6 => rng.pick(&[
            0,
            1,
            u64::MAX,
            1 << 63,
            i64::MAX as u64,
            1 << 31,
            0x7FFF_FFFF,
            0xFFFF_FFFF,
            0x80,
            0x8000,
        ]),
        7 => rng.next() & 0xFFFF_FFFF,
        8 => 1 << rng.below(64),
        9 => rng.next() >> rng.below(64),
        10 => rng.next() << 48, // not canonical, mostly
        _ => rng.next(),
    }
}

fn double(rng: &mut Rng) -> u64 {
    let interesting = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.5,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        f64::MIN_POSITIVE,
        5e-324,
        1e300,
        2_147_483_648.0,
        -32768.5,
        9.3e18,
        0.1,
        1e-310,
    ];
    match rng.below(4) {
        0 => rng.pick(&interesting).to_bits(),
        1 => ((rng.next() as i32) as f64 / 64.0).to_bits(),
        2 => 0x7FF0_0000_0000_0001 | rng.next() & 0xFF,
        _ => rng.next(),
    }
}

fn single(rng: &mut Rng) -> u32 {
    let interesting =
        [0.0, -0.0, 1.0, -1.0, 1.5, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-40, 3e38, 2.5e9];
    match rng.below(4) {
        0 => rng.pick(&interesting).to_bits(),
        1 => ((rng.next() as i16) as f32 / 8.0).to_bits(),
        2 => 0x7F80_0001 | rng.next() as u32 & 0xFF,
        _ => rng.next() as u32,
    }
}

/// Eight bytes that some instruction can make sense of.
fn word(rng: &mut Rng) -> u64 {
    match rng.below(5) {
        0 => double(rng),
        1 => u64::from(single(rng)) | u64::from(single(rng)) << 32,
        2 => rng.next(),
        _ => value(rng),
    }
}

/// A random x87/SSE state, most of its exceptions masked.
pub fn fill_fx(rng: &mut Rng, fx: &mut Fx) {
    let b = &mut fx.0;
    let fcw: u16 = if rng.percent(85) { 0x3F } else { rng.next() as u16 & 0x3F };
    b[0..2].copy_from_slice(&(0x40 | fcw | rng.next() as u16 & 0xF00).to_le_bytes());
    // TOP and condition codes; no exception raised
    b[2..4].copy_from_slice(&(rng.next() as u16 & 0x7F00).to_le_bytes());
    b[4] = rng.pick(&[0, 0xFF, 0x0F, rng.clone().next() as u8]);
    let mxcsr = if rng.percent(85) { 0x1F80 } else { rng.next() as u32 & 0x1F80 };
    let modes = if rng.percent(60) { 0 } else { rng.next() as u32 & 0xE07F };
    b[24..28].copy_from_slice(&(mxcsr | modes).to_le_bytes());
    for i in 0..8 {
        let at = 32 + 16 * i;
        let mantissa = if rng.percent(80) { word(rng) | 1 << 63 } else { word(rng) };
        b[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
        let exponent = match rng.below(5) {
            0 => 0x7FFF,
            1 => 0,
            2 => rng.next() as u16,
            _ => 0x3FFF_u16.wrapping_add(rng.below(80) as u16).wrapping_sub(20),
        };
        b[at + 8..at + 10].copy_from_slice(&(exponent | (rng.next() as u16 & 0x8000)).to_le_bytes());
    }
    for i in 0..32 {
        b[160 + 8 * i..168 + 8 * i].copy_from_slice(&word(rng).to_le_bytes());
    }
}

/// Upper halves of YMM registers: not seldom none is in use.
pub fn fill_upper(rng: &mut Rng, upper: &mut Upper) {
    if rng.percent(70) {
        for eight in upper.as_flattened_mut().chunks_exact_mut(8) {
            eight.copy_from_slice(&word(rng).to_le_bytes());
        }
    }
}

/// The bytes in memory before a run.
pub fn memory(rng: &mut Rng) -> Vec<u64> {
    let mut words: Vec<u64> = (0..WORDS).map(|_| word(rng)).collect();
    areas::prepare(rng, &mut words);
    words
}
