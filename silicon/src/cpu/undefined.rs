//! How long encodings are that mean nothing: a processor fetches all of an instruction before it finds
//! that there is no such one, so a byte that cannot be fetched, or a sixteenth, comes before #UD.
//!
//! Source: SDM 2D, "Opcode Map"; SDM 2A, "Instruction Format"; where the maps are empty, what this
//! computer's processor does.

/// Prefixes of an encoding, as far as they change its length.
#[derive(Clone, Copy, Default)]
struct Prefixes {
    is_operand: bool,
    is_address: bool,
    has_other: bool,
    rex: u8,
}

/// What follows the opcode.
struct Rest {
    has_modrm: bool,
    immediate: usize,
}

/// A cursor over the bytes; beyond the last one it counts on.
struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        self.at += 1;
        self.all.get(self.at - 1).copied()
    }
    fn peek(&self) -> Option<u8> {
        self.all.get(self.at).copied()
    }
}

/// The length of the encoding that `bytes` begin with; more than there are bytes: those that are there do not
/// tell it all, but it is at least so long.
#[must_use]
pub fn length(bits: u8, bytes: &[u8]) -> usize {
    let mut b = Bytes { all: bytes, at: 0 };
    let mut p = Prefixes::default();
    let opcode = loop {
        let Some(byte) = b.next() else { return b.at };
        match byte {
            0x66 => p.is_operand = true,
            0x67 => p.is_address = true,
            0xF0 | 0xF2 | 0xF3 => p.has_other = true,
            0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 => {}
            0x40..=0x4F if bits == 64 => {
                p.rex = byte;
                continue;
            }
            _ => break byte,
        }
        p.rex = 0;
    };
    let rest = match opcode {
        0x0F => match b.next() {
            None => return b.at,
            Some(0x38) => {
                b.next();
                Rest { has_modrm: true, immediate: 0 }
            }
            Some(0x3A) => {
                b.next();
                Rest { has_modrm: true, immediate: 1 }
            }
            Some(second) => two_byte(second, bits, p),
        },
        0xC4 | 0xC5 | 0x62 if bits == 64 || b.peek().is_none_or(|next| next >= 0xC0) => {
            return extended(opcode, b, p);
        }
        _ => one_byte(opcode, b.peek(), bits, p),
    };
    if rest.has_modrm {
        modrm(&mut b, bits, p);
    }
    b.at + rest.immediate
}

/// VEX and EVEX: with a prefix that they have inside, or of a map that there is not, they end at once.
fn extended(opcode: u8, mut b: Bytes<'_>, p: Prefixes) -> usize {
    if p.is_operand || p.has_other || p.rex != 0 || opcode == 0x62 {
        return b.at;
    }
    let map = if opcode == 0xC5 { Some(1) } else { b.peek().map(|m| m & 0x1F) };
    let Some(map) = map else { return b.at + 1 };
    for _ in 0..if opcode == 0xC5 { 1 } else { 2 } {
        b.next();
    }
    let Some(code) = b.next() else { return b.at };
    let immediate = match map {
        1 => two_byte(code, 64, p),
        2 => Rest { has_modrm: true, immediate: 0 },
        3 => Rest { has_modrm: true, immediate: 1 },
        _ => return b.at - 1,
    };
    if immediate.has_modrm {
        modrm(&mut b, 64, p);
    }
    b.at + immediate.immediate
}

/// The bytes of an immediate of the operand's size, at most four.
fn operand(bits: u8, p: Prefixes) -> usize {
    let is_narrow = (bits == 16) != p.is_operand && p.rex & 8 == 0;
    if is_narrow { 2 } else { 4 }
}

fn one_byte(opcode: u8, next: Option<u8>, bits: u8, p: Prefixes) -> Rest {
    let z = operand(bits, p);
    let digit = next.map_or(0, |m| m >> 3 & 7);
    let has_modrm = match opcode {
        0x00..=0x3F => opcode & 7 < 4,
        0x62 | 0x63 | 0x69 | 0x6B | 0x80..=0x8F | 0xC0 | 0xC1 | 0xC4..=0xC7 => true,
        0xD0..=0xD3 | 0xD8..=0xDF | 0xF6 | 0xF7 | 0xFE | 0xFF => true,
        _ => false,
    };
    let immediate = match opcode {
        0x00..=0x3F if opcode & 7 == 4 => 1,
        0x00..=0x3F if opcode & 7 == 5 => z,
        0x68 | 0x69 | 0x81 | 0xA9 | 0xC7 | 0xE8 | 0xE9 => z,
        0x6A | 0x6B | 0x70..=0x7F | 0x80 | 0x82 | 0x83 | 0xA8 | 0xB0..=0xB7 => 1,
        0xC0 | 0xC1 | 0xC6 | 0xCD | 0xD4 | 0xD5 | 0xE0..=0xE7 | 0xEB => 1,
        0x9A | 0xEA => z + 2,
        0xB8..=0xBF => z,
        0xC2 | 0xCA => 2,
        0xC8 => 3,
        0xF6 if digit < 2 => 1,
        0xF7 if digit < 2 => z,
        _ => 0,
    };
    Rest { has_modrm, immediate }
}

fn two_byte(opcode: u8, bits: u8, p: Prefixes) -> Rest {
    let has_modrm = !matches!(
        opcode,
        0x04..=0x0C | 0x0E | 0x30..=0x37 | 0x77 | 0x80..=0x8F | 0xA0..=0xA2 | 0xA8..=0xAA | 0xC8..=0xCF
    );
    let immediate = match opcode {
        0x0F | 0x70..=0x73 | 0xA4 | 0xAC | 0xBA | 0xC2 | 0xC4..=0xC6 => 1,
        0x80..=0x8F => operand(bits, p),
        _ => 0,
    };
    Rest { has_modrm, immediate }
}

/// Skip a ModRM byte, and the SIB byte and the displacement that it asks for.
fn modrm(b: &mut Bytes<'_>, bits: u8, p: Prefixes) {
    let Some(modrm) = b.next() else { return };
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let is_short = bits != 64 && (bits == 16) != p.is_address;
    b.at += match (mode, is_short) {
        (3, _) => 0,
        (1, true) => 1,
        (2, true) => 2,
        (_, true) => 2 * usize::from(rm == 6),
        (_, false) => {
            let base = if rm == 4 {
                let Some(sib) = b.next() else { return };
                sib & 7
            } else {
                rm
            };
            match mode {
                1 => 1,
                2 => 4,
                _ => 4 * usize::from(base == 5),
            }
        }
    };
}
