//! Memory operands of a block that share one check.
//!
//! Accesses off the same value of the same register that lie close together are one *group*: the
//! first checks the range of all, keeps the host pointer, and the others use it.  If the range
//! crosses a page, or the first level of the TLB cannot grant it, the rest of the block runs in a
//! version without groups, whose checks are exact.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::kinds::{has_base, pushes_selector};
use super::map::number;

/// Most groups in a block: each has a slot for its pointer.
pub const MAX_GROUPS: usize = 16;
/// Bytes from the first to the last byte of a group, at most (so that displacements are short).
const MAX_SPAN: i64 = 128;
/// Stands for "no base register": absolute addresses.
const ABSOLUTE: usize = 16;

/// One instruction's access as a member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which group.
    pub group: usize,
    /// Where the access lies in the group's range.
    pub offset: i32,
    /// Bytes of the range.
    pub span: u32,
    /// Whether any member writes.
    pub write: bool,
}

struct Group {
    base: usize,
    version: u32,
    low: i64,
    high: i64,
    write: bool,
    members: Vec<(usize, i64)>,
}

/// What a register's value is known to be: a numbered unknown plus a constant.
#[derive(Clone, Copy, Default)]
struct Value {
    version: u32,
    offset: i64,
}

struct Planner<'a> {
    info: &'a mut InstructionInfoFactory,
    values: [Value; 17],
    next: u32,
    groups: Vec<Group>,
    /// Bytes of an address.
    word: i64,
}

/// For each instruction the group its memory access belongs to, if sharing saves anything.
/// `is_barrier` tells which instructions are interpreted.
pub fn plan(
    insns: &[Instruction],
    info: &mut InstructionInfoFactory,
    is_32: bool,
    is_barrier: impl Fn(&Instruction) -> bool,
) -> Vec<Option<Member>> {
    let word = if is_32 { 4 } else { 8 };
    let mut p = Planner { info, values: [Value::default(); 17], next: 1, groups: Vec::new(), word };
    for (i, insn) in insns.iter().enumerate() {
        if is_barrier(insn) {
            for r in 0..16 {
                p.forget(r);
            }
            continue;
        }
        if let Some((base, offset, size, write)) = p.access(insn) {
            p.join(i, base, offset, size, write);
        }
        p.effects(insn);
    }
    let mut out = vec![None; insns.len()];
    let shared = p.groups.iter().filter(|g| g.members.len() > 1).take(MAX_GROUPS);
    for (n, g) in shared.enumerate() {
        for &(i, offset) in &g.members {
            out[i] = Some(Member {
                group: n,
                offset: (offset - g.low) as i32,
                span: (g.high - g.low) as u32,
                write: g.write,
            });
        }
    }
    out
}

impl Planner<'_> {
    fn forget(&mut self, register: usize) {
        self.values[register] = Value { version: self.next, offset: 0 };
        self.next += 1;
    }

    /// The one access that may be shared: (base, displacement, bytes, is write).
    fn access(&mut self, insn: &Instruction) -> Option<(usize, i64, i64, bool)> {
        match insn.code() {
            Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Call_rel32_64 | Code::Pushfq => {
                return Some((4, -8, 8, true));
            }
            Code::Push_r32 | Code::Pushd_imm8 | Code::Pushd_imm32 | Code::Call_rel32_32 | Code::Pushfd => {
                return Some((4, -4, 4, true));
            }
            Code::Call_rm64 | Code::Call_rm32 if insn.op0_kind() == OpKind::Register => {
                return Some((4, -self.word, self.word, true));
            }
            Code::Pop_r64 | Code::Retnq | Code::Retnq_imm16 => return Some((4, 0, 8, false)),
            Code::Pop_r32 | Code::Retnd | Code::Retnd_imm16 => return Some((4, 0, 4, false)),
            Code::Leaveq => return Some((5, 0, 8, false)),
            Code::Leaved => return Some((5, 0, 4, false)),
            Code::Call_rm64 | Code::Push_rm64 | Code::Call_rm32 | Code::Push_rm32 => return None,
            _ if pushes_selector(insn, self.word) => return Some((4, -self.word, self.word, true)),
            _ => {}
        }
        let op = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
        let size = insn.memory_size().size();
        let is_plain = insn.memory_index() == Register::None
            && !has_base(insn)
            && (1..=64).contains(&size)
            && insn.mnemonic() != Mnemonic::Lea;
        if !is_plain {
            return None;
        }
        let disp = signed(insn.memory_displacement64(), self.word);
        let base = match insn.memory_base() {
            Register::None | Register::RIP => ABSOLUTE,
            r if r.size() == self.word as usize && disp.abs() < 1 << 30 => number(r),
            _ => return None,
        };
        let access = self.info.info(insn).op_access(op);
        let write = match access {
            OpAccess::Read | OpAccess::CondRead => false,
            OpAccess::None | OpAccess::NoMemAccess => return None,
            _ => true,
        };
        Some((base, disp, size as i64, write))
    }

    fn join(&mut self, i: usize, base: usize, disp: i64, size: i64, write: bool) {
        let value = self.values[base];
        let Some(from) = value.offset.checked_add(disp) else { return };
        let Some(to) = from.checked_add(size) else { return };
        let open = self.groups.iter_mut().rev().find(|g| g.base == base && g.version == value.version);
        if let Some(g) = open {
            let (low, high) = (g.low.min(from), g.high.max(to));
            if high.checked_sub(low).is_some_and(|span| span <= MAX_SPAN) {
                (g.low, g.high) = (low, high);
                g.write |= write;
                g.members.push((i, from));
                return;
            }
        }
        self.groups.push(Group {
            base,
            version: value.version,
            low: from,
            high: to,
            write,
            members: vec![(i, from)],
        });
    }

    /// What the instruction does to the registers' values.
    fn effects(&mut self, insn: &Instruction) {
        if let Some((register, by)) = adjustment(insn, self.word) {
            let v = &mut self.values[register];
            match v.offset.checked_add(by) {
                Some(o) => v.offset = o,
                None => self.forget(register),
            }
            if !is_pop(insn) {
                return;
            }
        }
        let mut written = super::kinds::written(self.info, insn);
        if is_pop(insn) && number(insn.op0_register()) != 4 {
            written[4] = false;
        }
        for (r, _) in written.iter().enumerate().filter(|(_, w)| **w) {
            self.forget(r);
        }
    }
}

/// An address or a distance as a signed number.
fn signed(v: u64, word: i64) -> i64 {
    if word == 4 { i64::from(v as i32) } else { v.cast_signed() }
}

/// A register that the instruction moves by a constant.
pub(super) fn adjustment(insn: &Instruction, word: i64) -> Option<(usize, i64)> {
    match insn.code() {
        Code::Push_r64
        | Code::Pushq_imm8
        | Code::Pushq_imm32
        | Code::Push_rm64
        | Code::Pushfq
        | Code::Call_rel32_64
        | Code::Call_rm64 => return Some((4, -8)),
        Code::Push_r32
        | Code::Pushd_imm8
        | Code::Pushd_imm32
        | Code::Push_rm32
        | Code::Pushfd
        | Code::Call_rel32_32
        | Code::Call_rm32 => return Some((4, -4)),
        Code::Pop_r64 | Code::Pop_r32 if number(insn.op0_register()) != 4 => {
            return Some((4, word));
        }
        _ if pushes_selector(insn, word) => return Some((4, -word)),
        _ => {}
    }
    if insn.op0_kind() != OpKind::Register || insn.op0_register().size() != word as usize {
        return None;
    }
    let r = insn.op0_register();
    let is_immediate = insn.op_count() == 2 && !matches!(insn.op1_kind(), OpKind::Register | OpKind::Memory);
    let by = match insn.mnemonic() {
        Mnemonic::Add if is_immediate => signed(insn.immediate(1), word),
        Mnemonic::Sub if is_immediate => signed(insn.immediate(1), word).checked_neg()?,
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Lea if insn.memory_base() == r && insn.memory_index() == Register::None => {
            signed(insn.memory_displacement64(), word)
        }
        _ => return None,
    };
    Some((number(r), by))
}

fn is_pop(insn: &Instruction) -> bool {
    matches!(insn.code(), Code::Pop_r64 | Code::Pop_r32)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn plan_of(code: &[u8]) -> Vec<Option<Member>> {
        let insns: Vec<_> = Decoder::with_ip(64, code, 0x1000, DecoderOptions::NONE).into_iter().collect();
        plan(&insns, &mut InstructionInfoFactory::new(), false, |_| false)
    }

    #[test]
    fn pushes_share_one_check_of_their_whole_range() {
        let p = plan_of(&[0x55, 0x53, 0x52]); // push rbp; push rbx; push rdx
        let member = |offset| Some(Member { group: 0, offset, span: 24, write: true });
        assert_eq!(vec![member(16), member(8), member(0)], p);
    }

    #[test]
    fn a_changed_base_ends_a_group() {
        // mov rax,[rdi]; mov rdi,rsi; mov rax,[rdi]
        let p = plan_of(&[0x48, 0x8B, 0x07, 0x48, 0x89, 0xF7, 0x48, 0x8B, 0x07]);
        assert_eq!(vec![None, None, None], p);
    }

    #[test]
    fn absolute_addresses_half_the_address_space_apart_share_nothing() {
        // mov al,[7000000000000000h]; mov al,[9000000000000000h]
        let p = plan_of(&[0xA0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0xA0, 0, 0, 0, 0, 0, 0, 0, 0x90]);
        assert_eq!(vec![None, None], p);
    }

    #[test]
    fn a_base_moved_by_a_constant_stays_in_its_group() {
        // mov rax,[rdi]; add rdi,8; mov rax,[rdi]
        let p = plan_of(&[0x48, 0x8B, 0x07, 0x48, 0x83, 0xC7, 0x08, 0x48, 0x8B, 0x07]);
        let member = |offset| Some(Member { group: 0, offset, span: 16, write: false });
        assert_eq!(vec![member(0), None, member(8)], p);
    }
}
