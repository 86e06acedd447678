//! RDRAND and RDSEED (SDM 2, their own pages; SDM 1, "Random Number Generator Instructions").
//!
//! The numbers are those of ChaCha20 (RFC 8439, with the 64-bit block number of its author) under a
//! key that is a part of the processor's state: equal keys give equal runs, and who sees numbers cannot tell those
//! that come.  There always is one: CF is never clear.

use iced_x86::{Instruction, Mnemonic};

use crate::arch::bits::rflags;
use crate::cpu::operand::{set_reg, size_of_reg};
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::vmx::intercept::Sensitive;

const WORDS_PER_BLOCK: u64 = 8;
/// "expand 32-byte k".
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646E, 0x7962_2D32, 0x6B20_6574];

/// The generator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Random {
    /// What all numbers follow from.
    pub key: [u64; 4],
    /// How many 64-bit numbers were drawn.
    pub drawn: u64,
}

impl Random {
    /// Of a processor that nobody has given a key: that of its place in the machine.
    #[must_use]
    pub fn of_processor(apic_id: u32) -> Self {
        Self { key: [u64::from(apic_id), 0, 0, 0], drawn: 0 }
    }

    /// Go on under another key, which follows from the old one and these bytes.
    pub fn stir(&mut self, seed: [u64; 4]) {
        let mixed = std::array::from_fn(|n| self.key[n] ^ seed[n]);
        let words = chacha20(&mixed, self.drawn);
        let key = std::array::from_fn(|n| u64::from(words[2 * n]) | u64::from(words[2 * n + 1]) << 32);
        *self = Self { key, drawn: 0 };
    }

    /// The next number.
    fn next(&mut self) -> u64 {
        let (block, place) = (self.drawn / WORDS_PER_BLOCK, 2 * (self.drawn % WORDS_PER_BLOCK) as usize);
        self.drawn = self.drawn.wrapping_add(1);
        let words = chacha20(&self.key, block);
        u64::from(words[place]) | u64::from(words[place + 1]) << 32
    }
}

/// One block of the key stream.
fn chacha20(key: &[u64; 4], block: u64) -> [u32; 16] {
    let mut start = [0; 16];
    start[..4].copy_from_slice(&CONSTANTS);
    let halves = key.iter().chain([&block, &0]).flat_map(|w| [*w as u32, (*w >> 32) as u32]);
    for (place, half) in start[4..].iter_mut().zip(halves) {
        *place = half;
    }
    let mut x = start;
    for _ in 0..10 {
        for i in 0..4 {
            quarter(&mut x, [i, 4 + i, 8 + i, 12 + i]);
        }
        for i in 0..4 {
            quarter(&mut x, [i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4]);
        }
    }
    for (word, first) in x.iter_mut().zip(start) {
        *word = word.wrapping_add(first);
    }
    x
}

fn quarter(x: &mut [u32; 16], [a, b, c, d]: [usize; 4]) {
    for (to, from, target, turn) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        x[to] = x[to].wrapping_add(x[from]);
        x[target] = (x[target] ^ x[to]).rotate_left(turn);
    }
}

/// RDRAND, RDSEED.
///
/// # Errors
/// The VM exit.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Exec<()> {
    let register = insn.op0_register();
    let info = information(register.number() as u32, size_of_reg(register));
    let what = match insn.mnemonic() {
        Mnemonic::Rdrand => Sensitive::Rdrand { info },
        _ => Sensitive::Rdseed { info },
    };
    core.intercept(what, insn.len() as u32)?;
    let value = core.random.next();
    set_reg(core, register, value);
    core.set_arith(rflags::CF);
    Ok(())
}

/// SDM 3C, "Format of the VM-Exit Instruction-Information Field as Used for RDRAND, RDSEED, …".
fn information(register: u32, bytes: usize) -> u32 {
    let size = match bytes {
        2 => 0,
        4 => 1,
        _ => 2,
    };
    register << 3 | size << 11
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::step::step;
    use crate::cpu::testbed::long;

    /// The block number stands in words 12 and 13, the nonce is 0: RFC 8439, A.1, vectors 1 to 3.
    #[test]
    fn blocks_are_those_of_the_rfc() {
        let first = |key, block| chacha20(&key, block)[..4].to_vec();
        assert_eq!(vec![0xADE0_B876, 0x903D_F1A0, 0xE56A_5D40, 0x28BD_8653], first([0; 4], 0));
        assert_eq!(vec![0xBEE7_079F, 0x7A38_5155, 0x7C97_BA98, 0x0D08_2D73], first([0; 4], 1));
        assert_eq!(vec![0x2452_EB3A, 0x9249_F8EC, 0x8D82_9D9B, 0xDDD4_CEB1], first([0, 0, 0, 1 << 56], 1));
    }

    #[test]
    fn numbers_follow_from_the_key_and_each_is_drawn_once() {
        let mut generator = Random::default();
        let words: Vec<u64> = (0..17).map(|_| generator.next()).collect();
        assert_eq!((0x903D_F1A0_ADE0_B876, 0x7A38_5155_BEE7_079F), (words[0], words[8]));
        let mut other = Random::of_processor(1);
        assert!((0..17).all(|n| words[n] != other.next()));
        let stirred = [[0; 4], [1, 0, 0, 0]].map(|seed| {
            let mut generator = generator;
            generator.stir(seed);
            generator.next()
        });
        assert!(stirred[0] != stirred[1] && !words.contains(&stirred[0]));
    }

    #[test]
    fn each_size_writes_its_register_as_a_mov_does_and_sets_cf_alone() {
        // rdrand ax; rdrand ecx; rdrand r10; rdseed dx; rdseed ebx; rdseed r11
        let code = [
            0x66, 0x0F, 0xC7, 0xF0, 0x0F, 0xC7, 0xF1, 0x49, 0x0F, 0xC7, 0xF2, 0x66, 0x0F, 0xC7, 0xFA, 0x0F,
            0xC7, 0xFB, 0x49, 0x0F, 0xC7, 0xFB,
        ];
        let mut core = long(3);
        core.mem.write_bytes(0x1000, &code);
        core.gpr = [u64::MAX; 16];
        for _ in 0..6 {
            core.rflags = rflags::ARITH & !rflags::CF | rflags::FIXED1;
            step(&mut core).unwrap();
            assert_eq!(rflags::CF | rflags::FIXED1, core.rflags);
        }
        let mut expected = Random::of_processor(0);
        let words: Vec<u64> = (0..6).map(|_| expected.next()).collect();
        assert_eq!(0xFFFF_FFFF_FFFF_0000 | words[0] & 0xFFFF, core.gpr[0]);
        assert_eq!(words[1] & 0xFFFF_FFFF, core.gpr[1]);
        assert_eq!(words[2], core.gpr[10]);
        assert_eq!(0xFFFF_FFFF_FFFF_0000 | words[3] & 0xFFFF, core.gpr[2]);
        assert_eq!(words[4] & 0xFFFF_FFFF, core.gpr[3]);
        assert_eq!((words[5], 6), (core.gpr[11], core.random.drawn));
    }
}
