//! What is known of registers' values in a block of a 64-bit program with a window: that they lie
//! near one of its arenas, or are small.
//!
//! A value *near* an arena was in it when it was checked, and has since moved by no more than
//! [`Arena::drift`].  Together with a displacement, and an index of 32 bits by its scale, that leads no
//! further than the guards around an arena.
//!
//! *The stack pointer* is near the arena of stacks wherever such a block begins: whoever goes
//! there makes sure of it.  An access off it that succeeds proves it anew.  What moves it without an
//! access is checked before the block is left ([`Facts::is_stack_settled`]).

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::groups::adjustment;
use super::kinds::{has_base, written};
use super::map::number;
use crate::mmu::window::LOW_BEFORE;

/// The stack pointer's number.
const STACK: usize = 4;

/// What 8 bytes of memory are now, if that can be seen without anything being counted.
pub(super) type Peek<'a> = &'a dyn Fn(u64) -> Option<u64>;

/// One of a window's arenas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arena {
    /// Either of the high ones.
    High,
    /// The lowest addresses.
    Low,
}

impl Arena {
    /// Bytes that a value may have moved since it was checked.
    pub const fn drift(self) -> u64 {
        match self {
            Self::High => 2 << 30,
            Self::Low => LOW_BEFORE / 2,
        }
    }
}

/// What is known of a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Fact {
    /// Nothing.
    #[default]
    Unknown,
    /// It is no further than this from an arena.
    Near(Arena, u64),
    /// It has 32 bits.
    Small,
    /// It has 32 bits, the first of which is its sign.
    Signed,
}

/// What is known of all registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    of: [Fact; 16],
    /// What they are likely to be.
    likely: [Option<u64>; 16],
    /// An access off it, or a check, has proved the fact, and whatever moved it since moves it in each round of a
    /// loop.
    is_sure: [bool; 16],
    /// The stack pointer was proved to be near in this block.
    is_proved: bool,
    /// It has moved since.
    has_moved: bool,
}

impl Facts {
    /// As at the head of a block, which is translated when registers are these.
    pub fn at_head(registers: [u64; 16]) -> Self {
        let mut of = [Fact::Unknown; 16];
        of[STACK] = Fact::Near(Arena::High, 0);
        Self { of, likely: registers.map(Some), is_sure: [false; 16], is_proved: false, has_moved: false }
    }

    /// As at the head of another round of a loop, behind one.
    pub fn at_round(&self) -> Self {
        let keeps = |n: usize| !matches!(self.of[n], Fact::Near(_, 1..)) || self.is_sure[n];
        let mut of = std::array::from_fn(|n| if keeps(n) { self.of[n] } else { Fact::Unknown });
        of[STACK] = Fact::Near(Arena::High, 0);
        Self { of, likely: self.likely, ..Self::at_head([0; 16]) }
    }

    /// Whether what `other` takes for known is.
    pub fn cover(&self, other: &Self) -> bool {
        self.of.iter().zip(&other.of).all(|pair| match pair {
            (_, Fact::Unknown) => true,
            (Fact::Near(ours, drift), Fact::Near(theirs, most)) => ours == theirs && drift <= most,
            (ours, theirs) => ours == theirs,
        })
    }

    /// The linear address that an instruction's operand is likely to have.
    pub fn likely_operand(&self, insn: &Instruction) -> Option<u64> {
        let displacement = insn.memory_displacement64();
        if insn.memory_base() == Register::RIP {
            return Some(displacement);
        }
        let register = |r: Register| (r != Register::None).then(|| number(r));
        let index = register(insn.memory_index());
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        self.likely(register(insn.memory_base()), index.map(|i| (i, scale)), displacement as i32)
    }

    /// The linear address that an operand is likely to have.
    pub fn likely(&self, base: Option<usize>, index: Option<(usize, u8)>, disp: i32) -> Option<u64> {
        let value = |r: usize| self.likely[r];
        let base = base.map_or(Some(0), value)?;
        let index = index.map_or(Some(0), |(r, scale)| Some(value(r)? << scale))?;
        Some(base.wrapping_add(index).wrapping_add_signed(disp.into()))
    }

    /// Of a register.
    pub fn of(&self, register: usize) -> Fact {
        self.of[register]
    }

    /// Its value is in an arena, or an access off it was.
    pub fn prove(&mut self, register: usize, arena: Arena) {
        self.of[register] = Fact::Near(arena, 0);
        self.is_sure[register] = true;
        if register == STACK {
            (self.is_proved, self.has_moved) = (true, false);
        }
    }

    /// What lies so far from its value is in the arena.
    pub fn prove_by(&mut self, register: usize, by: u64) {
        if let (Fact::Near(arena, drift), true) = (self.of[register], register != STACK) {
            self.of[register] = Fact::Near(arena, drift.min(by));
            self.is_sure[register] = true;
        }
    }

    /// An instruction was interpreted: the stack pointer was looked at then.
    pub fn interpreted(&mut self) {
        *self = Self { likely: self.likely, is_proved: true, ..Self::at_head([0; 16]) };
    }

    /// Whether the stack pointer is near: else it has to be checked at once.
    pub fn is_stack_near(&self) -> bool {
        matches!(self.of[STACK], Fact::Near(Arena::High, _))
    }

    /// Whether the stack pointer was proved to be near in this block.
    pub fn is_stack_proved(&self) -> bool {
        self.is_stack_near() && self.is_proved
    }

    /// Whether another block may begin.
    pub fn is_stack_settled(&self) -> bool {
        self.is_stack_near() && (self.is_proved || !self.has_moved)
    }

    /// What the instruction does to the registers' values.  `is_leave`: it is a LEAVE whose access was
    /// in the window.
    pub fn follow(
        &mut self,
        insn: &Instruction,
        info: &mut InstructionInfoFactory,
        peek: Peek<'_>,
        is_leave: bool,
    ) {
        let mut before = self.of;
        let next = self.next(insn, peek);
        let changed = written(info, insn);
        for (n, _) in changed.iter().enumerate().filter(|(_, w)| **w) {
            self.of[n] = Fact::Unknown;
            self.likely[n] = None;
        }
        let sure = self.is_sure;
        for (n, _) in changed.iter().enumerate().filter(|(_, w)| **w) {
            self.is_sure[n] = false;
        }
        if let Some((register, value)) = next {
            self.likely[register] = value;
        }
        if let Some((register, by)) = moved(insn) {
            if let Fact::Near(arena, drift) = before[register] {
                self.drift(register, arena, drift, by.unsigned_abs());
                self.is_sure[register] = sure[register];
            }
            return;
        }
        if is_leave {
            self.of[STACK] = Fact::Near(Arena::High, 8);
            (self.is_proved, self.has_moved) = (true, true);
            return;
        }
        // A copy of a stack pointer that this block has not proved proves nothing: else it could move on
        // from block to block.
        if !self.is_proved {
            before[STACK] = Fact::Unknown;
        }
        if let Some((register, fact)) = result(insn, &before) {
            self.of[register] = fact;
            if register == STACK {
                (self.is_proved, self.has_moved) = (true, true);
            }
        }
    }

    /// A register that is given a value, if the instruction computes no more than an address, or loads
    /// one: `peek` tells what is in memory now.
    fn next(&self, insn: &Instruction, peek: Peek<'_>) -> Option<(usize, Option<u64>)> {
        if let Some((register, by)) = moved(insn) {
            return Some((register, self.likely[register].map(|v| v.wrapping_add_signed(by))));
        }
        if insn.op_count() < 2 || insn.op0_kind() != OpKind::Register || insn.op0_register().size() != 8 {
            return None;
        }
        let to = number(insn.op0_register());
        let gpr = |r: Register| r.is_gpr64().then(|| number(r));
        match insn.mnemonic() {
            Mnemonic::Mov if insn.op1_kind() == OpKind::Register => {
                Some((to, self.likely[gpr(insn.op1_register())?]))
            }
            Mnemonic::Mov if insn.op1_kind() == OpKind::Memory && !has_base(insn) => {
                Some((to, self.likely_operand(insn).and_then(peek)))
            }
            Mnemonic::Add if insn.op1_kind() == OpKind::Register => {
                let sum = |a: u64, b: u64| a.wrapping_add(b);
                let by = self.likely[gpr(insn.op1_register())?];
                Some((to, self.likely[to].zip(by).map(|(a, b)| sum(a, b))))
            }
            Mnemonic::Lea => {
                // A base in an arena says more than an index that is not known.
                let base = || self.likely(gpr(insn.memory_base()), None, insn.memory_displacement64() as i32);
                Some((to, self.likely_operand(insn).or_else(base)))
            }
            _ => None,
        }
    }

    fn drift(&mut self, register: usize, arena: Arena, drift: u64, by: u64) {
        let sum = drift.saturating_add(by);
        if sum <= arena.drift() {
            self.of[register] = Fact::Near(arena, sum);
        }
        self.has_moved |= register == STACK;
    }
}

/// A register that the instruction moves by a constant at most.
fn moved(insn: &Instruction) -> Option<(usize, i64)> {
    match insn.code() {
        Code::Retnq => Some((STACK, 8)),
        Code::Retnq_imm16 => Some((STACK, 8 + i64::from(insn.immediate16()))),
        // AND with minus a power of two: down to a multiple of it.
        Code::And_rm64_imm8 | Code::And_rm64_imm32 | Code::And_RAX_imm32
            if insn.op0_kind() == OpKind::Register && insn.immediate(1).cast_signed() < 0 =>
        {
            Some((number(insn.op0_register()), insn.immediate(1).cast_signed()))
        }
        _ => adjustment(insn, 8),
    }
}

/// The register that the instruction gives a new value, and what is known of that.
fn result(insn: &Instruction, before: &[Fact; 16]) -> Option<(usize, Fact)> {
    use Mnemonic as M;
    if insn.op_count() == 0 {
        return matches!(insn.mnemonic(), M::Cdqe).then_some((0, Fact::Signed));
    }
    if insn.op0_kind() != OpKind::Register || !insn.op0_register().is_gpr() {
        return None;
    }
    let (to, size) = (number(insn.op0_register()), insn.op0_register().size());
    let is_register = insn.op_count() > 1 && insn.op1_kind() == OpKind::Register;
    match (insn.mnemonic(), size) {
        (M::Mov, 8) if is_register && insn.op1_register().is_gpr() => {
            Some((to, before[number(insn.op1_register())]))
        }
        (M::Lea, 8) if insn.memory_index() == Register::None && insn.memory_base().size() == 8 => {
            let base = insn.memory_base();
            let by = insn.memory_displacement64().cast_signed().unsigned_abs();
            match before[number(base)] {
                Fact::Near(arena, drift) if base.is_gpr() && by <= arena.drift() - drift => {
                    Some((to, Fact::Near(arena, drift + by)))
                }
                _ => None,
            }
        }
        (M::Movsxd | M::Movsx, 8) => Some((to, Fact::Signed)),
        (M::Movzx, 8) | (M::Movsxd | M::Movzx | M::Movsx, 4) => Some((to, Fact::Small)),
        (
            M::Mov
            | M::Add
            | M::Sub
            | M::And
            | M::Or
            | M::Xor
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Lea
            | M::Popcnt,
            4,
        ) => Some((to, Fact::Small)),
        (M::And, 8) if !is_register && insn.op1_kind() != OpKind::Memory => {
            (insn.immediate(1) < 1 << 31).then_some((to, Fact::Small))
        }
        (M::Shr, 8) if !is_register => (insn.immediate(1) & 63 >= 32).then_some((to, Fact::Small)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn after(facts: &mut Facts, code: &[u8]) {
        let mut info = InstructionInfoFactory::new();
        for insn in &mut Decoder::with_ip(64, code, 0x1000, DecoderOptions::NONE) {
            assert!(!insn.is_invalid());
            facts.follow(&insn, &mut info, &|_| None, false);
        }
    }

    #[test]
    fn a_base_keeps_its_arena_as_long_as_it_moves_by_little() {
        let mut f = Facts::at_head([0; 16]);
        f.prove(3, Arena::Low);
        after(&mut f, &[0x48, 0x83, 0xC3, 0x10]); // add rbx,16
        assert_eq!(Fact::Near(Arena::Low, 16), f.of(3));
        after(&mut f, &[0x48, 0x89, 0xD9]); // mov rcx,rbx
        assert_eq!(Fact::Near(Arena::Low, 16), f.of(1));
        after(&mut f, &[0x48, 0x8D, 0x51, 0xF8]); // lea rdx,[rcx-8]
        assert_eq!(Fact::Near(Arena::Low, 24), f.of(2));
        after(&mut f, &[0x48, 0x83, 0xE2, 0xF0]); // and rdx,-16
        assert_eq!(Fact::Near(Arena::Low, 40), f.of(2));
        after(&mut f, &[0x48, 0x81, 0xC3, 0xFF, 0xFF, 0xFF, 0x7F]); // add rbx,7FFFFFFFh
        assert_eq!(Fact::Unknown, f.of(3));
        after(&mut f, &[0x48, 0x8B, 0x09]); // mov rcx,[rcx]
        assert_eq!(Fact::Unknown, f.of(1));
    }

    #[test]
    fn what_is_written_with_32_bits_is_small() {
        let small = [
            &[0x89, 0xD8][..],            // mov eax,ebx
            &[0x8B, 0x03],                // mov eax,[rbx]
            &[0x0F, 0xB6, 0x03],          // movzx eax,byte [rbx]
            &[0x0F, 0xBE, 0x03],          // movsx eax,byte [rbx]
            &[0x48, 0x25, 0xFF, 0, 0, 0], // and rax,FFh
            &[0x48, 0xC1, 0xE8, 0x20],    // shr rax,32
            &[0x8D, 0x04, 0x9B],          // lea eax,[rbx+rbx*4]
        ];
        for code in small {
            let mut f = Facts::at_head([0; 16]);
            after(&mut f, code);
            assert_eq!(Fact::Small, f.of(0), "{code:x?}");
        }
        for code in [&[0x48, 0x63, 0x03][..], &[0x48, 0x98], &[0x48, 0x0F, 0xBE, 0x03]] {
            let mut f = Facts::at_head([0; 16]);
            after(&mut f, code); // movsxd rax,dword [rbx]; cdqe; movsx rax,byte [rbx]
            assert_eq!(Fact::Signed, f.of(0), "{code:x?}");
        }
        let others = [
            &[0x48, 0x8B, 0x03][..],      // mov rax,[rbx]
            &[0x48, 0x0F, 0x44, 0xC3],    // cmove rax,rbx
            &[0x0F, 0xBC, 0xC3],          // bsf eax,ebx: may leave it alone
            &[0x0F, 0xB1, 0x0B],          // cmpxchg [rbx],ecx: may leave it alone
            &[0x66, 0x89, 0xD8],          // mov ax,bx
            &[0x48, 0xC1, 0xE8, 0x1F],    // shr rax,31
            &[0x48, 0x25, 0, 0, 0, 0x80], // and rax,-80000000h
        ];
        for code in others {
            let mut f = Facts::at_head([0; 16]);
            after(&mut f, code);
            assert_eq!(Fact::Unknown, f.of(0), "{code:x?}");
        }
    }

    #[test]
    fn the_stack_pointer_has_to_be_proved_where_it_moved_without_an_access() {
        let mut f = Facts::at_head([0; 16]);
        assert!(f.is_stack_settled());
        after(&mut f, &[0x48, 0x83, 0xEC, 0x20]); // sub rsp,32
        assert!(f.is_stack_near() && !f.is_stack_settled());
        f.prove(STACK, Arena::High);
        assert!(f.is_stack_settled());
        after(&mut f, &[0x48, 0x83, 0xC4, 0x20, 0x5B]); // add rsp,32; pop rbx
        assert!(f.is_stack_settled());
        after(&mut f, &[0x48, 0x29, 0xC4]); // sub rsp,rax
        assert!(!f.is_stack_near());
        f.interpreted();
        after(&mut f, &[0x48, 0x89, 0xEC]); // mov rsp,rbp
        assert!(!f.is_stack_near());
        f.prove(5, Arena::High);
        after(&mut f, &[0x48, 0x89, 0xEC]);
        assert!(f.is_stack_settled());
        after(&mut f, &[0x5C]); // pop rsp
        assert!(!f.is_stack_near());
    }

    /// Else a loop of such blocks would lead it anywhere, without one access.
    #[test]
    fn a_copy_of_a_stack_pointer_that_was_not_proved_proves_nothing() {
        let mut f = Facts::at_head([0; 16]);
        after(&mut f, &[0x48, 0x89, 0xE5]); // mov rbp,rsp
        assert_eq!(Fact::Unknown, f.of(5));
        let mut f = Facts::at_head([0; 16]);
        after(&mut f, &[0x48, 0x8D, 0xAC, 0x24, 0xFF, 0xFF, 0xFF, 0x7F]); // lea rbp,[rsp+7FFFFFFFh]
        after(&mut f, &[0x48, 0x89, 0xEC]); // mov rsp,rbp
        assert!(!f.is_stack_settled());
        let mut f = Facts::at_head([0; 16]);
        f.prove(STACK, Arena::High);
        after(&mut f, &[0x48, 0x89, 0xE5, 0x48, 0x89, 0xEC]); // mov rbp,rsp; mov rsp,rbp
        assert!(f.is_stack_settled());
    }
}
