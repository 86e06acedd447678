//! The last x87 instruction: FIP, FDP, FOP and their selectors
//! (SDM 1, "x87 FPU Instruction and Data (Operand) Pointers" and "Last Instruction Opcode").
//!
//! The computer's own registers cannot keep them: they would name our code and our pointers, and
//! its operating system drops them when it switches programs.  So they are noted here, by both
//! engines, for each x87 instruction that is no control instruction, and put into the images of
//! FNSTENV, FNSAVE and FXSAVE ([`Fx`](crate::cpu::state::Fx) itself has zeros there).  When and what an image shows differs
//! between processors: this one does as the computer does ([`Habits`]).

use std::sync::LazyLock;

use iced_x86::{Instruction, Mnemonic};

use crate::arch::segment::seg;
use crate::cpu::operand;
use crate::cpu::state::{Core, Fx, Mode};
use crate::dbt::undefined::{X87_MARK, x87_images};

/// What of the last x87 instruction an FXSAVE64 image has and no other place.
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;

/// The pointers.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pointers {
    /// Offset of the last instruction.
    pub fip: u64,
    /// Offset of the last memory operand.
    pub fdp: u64,
    /// The last opcode: bits 2:0 of its first byte, and its second byte.
    pub fop: u16,
    /// CS of the last instruction.
    pub fcs: u16,
    /// Segment of the last memory operand.
    pub fds: u16,
}

/// How processors differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Habits {
    /// FOP is noted without an unmasked exception (not since the Pentium 4).
    pub has_opcode: bool,
    /// FDP is noted without an unmasked exception (CPUID.(7,0):EBX.FDP_EXCPTN_ONLY clear).
    pub has_data: bool,
    /// The selectors are noted (CPUID.(7,0):EBX[13] clear).
    pub has_selectors: bool,
    /// FXSAVE saves the pointers without an unmasked exception (not on AMD's).
    saves: bool,
    /// FXRSTOR loads them without one (not on AMD's before XSaveErPtr).
    restores: bool,
}

impl Habits {
    /// Something is noted with an unmasked exception, and not without.
    #[must_use]
    pub fn wait_for_exceptions(self) -> bool {
        !(self.has_opcode && self.has_data)
    }
}

/// The computer's.
static HABITS: LazyLock<Habits> = LazyLock::new(|| {
    let ([saved, restored], image) = x87_images();
    Habits {
        has_opcode: saved[4] >> 16 != 0,
        has_data: saved[5] != 0,
        has_selectors: saved[4] & 0xFFFF != 0,
        saves: image.0[FIP..FDP] != [0; 8],
        restores: restored[4] >> 16 == u32::from(X87_MARK),
    }
});

/// The computer's.
#[must_use]
pub fn habits() -> Habits {
    *HABITS
}

/// Whether a byte of code of so many bits is a prefix, if no opcode came before it.
#[must_use]
pub fn is_prefix(byte: u8, bits: u8) -> bool {
    matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
        || bits == 64 && byte & 0xF0 == 0x40
}

/// Note the opcode of an x87 instruction in the instruction itself: in its immediate, which none of them
/// has.
#[inline]
pub fn tag(insn: &mut Instruction, bits: u8, bytes: &[u8]) {
    let Some(at) = bytes.iter().position(|&b| !is_prefix(b, bits)) else { return };
    if let (0xD8..=0xDF, Some(&second)) = (bytes[at], bytes.get(at + 1)) {
        insn.set_immediate32(u32::from(bytes[at] & 7) << 8 | u32::from(second));
    }
}

/// Whether the instruction, one of the x87's, is one that the pointers tell of.
#[must_use]
pub fn are_noted_for(insn: &Instruction) -> bool {
    use Mnemonic::*;
    !matches!(
        insn.mnemonic(),
        Fninit
            | Fnclex
            | Fnstcw
            | Fldcw
            | Fnstsw
            | Fnstenv
            | Fldenv
            | Fnsave
            | Frstor
            | Fneni
            | Fndisi
            | Fnsetpm
            | Wait
    )
}

/// An x87 instruction as far as the pointers tell of it.
#[derive(Clone, Copy, Debug)]
pub struct Last {
    /// Its offset.
    pub rip: u64,
    /// Its opcode.
    pub fop: u16,
    /// It has a memory operand.
    pub has_memory: bool,
}

impl Last {
    /// Of an instruction that was tagged.
    #[must_use]
    pub fn of(insn: &Instruction) -> Self {
        let has_memory = insn.memory_size().size() != 0;
        Self { rip: insn.ip(), fop: insn.immediate32() as u16, has_memory }
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

fn put(bytes: &mut [u8], at: usize, value: u64, size: usize) {
    bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Sign-extended from bit 47.
fn canonical(v: u64) -> u64 {
    (v.cast_signed() << 16 >> 16).cast_unsigned()
}

impl Pointers {
    /// `data`: the selector and the offset of the last memory operand, if there is one to note.
    fn note(&mut self, last: Last, cs: u16, data: Option<(u16, u64)>, habits: Habits, is_pending: bool) {
        self.fip = last.rip;
        self.fcs = if habits.has_selectors { cs } else { 0 };
        if habits.has_opcode || is_pending {
            self.fop = last.fop;
        }
        if let Some((selector, offset)) = data
            && (habits.has_data || is_pending && last.has_memory)
        {
            self.fdp = offset;
            self.fds = if habits.has_selectors { selector } else { 0 };
        }
    }

    /// Put them into the environment of `size` bytes that FNSTENV stored, or FNSAVE.
    fn to_environment(self, memory: &mut [u8], size: usize, is_linear: bool) {
        let linear = |selector: u16, offset: u64| (u64::from(selector) << 4).wrapping_add(offset);
        let (code, data) = (linear(self.fcs, self.fip), linear(self.fds, self.fdp));
        let (fop, fcs, fds) = (u64::from(self.fop), u64::from(self.fcs), u64::from(self.fds));
        let fields: [(usize, u64, usize); 5] = match (size == 28, is_linear) {
            (true, false) => [(12, self.fip, 4), (16, fcs, 2), (18, fop, 2), (20, self.fdp, 4), (24, fds, 2)],
            (true, true) => [
                (12, code, 2),
                (14, 0xFFFF, 2),
                (16, (code >> 4 & 0x0FFF_F000) | fop, 4),
                (20, data | 0xFFFF_0000, 4),
                (24, data >> 4 & 0x0FFF_F000, 4),
            ],
            (false, false) => [(6, self.fip, 2), (8, fcs, 2), (8, fcs, 2), (10, self.fdp, 2), (12, fds, 2)],
            (false, true) => {
                let high = |v: u64| v >> 4 & 0xF000;
                [
                    (6, code, 2),
                    (8, high(code) | fop, 2),
                    (10, data, 2),
                    (12, high(data), 2),
                    (12, high(data), 2),
                ]
            }
        };
        for &(at, value, bytes) in &fields {
            put(memory, at, value, bytes);
        }
    }

    /// What FLDENV or FRSTOR loads.
    fn of_environment(memory: &[u8], size: usize, is_linear: bool) -> Self {
        let w = |at| word(memory, at);
        let d = |at| u64::from(dword(memory, at));
        let fop = |v: u64| v as u16 & 0x7FF;
        match (size == 28, is_linear) {
            (true, false) => Self { fip: d(12), fcs: w(16), fop: fop(d(16) >> 16), fdp: d(20), fds: w(24) },
            (true, true) => {
                let high = |v: u64| v << 4 & 0xFFFF_0000;
                let (fip, fdp) = (d(12) & 0xFFFF | high(d(16)), d(20) & 0xFFFF | high(d(24)));
                Self { fip, fcs: 0, fop: fop(d(16)), fdp, fds: 0 }
            }
            (false, false) => Self { fip: w(6).into(), fcs: w(8), fop: 0, fdp: w(10).into(), fds: w(12) },
            (false, true) => {
                let whole = |low: u16, high: u16| u64::from(low) | (u64::from(high) & 0xF000) << 4;
                Self {
                    fip: whole(w(6), w(8)),
                    fcs: 0,
                    fop: fop(w(8).into()),
                    fdp: whole(w(10), w(12)),
                    fds: 0,
                }
            }
        }
    }

    /// What FXSAVE or FXSAVE64 puts into an image.
    pub fn save(self, fx: &mut Fx, is_wide: bool) {
        if HABITS.saves || fx.pending() != 0 {
            self.to_image(fx, is_wide);
        }
    }

    /// What FXRSTOR or FXRSTOR64 takes from an image.
    pub fn restore(&mut self, fx: &Fx, is_wide: bool) {
        if HABITS.restores || fx.pending() != 0 {
            *self = Self::of_image(fx, is_wide);
        }
    }

    /// Put them into an image of FXSAVE or FXSAVE64 format.
    pub fn to_image(self, fx: &mut Fx, is_wide: bool) {
        put(&mut fx.0, FOP, self.fop.into(), 2);
        for (at, offset, selector) in [(FIP, self.fip, self.fcs), (FDP, self.fdp, self.fds)] {
            let narrow = offset & 0xFFFF_FFFF | u64::from(selector) << 32;
            put(&mut fx.0, at, if is_wide { offset } else { narrow }, 8);
        }
    }

    /// Those in an image of FXSAVE or FXSAVE64 format.
    #[must_use]
    pub fn of_image(fx: &Fx, is_wide: bool) -> Self {
        let offset = |at: usize| {
            let all = u64::from(dword(&fx.0, at)) | u64::from(dword(&fx.0, at + 4)) << 32;
            if is_wide { canonical(all) } else { all & 0xFFFF_FFFF }
        };
        let selector = |at: usize| if is_wide || !HABITS.has_selectors { 0 } else { word(&fx.0, at + 4) };
        Self {
            fip: offset(FIP),
            fdp: offset(FDP),
            fop: word(&fx.0, FOP) & 0x7FF,
            fcs: selector(FIP),
            fds: selector(FDP),
        }
    }
}

impl Core {
    /// An x87 instruction was the last one; `data`: the segment and the offset of its memory operand, or of
    /// the last one before if it has none; `is_pending`: unmasked exceptions are.
    pub fn note_x87(&mut self, last: Last, data: Option<(u8, u64)>, is_pending: bool) {
        let data = data.map(|(segment, offset)| (self.seg[usize::from(segment)].selector, offset));
        self.pointers.note(last, self.seg[seg::CS].selector, data, *HABITS, is_pending);
    }

    fn has_linear_pointers(&self) -> bool {
        matches!(self.mode, Mode::Real | Mode::V86)
    }

    /// What an x87 instruction does with the pointers, before it stores its memory operand at `gva`:
    /// those after it.
    pub fn pointers_after(&mut self, insn: &Instruction, gva: u64) -> Pointers {
        use Mnemonic::*;
        let is_linear = self.has_linear_pointers();
        let size = if matches!(insn.memory_size().size(), 14 | 94) { 14 } else { 28 };
        let memory = &mut self.vectors.frame.memory;
        match insn.mnemonic() {
            Fninit => Pointers::default(),
            Fnstenv => {
                self.pointers.to_environment(memory, size, is_linear);
                self.pointers
            }
            Fnsave => {
                self.pointers.to_environment(memory, size, is_linear);
                Pointers::default()
            }
            Fldenv | Frstor => {
                let found = Pointers::of_environment(memory, size, is_linear);
                if HABITS.has_selectors { found } else { Pointers { fcs: 0, fds: 0, ..found } }
            }
            _ if are_noted_for(insn) => {
                let last = Last::of(insn);
                let data = last.has_memory.then(|| {
                    let segment = operand::segment_of(insn);
                    let offset = gva.wrapping_sub(self.seg[segment].base);
                    (segment as u8, if self.is_64() { offset } else { offset & 0xFFFF_FFFF })
                });
                let before = self.pointers;
                self.note_x87(last, data, self.fx.pending() != 0);
                std::mem::replace(&mut self.pointers, before)
            }
            _ => self.pointers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Pointers = Pointers { fip: 0x12345, fdp: 0x6_789A, fop: 0x5AA, fcs: 0x33, fds: 0x2B };

    #[test]
    fn the_environment_of_protected_mode_comes_back() {
        let mut memory = [0; 28];
        ALL.to_environment(&mut memory, 28, false);
        assert_eq!(ALL, Pointers::of_environment(&memory, 28, false));
        assert_eq!(0x05AA_0033, dword(&memory, 16));
    }

    /// SDM 1, "Real Mode x87 FPU State Image in Memory": addresses are linear.
    #[test]
    fn the_environment_of_real_mode_has_linear_addresses() {
        for size in [14, 28] {
            let mut memory = [0; 28];
            ALL.to_environment(&mut memory, size, true);
            let back = Pointers::of_environment(&memory, size, true);
            assert_eq!((0x12675, 0x67B4A, 0x5AA), (back.fip, back.fdp, back.fop), "{size}");
        }
    }

    /// Processors that keep FDP and FOP for unmasked exceptions only, and no selectors.
    #[test]
    fn other_habits_keep_what_they_keep() {
        let few =
            Habits { has_opcode: false, has_data: false, has_selectors: false, saves: true, restores: true };
        let (last, data) = (Last { rip: 0x1000, fop: 0x123, has_memory: true }, Some((0x2B, 0x2000)));
        let mut p = Pointers::default();
        p.note(last, 0x33, data, few, false);
        assert_eq!(Pointers { fip: 0x1000, ..Pointers::default() }, p);
        p.note(Last { has_memory: false, ..last }, 0x33, data, few, true);
        assert_eq!(Pointers { fip: 0x1000, fop: 0x123, ..Pointers::default() }, p);
        p.note(last, 0x33, data, few, true);
        assert_eq!(Pointers { fip: 0x1000, fdp: 0x2000, fop: 0x123, ..Pointers::default() }, p);
    }
}
