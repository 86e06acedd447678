//! Which computer register holds which guest register while generated code runs.
//!
//! Thirteen guest registers have a register of the computer: the same one, but RSP lives in R13.
//! R13 … R15 of the guest live in memory; R14 and R15 of the computer are temporaries, and RSP
//! points at the processor's state.

use iced_x86::Register;

/// The computer's register that holds the guest's RSP.
pub const HOST_OF_RSP: u8 = 13;

/// (guest register, computer's register).
pub const PINNED: [(usize, u8); 13] = [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (4, HOST_OF_RSP),
    (5, 5),
    (6, 6),
    (7, 7),
    (8, 8),
    (9, 9),
    (10, 10),
    (11, 11),
    (12, 12),
];

/// The number of the computer's register for a guest register's number, if it has one.
#[must_use]
pub fn host_of(guest: usize) -> Option<u8> {
    match guest {
        4 => Some(HOST_OF_RSP),
        13..=15 => None,
        n => Some(n as u8),
    }
}

const R64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
const R32: [Register; 16] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::ESP,
    Register::EBP,
    Register::ESI,
    Register::EDI,
    Register::R8D,
    Register::R9D,
    Register::R10D,
    Register::R11D,
    Register::R12D,
    Register::R13D,
    Register::R14D,
    Register::R15D,
];
const R16: [Register; 16] = [
    Register::AX,
    Register::CX,
    Register::DX,
    Register::BX,
    Register::SP,
    Register::BP,
    Register::SI,
    Register::DI,
    Register::R8W,
    Register::R9W,
    Register::R10W,
    Register::R11W,
    Register::R12W,
    Register::R13W,
    Register::R14W,
    Register::R15W,
];
const R8: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// The register with number `n` and the width of `like`.
#[must_use]
pub fn with_width(n: u8, like: Register) -> Register {
    match like.size() {
        8 => R64[usize::from(n)],
        4 => R32[usize::from(n)],
        2 => R16[usize::from(n)],
        _ => R8[usize::from(n)],
    }
}

/// The number of a general register (AH … BH count as RAX … RBX).
#[must_use]
pub fn number(r: Register) -> usize {
    r.full_register().number()
}

/// Whether it is AH, CH, DH or BH.
#[must_use]
pub fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}
