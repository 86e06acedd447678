//! Lowering: what becomes of each guest instruction.

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

use super::asm::{Mem, RBP, RSP, T0, T1, at, cc, state};
use super::block::Site;
use super::glue::{slot, table};
use super::map::{HOST_OF_RSP, host_of, is_high_byte, number, with_width};
use super::tables::Tables;
use super::translate::{Cold, Flags, Translator};
use crate::arch::segment::{Segment, seg};
use crate::cpu::state::Core;
use crate::mmu::tlb::{L1, Tlb};
use std::mem::offset_of;

/// Whether nothing of the block can follow this instruction.
pub(super) fn ends_block(insn: &Instruction) -> bool {
    match insn.flow_control() {
        FlowControl::Next => is_mode_change(insn),
        _ => true,
    }
}

/// Instructions after which the next one may have to be looked up under another mode.
fn is_mode_change(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Clac | M::Stac | M::Popf | M::Popfq | M::Popfd | M::Sti | M::Hlt | M::Clts | M::Lmsw | M::Wrmsr
    ) || (insn.mnemonic() == M::Mov && insn.op0_register().is_cr())
        || insn.op0_register().is_segment_register()
}

/// How an instruction is lowered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Interpreted at its place.
    Step,
    /// Re-encoded for the computer.
    Native,
    /// Re-encoded, and it uses x87 or SSE state.
    Vector,
    /// Nothing to do.
    Nothing,
}

/// Whether the instruction is always interpreted (as far as its kind tells).
pub(super) fn is_interpreted(insn: &Instruction) -> bool {
    way(insn) == Way::Step && insn.flow_control() == FlowControl::Next && !insn.is_stack_instruction()
}

fn way(insn: &Instruction) -> Way {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Lea
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Imul
        | M::Mul
        | M::Div
        | M::Idiv
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Crc32
        | M::Movbe
        | M::Bswap
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Lahf
        | M::Sahf
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Mulx
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx
        | M::Adcx
        | M::Adox
        | M::Bt
        | M::Bts
        | M::Btr
        | M::Btc => {
            if touches_system_register(insn) || is_far_bit(insn) {
                Way::Step
            } else {
                Way::Native
            }
        }
        M::Lfence | M::Sfence | M::Mfence => Way::Native,
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw => Way::Nothing,
        m if is_condition_of(m) => Way::Native,
        M::Ldmxcsr
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Fnsave
        | M::Frstor
        | M::Fldenv
        | M::Fnstenv
        | M::Wait => Way::Step,
        _ if is_vector(insn) => Way::Vector,
        _ => Way::Step,
    }
}

fn is_condition_of(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

/// Whether the instruction has a native form that works on x87 or SSE state.
fn is_vector(insn: &Instruction) -> bool {
    insn.encoding() == iced_x86::EncodingKind::Legacy
        && insn.cpuid_features().iter().all(|&f| is_vector_feature(f) || f == CpuidFeature::CMOV)
}

/// Whether the interpreter may touch the x87/SSE state for this instruction.
fn uses_vector_state(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    insn.mnemonic() == Mnemonic::Wait
        || insn.cpuid_features().iter().any(|&f| is_vector_feature(f) || matches!(f, F::FXSR | F::SSE4A))
}

fn is_vector_feature(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
    )
}

fn touches_system_register(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register && {
            let r = insn.op_register(i);
            r.is_segment_register() || r.is_cr() || r.is_dr()
        }
    })
}

/// BT and its kin with a register offset reach beyond their operand.
fn is_far_bit(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
}

fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// The condition code of a Jcc, as encoded.
fn condition(insn: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => cc::E,
        C::ne => cc::NE,
        C::be => 6,
        C::a => cc::A,
        C::s => cc::S,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

const WRITE: u32 = super::KIND_WRITE;

impl Translator<'_> {
    /// Lower one instruction.  Returns whether control goes on to the next one.
    pub fn instruction(&mut self, insn: &Instruction) -> bool {
        self.vector = uses_vector_state(insn);
        if insn.is_jcc_short_or_near() {
            if let Some(cc) = condition(insn) {
                self.make_live();
                self.transfer_if(cc, insn.near_branch_target());
                return true;
            }
        }
        if insn.is_jmp_short_or_near() {
            self.make_live();
            self.transfer(insn.near_branch_target());
            return false;
        }
        self.open_sites = 0;
        match insn.code() {
            Code::Call_rel32_64 => self.call(insn),
            Code::Call_rm64 if insn.op0_register() != Register::RSP => self.call_indirect(insn),
            Code::Jmp_rm64 => self.jump_indirect(insn),
            Code::Retnq | Code::Retnq_imm16 => self.ret(insn),
            Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_rm64 => self.push(insn),
            Code::Pop_r64 if insn.op0_register() != Register::RSP => self.pop(insn),
            Code::Leaveq => self.leave(insn),
            _ => self.plain(insn),
        }
    }

    fn plain(&mut self, insn: &Instruction) -> bool {
        let way = way(insn);
        let ok = match way {
            Way::Nothing => true,
            Way::Step => false,
            Way::Vector if !self.has_vector => false,
            Way::Native | Way::Vector => self.native(insn),
        };
        if !ok {
            self.step(insn);
            return !ends_block(insn);
        }
        true
    }

    /// Emit `T0 = linear address` of the memory operand.  T1 is lost.
    fn address(&mut self, insn: &Instruction, by: i32) {
        self.t0_group = None;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let is_short = base.size() == 4 || index.size() == 4;
        let disp = insn.memory_displacement64();
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            self.a.imm(T0, disp.wrapping_add_signed(by.into()));
        } else {
            let mut host = |r: Register, temp: u8| -> Option<u8> {
                if r == Register::None {
                    return None;
                }
                Some(host_of(number(r)).unwrap_or_else(|| {
                    self.a.load(temp, state(slot(number(r))));
                    temp
                }))
            };
            let b = host(base, T0);
            let i = host(index, T1);
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            let disp = (disp as i32).wrapping_add(by);
            let m = Mem { base: b, index: i.map(|i| (i, scale)), disp };
            match (b, i, disp, is_short) {
                (Some(b), None, 0, false) => self.a.mov(T0, b),
                (_, _, _, true) => self.a.lea32(T0, m),
                _ => self.a.lea(T0, m),
            }
        }
        let which = match insn.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        let base = offset_of!(Core, seg) + which * size_of::<Segment>() + offset_of!(Segment, base);
        self.a.load(T1, state(base));
        self.a.lea(T0, Mem { base: Some(T0), index: Some((T1, 0)), disp: 0 });
    }

    /// Turn the linear address in T0 into a host pointer, or leave the straight path: to the
    /// interpreter, or for a group to the block without groups.  T1 and the computer's flags are
    /// lost (kept first).
    fn check(&mut self, insn: &Instruction, size: usize, write: bool, is_group: bool) {
        debug_assert!(self.flags == Flags::Kept);
        let table = offset_of!(Core, tlb) + offset_of!(Tlb, l1) + self.class * size_of::<L1>();
        let tag = table + if write { offset_of!(L1, write) } else { offset_of!(L1, read) };
        if self.has_bmi2 {
            self.a.raw(&[0xC4, 0x43, 0x7B, 0xF0, 0xFE, 12]); // rorx r15d, r14d, 12
        } else {
            self.a.rr(false, &[0x89], T0, T1);
            self.a.rr(false, &[0xC1], 5, T1);
            self.a.raw(&[12]);
        }
        self.a.rr(false, &[0x0F, 0xB6], T1, T1);
        let indexed = |disp: usize| Mem { base: Some(RSP), index: Some((T1, 3)), disp: disp as i32 };
        self.a.add_mem(T0, indexed(tag));
        self.a.cmp_imm(T0, 4096 - size as u32);
        let branch = self.a.jcc_later(cc::A);
        self.a.add_mem(T0, indexed(table + offset_of!(L1, host)));
        // The cold path comes back here with T0 a host pointer.
        let back = self.a.here();
        let kind = size as u32 | if write { WRITE } else { 0 } | (self.class as u32) << super::KIND_CLASS;
        let site = Site { is_group, ..self.site(insn) };
        self.cold.push(Cold::Fill { branch, back, kind, tag, flags: self.flags, site });
        self.open_sites += 1;
    }

    /// The host memory operand of the instruction's access that may be shared; `address` puts
    /// its linear address plus a constant into T0.
    fn place(
        &mut self,
        insn: &Instruction,
        size: usize,
        write: bool,
        address: impl FnOnce(&mut Self, i32),
    ) -> Mem {
        let Some(m) = self.plan[self.index] else {
            self.keep_flags();
            address(self, 0);
            self.t0_group = None;
            self.check(insn, size, write, false);
            return at(T0);
        };
        let slot = state(table(offset_of!(Tables, groups)) + 8 * m.group);
        if !self.ready[m.group] {
            self.keep_flags();
            address(self, -m.offset);
            self.check(insn, m.span as usize, m.write, true);
            self.a.store(slot, T0);
            self.ready[m.group] = true;
        } else if self.t0_group != Some(m.group) {
            self.a.load(T0, slot);
        }
        self.t0_group = Some(m.group);
        Mem { base: Some(T0), index: None, disp: m.offset }
    }

    /// Let the cold paths of the instruction just emitted go on after it.  (Those of a transfer
    /// are never closed: whatever was interpreted there, its successor is looked up.)
    fn close_sites(&mut self) {
        let here = self.a.here();
        let open = std::mem::take(&mut self.open_sites);
        let n = self.cold.len();
        for c in &mut self.cold[n - open..] {
            if let Cold::Fill { site, .. } = c {
                site.next = here;
            }
        }
    }

    /// Re-encode an instruction for the computer.  Returns false, having emitted nothing that
    /// matters, if it has no native form.
    fn native(&mut self, insn: &Instruction) -> bool {
        let is_lea = insn.mnemonic() == Mnemonic::Lea;
        let memory = has_memory(insn) && !is_lea;
        let size = insn.memory_size().size();
        if memory && (size == 0 || size > 64 || insn.memory_size() == MemorySize::Unknown) {
            return false;
        }
        let mut new = *insn;
        if matches!(
            insn.code(),
            Code::Mov_AL_moffs8
                | Code::Mov_AX_moffs16
                | Code::Mov_EAX_moffs32
                | Code::Mov_RAX_moffs64
                | Code::Mov_moffs8_AL
                | Code::Mov_moffs16_AX
                | Code::Mov_moffs32_EAX
                | Code::Mov_moffs64_RAX
        ) {
            new.set_code(match insn.code() {
                Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
                Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
                Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
                Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
                Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
                Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
                Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
                _ => Code::Mov_rm64_r64,
            });
        }
        // Registers: which temporaries stand in for registers without a place.
        let accesses: Vec<OpAccess> = {
            let info = self.info.info(insn);
            (0..insn.op_count()).map(|i| info.op_access(i)).collect()
        };
        let mut temps: Vec<(usize, u8, bool, bool)> = Vec::new(); // guest, temp, load, store
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register || !insn.op_register(i).is_gpr() {
                continue;
            }
            let r = insn.op_register(i);
            if is_high_byte(r) {
                if memory {
                    return false;
                }
                continue;
            }
            let guest = number(r);
            let host = if let Some(h) = host_of(guest) {
                h
            } else {
                let access = accesses[i as usize];
                let writes = !matches!(
                    access,
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                );
                let reads = !matches!(access, OpAccess::Write) || r.size() < 4;
                if let Some(t) = temps.iter_mut().find(|t| t.0 == guest) {
                    t.2 |= reads;
                    t.3 |= writes;
                    t.1
                } else {
                    let temp = match (temps.len(), memory) {
                        (0, _) => T1,
                        (1, false) => T0,
                        _ => return false,
                    };
                    temps.push((guest, temp, reads, writes));
                    temp
                }
            };
            new.set_op_register(i, with_width(host, r));
        }
        if is_lea {
            return self.lea(insn, new, &temps);
        }
        if memory {
            let disp = self.plan[self.index].map_or(0, |m| m.offset);
            new.set_memory_base(Register::R14);
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(disp as u64);
            new.set_memory_displ_size(u32::from(disp != 0));
            new.set_segment_prefix(Register::None);
        }
        let Ok(length) = self.encoder.encode(&new, self.a.here() + 64) else {
            let _ = self.encoder.take_buffer();
            return false;
        };
        let code = self.encoder.take_buffer();
        debug_assert_eq!(length, code.len());
        if memory {
            let write = (0..insn.op_count()).any(|i| {
                insn.op_kind(i) == OpKind::Memory
                    && !matches!(accesses[i as usize], OpAccess::Read | OpAccess::CondRead)
            });
            self.place(insn, size, write, |t, by| t.address(insn, by));
        }
        let was_kept = {
            self.flags_for(insn);
            self.flags == Flags::Kept
        };
        for &(guest, temp, load, _) in &temps {
            if temp == T0 {
                self.t0_group = None;
            }
            if load {
                self.a.load(temp, state(slot(guest)));
            }
        }
        let may_fault =
            self.vector || matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b);
        let fault = may_fault.then(|| Site { is_fault: true, flags_kept: was_kept, at: self.a.here(), ..self.site(insn) });
        self.a.raw(&code);
        for &(guest, temp, _, store) in &temps {
            if store {
                self.a.store(state(slot(guest)), temp);
            }
        }
        if let Some(site) = fault {
            let next = self.a.here();
            self.sites.push(Site { next, ..site });
            self.t0_group = None; // lost if the instruction was interpreted
        }
        self.close_sites();
        true
    }

    fn lea(&mut self, insn: &Instruction, new: Instruction, temps: &[(usize, u8, bool, bool)]) -> bool {
        if insn.op0_register().size() == 2 {
            return false;
        }
        // The destination may be a temporary (T1); base and index get T0 and T1 by need.
        let wide = insn.op0_register().size() == 8;
        let is_short = insn.memory_base().size() == 4 || insn.memory_index().size() == 4;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        self.t0_group = None;
        let dest = temps.first().map_or_else(|| number(new.op0_register()) as u8, |t| t.1);
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            let v = insn.memory_displacement64();
            self.a.imm(dest, if wide && !is_short { v } else { v & 0xFFFF_FFFF });
        } else {
            let mut host = |r: Register, temp: u8| -> Option<u8> {
                (r != Register::None).then(|| {
                    host_of(number(r)).unwrap_or_else(|| {
                        self.a.load(temp, state(slot(number(r))));
                        temp
                    })
                })
            };
            let b = host(base, T0);
            let i = host(index, T1);
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            let disp = insn.memory_displacement64() as i32;
            let m = Mem { base: b, index: i.map(|i| (i, scale)), disp };
            if wide && !is_short {
                self.a.lea(dest, m);
            } else {
                self.a.lea32(dest, m);
            }
        }
        if let Some(&(guest, temp, _, _)) = temps.first() {
            self.a.store(state(slot(guest)), temp);
        }
        true
    }

    /// The value of a register operand in a host register: itself, or loaded into `temp`.
    fn value_of(&mut self, r: Register, temp: u8) -> u8 {
        host_of(number(r)).unwrap_or_else(|| {
            self.a.load(temp, state(slot(number(r))));
            temp
        })
    }

    /// The host place of the quadword below the guest's stack pointer.
    fn stack_place(&mut self, insn: &Instruction) -> Mem {
        self.place(insn, 8, true, |t, by| {
            t.a.lea(T0, Mem { base: Some(HOST_OF_RSP), index: None, disp: by - 8 });
        })
    }

    /// The host place of the quadword that `register` (RSP, RBP) points at.
    fn stack_top(&mut self, insn: &Instruction, register: u8) -> Mem {
        self.place(insn, 8, false, |t, by| {
            t.a.lea(T0, Mem { base: Some(register), index: None, disp: by });
        })
    }

    fn move_stack(&mut self, by: i32) {
        self.a.lea(HOST_OF_RSP, Mem { base: Some(HOST_OF_RSP), index: None, disp: by });
    }

    fn value_slot() -> Mem {
        state(table(offset_of!(Tables, value)))
    }

    /// Load a 64-bit memory operand into `value`.
    fn fetch_operand(&mut self, insn: &Instruction) {
        self.keep_flags();
        self.address(insn, 0);
        self.check(insn, 8, false, false);
        self.a.load(T1, at(T0));
        self.a.store(Self::value_slot(), T1);
    }

    fn push(&mut self, insn: &Instruction) -> bool {
        match insn.op0_kind() {
            OpKind::Register => {
                let place = self.stack_place(insn);
                let v = self.value_of(insn.op0_register(), T1);
                self.a.store(place, v);
            }
            OpKind::Memory => {
                self.fetch_operand(insn);
                let place = self.stack_place(insn);
                self.a.load(T1, Self::value_slot());
                self.a.store(place, T1);
            }
            _ => {
                let place = self.stack_place(insn);
                self.a.store_imm(place, insn.immediate(0));
            }
        }
        self.move_stack(-8);
        self.close_sites();
        true
    }

    fn pop(&mut self, insn: &Instruction) -> bool {
        let r = insn.op0_register();
        let place = self.stack_top(insn, HOST_OF_RSP);
        if let Some(h) = host_of(number(r)) {
            self.a.load(h, place);
        } else {
            self.a.load(T1, place);
            self.a.store(state(slot(number(r))), T1);
        }
        self.move_stack(8);
        self.close_sites();
        true
    }

    fn leave(&mut self, insn: &Instruction) -> bool {
        let place = self.stack_top(insn, RBP);
        self.a.load(T1, place);
        self.a.lea(HOST_OF_RSP, Mem { base: Some(RBP), index: None, disp: 8 });
        self.a.mov(RBP, T1);
        self.close_sites();
        true
    }

    fn push_return(&mut self, insn: &Instruction) {
        let place = self.stack_place(insn);
        self.a.store_imm(place, insn.next_ip());
        self.move_stack(-8);
    }

    fn call(&mut self, insn: &Instruction) -> bool {
        self.push_return(insn);
        self.make_live();
        let target = insn.near_branch_target();
        self.transfer(target);
        false
    }

    fn call_indirect(&mut self, insn: &Instruction) -> bool {
        if insn.op0_kind() == OpKind::Register {
            self.push_return(insn);
            let v = self.value_of(insn.op0_register(), T0);
            self.a.mov(T0, v);
        } else {
            self.fetch_operand(insn);
            self.push_return(insn);
            self.a.load(T0, Self::value_slot());
        }
        self.make_live();
        self.transfer_indirect();
        false
    }

    fn jump_indirect(&mut self, insn: &Instruction) -> bool {
        if insn.op0_kind() == OpKind::Register {
            let v = self.value_of(insn.op0_register(), T0);
            self.a.mov(T0, v);
        } else {
            let place = self.place(insn, 8, false, |t, by| t.address(insn, by));
            self.a.load(T0, place);
        }
        self.make_live();
        self.transfer_indirect();
        false
    }

    fn ret(&mut self, insn: &Instruction) -> bool {
        let place = self.stack_top(insn, HOST_OF_RSP);
        self.a.load(T0, place);
        let extra = if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
        self.move_stack(8 + extra);
        self.make_live();
        self.transfer_indirect();
        false
    }
}
