//! Lowering: what becomes of each guest instruction.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpAccess, OpKind, Register};

use super::asm::{Mem, RSP, Source, T0, T1, alu, at, cc, state};
use super::avx::clears_upper;
use super::block::Site;
use super::flags::{immediate, recipe, shift_recipe};
use super::glue::{slot, table};
use super::kinds::{
    Way, condition, ends_block, has_base, has_memory, is_short, is_x87, pushes_selector, stores_mmx,
    uses_vector_state, way,
};
use super::map::{host_of, is_high_byte, number, with_width};
use super::mode::{MODE_AVX, MODE_PAUSE, MODE_SENSITIVE};
use super::record::{Operand, Recipe, Record};
use super::tables::Tables;
use super::translate::{Cold, Translator};
use crate::arch::segment::seg;
use crate::cpu::ring0::is_sensitive;
use crate::cpu::segment::is_canonical;
use crate::cpu::state::Core;
use crate::mmu::tlb::{L1, L1_ENTRIES, PLACE_SHIFT, Place, Tlb};

/// The ModRM form of a MOV between the accumulator and an absolute offset.
fn without_offset(code: Code) -> Option<Code> {
    Some(match code {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return None,
    })
}

/// How far an address is shifted to become the offset of its place in the first level.
const INDEX_SHIFT: u8 = 12 - PLACE_SHIFT as u8;

/// An instruction whose memory operand is loaded and stored apart.
struct Split {
    recipe: Recipe,
    size: usize,
    /// The first operand is in memory, not the second.
    is_destination: bool,
    writes: bool,
    place: Mem,
}

/// `xchg rsi, r14`.
const SWAP_RSI_T0: [u8; 3] = [0x4C, 0x87, 0xF6];

impl Translator<'_> {
    /// Lower one instruction.  Returns whether control goes on to the next one.
    pub fn instruction(&mut self, insn: &Instruction) -> bool {
        self.vector = uses_vector_state(insn);
        self.keep_x87_data(insn);
        let is_looked_at = self.mode & MODE_SENSITIVE != 0 && is_sensitive(insn);
        if is_looked_at || self.is_32 && super::code32::must_step(insn, self.mode) {
            self.step(insn);
            return !ends_block(insn);
        }
        if insn.near_branch_target() != 0 && !is_canonical(insn.near_branch_target()) {
            self.step(insn);
            return false;
        }
        if insn.is_jcc_short_or_near()
            && let Some(cc) = condition(insn)
        {
            self.transfer_if(insn, cc);
            return true;
        }
        if insn.is_jmp_short_or_near() {
            self.transfer(insn.near_branch_target());
            return false;
        }
        if self.transfer_by_count(insn) {
            return true;
        }
        self.open_sites = 0;
        match insn.code() {
            Code::Call_rel32_64 | Code::Call_rel32_32 => self.call(insn),
            Code::Call_rm64 if insn.op0_register() != Register::RSP => self.call_indirect(insn),
            Code::Call_rm32 if insn.op0_register() != Register::ESP => self.call_indirect(insn),
            Code::Jmp_rm64 | Code::Jmp_rm32 => self.jump_indirect(insn),
            Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16 => self.ret(insn),
            Code::Syscall if self.may_change_level(false) => self.syscall(insn),
            Code::Sysretq if self.may_change_level(true) => self.sysret(insn),
            Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_rm64 => self.push(insn),
            Code::Push_r32 | Code::Pushd_imm8 | Code::Pushd_imm32 | Code::Push_rm32 => self.push(insn),
            Code::Pop_r64 | Code::Pop_r32 => self.pop(insn),
            Code::Leaveq | Code::Leaved => self.leave(insn),
            _ if pushes_selector(insn, self.word().into()) => self.push(insn),
            _ => self.system(insn) || self.string(insn) || self.time_stamp(insn) || self.plain(insn),
        }
    }

    fn plain(&mut self, insn: &Instruction) -> bool {
        let way = way(insn);
        let ok = match way {
            Way::Nothing => {
                self.prefetch(insn);
                true
            }
            Way::Step if insn.mnemonic() == Mnemonic::Pause => self.mode & MODE_PAUSE == 0,
            Way::Step => false,
            Way::Vector if !self.has_vector => false,
            Way::Avx if self.mode & MODE_AVX == 0 => false,
            Way::Avx if clears_upper(insn) => self.clear_upper(insn),
            Way::Native | Way::Vector | Way::Avx => self.native(insn),
        };
        if !ok {
            self.step(insn);
            return !ends_block(insn);
        }
        true
    }

    /// Emit `T0 = offset` of the memory operand, plus a constant.  T1 is lost.
    pub(super) fn operand_offset(&mut self, insn: &Instruction, by: i32) {
        self.t0_group = None;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let is_short = is_short(insn);
        let disp = insn.memory_displacement64();
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            let v = disp.wrapping_add_signed(by.into());
            self.constant_address(insn, T0, if self.is_32 || is_short { v & 0xFFFF_FFFF } else { v });
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
            let m = Mem::new(b, i.map(|i| (i, scale)), disp);
            match (b, i, disp, is_short) {
                (Some(b), None, 0, false) => self.a.mov(T0, b),
                (_, _, _, true) => self.a.lea32(T0, m),
                _ => self.a.lea(T0, m),
            }
        }
    }

    /// Emit `T0 = linear address` of the memory operand.  T1 is lost.
    pub(super) fn address(&mut self, insn: &Instruction, by: i32) {
        self.operand_offset(insn, by);
        let which = match insn.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        let base = state(super::glue::segment_base(which));
        let sum = Mem::new(Some(T0), Some((T1, 0)), 0);
        if self.is_32 {
            if let Some(last) = super::code32::last_offset(insn) {
                debug_assert!(!self.flags.live);
                self.a.cmp32_imm(T0, last);
                self.leave_if(insn, cc::A);
            }
            self.a.load32(T1, base);
            self.a.lea32(T0, sum);
        } else {
            self.a.load(T1, base);
            self.a.lea(T0, sum);
        }
    }

    /// Turn the linear address in T0 into a host pointer, or leave the straight path: to the
    /// interpreter, or for a group to the block without groups.  T1 and the computer's flags are
    /// lost (kept first).
    ///
    /// `member`: where in a group's range the instruction's own operand is, and whether that is written.
    pub(super) fn check(
        &mut self,
        insn: &Instruction,
        size: usize,
        write: bool,
        member: Option<(u32, bool)>,
    ) {
        let (is_group, (offset, writes)) = (member.is_some(), member.unwrap_or((0, write)));
        debug_assert!(!self.flags.live);
        let [tag, read, host] = self.look_up(write);
        self.a.cmp_imm(T0, 4096 - size as u32);
        let branch = self.a.jcc_later(cc::A);
        self.a.add_mem(T0, host);
        // The cold path comes back here with T0 a host pointer.
        let back = self.a.here();
        let kind = size as u32
            | if write { super::KIND_WRITE } else { 0 }
            | if self.is_first(insn, writes, offset) { super::KIND_FIRST } else { 0 }
            | if writes { super::KIND_WRITES } else { 0 }
            | (offset & super::MAX_OFFSET) << super::KIND_OFFSET
            | (self.class as u32) << super::KIND_CLASS;
        let site = Site { is_group, ..self.site(insn) };
        // (In an interrupt shadow the instruction is interpreted.)
        let rest = (self.count - self.index) as u8;
        let group = (is_group && self.shadow_from.is_none()).then_some((self.flags, rest, read));
        self.cold.push(Cold::Fill { branch, back, kind, tag, site, group });
        self.open_sites += 1;
    }

    /// Whether nothing of the instruction comes before it accesses what is checked, `offset` bytes into
    /// it.  (What both reads and writes memory reads first.)
    fn is_first(&self, insn: &Instruction, writes: bool, offset: u32) -> bool {
        let is_early = !writes || self.open_sites == 0;
        let is_aligned = insn.mnemonic() == Mnemonic::Cmpxchg16b; // or #GP, before all else
        is_early
            && !is_aligned
            && !self.vector
            && !insn.is_string_instruction()
            && offset <= super::MAX_OFFSET
    }

    /// Emit: T1 = the offset of the place in the first level for the linear address in T0, then
    /// T0 += the place's tag.  Returns the operands for that tag, for the tag of reading, and for
    /// the host's address, which is to be added on a hit.  The computer's flags are lost.
    fn look_up(&mut self, write: bool) -> [Mem; 3] {
        let table = offset_of!(Core, tlb) + offset_of!(Tlb, l1) + self.class * size_of::<L1>();
        if self.tools.has_bmi2 {
            self.a.raw(&[0xC4, 0x43, 0x7B, 0xF0, 0xFE, INDEX_SHIFT]); // rorx r15d, r14d, shift
        } else {
            self.a.rr(false, &[0x89], T0, T1);
            self.a.rr(false, &[0xC1], 5, T1);
            self.a.raw(&[INDEX_SHIFT]);
        }
        self.a.rr(false, &[0x81], 4, T1); // and T1d, the bytes of the first level in places
        self.a.raw(&((L1_ENTRIES as u32 - 1) << PLACE_SHIFT).to_le_bytes());
        let field = |at: usize| Mem::new(Some(RSP), Some((T1, 0)), (table + at) as i32);
        let read = field(offset_of!(Place, read));
        let tag = if write { field(offset_of!(Place, write)) } else { read };
        self.a.add_mem(T0, tag);
        [tag, read, field(offset_of!(Place, host))]
    }

    /// Prefetch what the first level maps; nothing faults, and after a miss the address is none.
    fn prefetch(&mut self, insn: &Instruction) {
        use Mnemonic as M;
        let kinds = [M::Prefetchnta, M::Prefetcht0, M::Prefetcht1, M::Prefetcht2, M::Prefetchw];
        if !kinds.contains(&insn.mnemonic()) || has_base(insn) && self.is_32 {
            return;
        }
        self.keep_flags();
        self.address(insn, 0);
        let [.., host] = self.look_up(false);
        self.a.add_mem(T0, host);
        self.a.rm(&[], false, &[0x0F, 0x18], 1, at(T0)); // prefetcht0 [T0]
    }

    /// The host memory operand of the instruction's access that may be shared; `address` puts
    /// its linear address plus a constant into T0.
    pub(super) fn place(
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
            self.check(insn, size, write, None);
            return at(T0);
        };
        let slot = state(table(offset_of!(Tables, groups)) + 8 * m.group);
        if !self.ready[m.group] {
            self.keep_flags();
            address(self, -m.offset);
            self.check(insn, m.span as usize, m.write, Some((m.offset as u32, write)));
            self.a.store(slot, T0);
            self.ready[m.group] = true;
        } else if self.t0_group != Some(m.group) {
            self.a.load(T0, slot);
        }
        self.t0_group = Some(m.group);
        Mem::new(Some(T0), None, m.offset)
    }

    /// Let the cold paths of the instruction just emitted go on after it.  (Those of a transfer
    /// are never closed: whatever was interpreted there, its successor is looked up.)
    pub(super) fn close_sites(&mut self) {
        let here = if std::mem::take(&mut self.is_last_in_block) { 0 } else { self.a.here() };
        let open = std::mem::take(&mut self.open_sites);
        self.note_accesses(here);
        let n = self.cold.len();
        for c in &mut self.cold[n - open..] {
            if let Cold::Fill { site, .. } | Cold::Step { site, .. } = c {
                site.next = here;
            }
        }
    }

    /// A move or a calculation with one register that has no place among the computer's: that
    /// operand is its slot.  Returns false, having emitted nothing, if it is none of these.
    fn with_slot(&mut self, insn: &Instruction) -> bool {
        let operation = match insn.mnemonic() {
            Mnemonic::Add => alu::ADD,
            Mnemonic::Or => alu::OR,
            Mnemonic::Adc => alu::ADC,
            Mnemonic::Sbb => alu::SBB,
            Mnemonic::And => alu::AND,
            Mnemonic::Sub => alu::SUB,
            Mnemonic::Xor => alu::XOR,
            Mnemonic::Cmp => alu::CMP,
            Mnemonic::Mov => alu::MOV,
            _ => return false,
        };
        let (to, size) = (insn.op0_register(), insn.op0_register().size());
        if insn.op0_kind() != OpKind::Register || !to.is_gpr() || size < 4 {
            return false;
        }
        let place = |r: Register| state(slot(number(r)));
        let source = match insn.op1_kind() {
            OpKind::Register if !insn.op1_register().is_gpr() => return false,
            OpKind::Register => host_of(number(insn.op1_register())).map(Source::Register),
            OpKind::Memory => return false,
            _ => immediate(insn, 1).map(Source::Immediate),
        };
        // A register written in its lower half loses the upper one: a slot would not.
        let is_whole = size == 8 || operation == alu::CMP;
        match (host_of(number(to)), source) {
            (Some(host), None) if insn.op1_kind() == OpKind::Register => {
                self.registers_before(insn);
                self.flags_before(insn);
                self.a.alu(operation, size, host, Source::Memory(place(insn.op1_register())));
            }
            (None, Some(source)) if is_whole => {
                self.registers_before(insn);
                self.flags_before(insn);
                self.a.alu_mem(operation, size, place(to), source);
            }
            _ => return false,
        }
        self.flags_after(insn, recipe(insn, None));
        true
    }

    /// Re-encode an instruction for the computer.  Returns false, having emitted nothing that
    /// matters, if it has no native form.
    fn native(&mut self, insn: &Instruction) -> bool {
        let is_lea = insn.mnemonic() == Mnemonic::Lea;
        let memory = has_memory(insn) && !is_lea;
        if self.with_slot(insn) {
            return true;
        }
        let size = insn.memory_size().size();
        if memory && (size == 0 || size > 64 || insn.memory_size() == MemorySize::Unknown) {
            return false;
        }
        let mut new = *insn;
        if let Some(code) = without_offset(insn.code()) {
            new.set_code(code);
        }
        // Registers: which temporaries stand in for registers without a place.
        let accesses: Vec<OpAccess> = {
            let info = self.tools.info.info(insn);
            (0..insn.op_count()).map(|i| info.op_access(i)).collect()
        };
        let mut temps: Vec<(usize, u8, bool, bool)> = Vec::new(); // guest, temp, load, store
        let mut has_high_byte = false;
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register || !insn.op_register(i).is_gpr() {
                continue;
            }
            let r = insn.op_register(i);
            if is_high_byte(r) {
                has_high_byte = true;
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
        let mut split = (memory && temps.is_empty()).then(|| self.split(insn, &mut new)).flatten();
        let reach = if memory && !stores_mmx(insn) { self.reach_window(insn, has_high_byte) } else { None };
        let in_window = reach.is_some();
        if let (Some(reach), None) = (&reach, &split) {
            super::window::encode(&mut new, reach.mem);
        } else if memory && split.is_none() {
            let disp = self.plan[self.index].map_or(0, |m| m.offset);
            // AH … BH and the registers with two digits cannot be in one instruction.
            new.set_memory_base(if has_high_byte { Register::RSI } else { Register::R14 });
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(disp as u64);
            new.set_memory_displ_size(u32::from(disp != 0));
            new.set_segment_prefix(Register::None);
        }
        let Ok(length) = self.tools.encoder.encode(&new, self.a.here() + 64) else {
            let _ = self.tools.encoder.take_buffer();
            return false;
        };
        let mut code = self.tools.encoder.take_buffer();
        debug_assert_eq!(length, code.len());
        if memory && has_high_byte && !in_window {
            code = [&SWAP_RSI_T0, &code[..], &SWAP_RSI_T0].concat();
        }
        self.registers_before(insn);
        if memory {
            let write = (0..insn.op_count()).any(|i| {
                insn.op_kind(i) == OpKind::Memory
                    && !matches!(accesses[i as usize], OpAccess::Read | OpAccess::CondRead)
            });
            let place = match reach {
                Some(reach) => self.approach(insn, reach),
                None => self.place(insn, size, write, |t, by| t.address(insn, by)),
            };
            if let Some(split) = &mut split {
                split.place = place;
            }
        }
        if in_window && split.as_ref().is_some_and(|s| s.writes) {
            self.keep_flags(); // they are lost already when the store faults
        }
        self.flags_before(insn);
        for &(guest, temp, load, _) in &temps {
            if temp == T0 {
                self.t0_group = None;
            }
            if load {
                self.a.load(temp, state(slot(guest)));
            }
        }
        if in_window {
            self.access_site = Some(self.site(insn)); // the flags are elsewhere now
        }
        self.note_upper(insn);
        let may_fault = !in_window
            && (matches!(way(insn), Way::Vector | Way::Avx)
                || matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b));
        let fault = may_fault.then(|| (self.a.here(), self.site(insn)));
        let recipe = match split {
            Some(split) => {
                self.write_split(&split, &code);
                Some(split.recipe)
            }
            None => self.write_plain(insn, &code, &temps, in_window),
        };
        self.flags_after(insn, recipe);
        for &(guest, temp, _, store) in &temps {
            if store {
                self.a.store(state(slot(guest)), temp);
            }
        }
        if is_x87(insn) {
            self.note_x87(insn);
        }
        if let Some((at, site)) = fault {
            let next = self.a.here();
            self.tools.faults.push((at, self.next_site()));
            self.tools.sites.push(Site { next, ..site });
            self.t0_group = None; // lost if the instruction was interpreted
        }
        self.close_sites();
        true
    }

    /// The instruction's own bytes.  Returns how its flags can be made again.
    fn write_plain(
        &mut self,
        insn: &Instruction,
        code: &[u8],
        temps: &[(usize, u8, bool, bool)],
        in_window: bool,
    ) -> Option<Recipe> {
        if self.needed[self.index]
            && let Some(recipe) = shift_recipe(insn)
        {
            let guest = number(insn.op0_register());
            let host = host_of(guest).unwrap_or_else(|| temps.first().map_or(T1, |t| t.1));
            self.a.store(state(offset_of!(Core, record) + offset_of!(Record, a)), host);
            self.a.raw(code);
            return Some(recipe);
        }
        if in_window {
            self.a.accesses.push(self.a.here());
        }
        self.a.raw(code);
        recipe(insn, None)
    }

    /// Whether the memory operand is better handled apart from the operation, so that the flags
    /// can be made again.  Then `new` becomes the operation with T1 instead.
    fn split(&mut self, insn: &Instruction, new: &mut Instruction) -> Option<Split> {
        use Mnemonic as M;
        let size = insn.memory_size().size();
        let is_destination = insn.op0_kind() == OpKind::Memory;
        let writes = is_destination && !matches!(insn.mnemonic(), M::Cmp | M::Test);
        let needs_no_split = !is_destination && matches!(insn.mnemonic(), M::And | M::Or | M::Xor);
        if !self.needed[self.index] || insn.has_lock_prefix() || needs_no_split || size > 8 {
            return None;
        }
        let recipe = recipe(insn, Some(Operand::Recorded))?;
        new.set_segment_prefix(Register::None);
        let operand = u32::from(!is_destination);
        let width =
            [Register::AL, Register::AX, Register::EAX, Register::RAX][size.trailing_zeros() as usize];
        new.set_op_kind(operand, OpKind::Register);
        new.set_op_register(operand, with_width(T1, width));
        Some(Split { recipe, size, is_destination, writes, place: at(T0) })
    }

    fn write_split(&mut self, split: &Split, code: &[u8]) {
        let field = if split.is_destination { offset_of!(Record, a) } else { offset_of!(Record, b) };
        let recorded = state(offset_of!(Core, record) + field);
        self.a.load_sized(split.size, T1, split.place);
        if split.writes {
            self.a.raw(code);
            self.a.store_sized(split.size, split.place, T1);
            self.a.store(recorded, T1);
        } else {
            self.a.store(recorded, T1);
            self.a.raw(code);
        }
        self.is_last_in_block = true;
    }

    fn lea(&mut self, insn: &Instruction, new: Instruction, temps: &[(usize, u8, bool, bool)]) -> bool {
        if insn.op0_register().size() == 2 {
            return false;
        }
        self.registers_before(insn);
        // The destination may be a temporary (T1); base and index get T0 and T1 by need.
        let wide = insn.op0_register().size() == 8;
        let is_short = is_short(insn);
        let (base, index) = (insn.memory_base(), insn.memory_index());
        self.t0_group = None;
        let dest = temps.first().map_or_else(|| number(new.op0_register()) as u8, |t| t.1);
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            let v = insn.memory_displacement64();
            self.constant_address(insn, dest, if wide && !is_short { v } else { v & 0xFFFF_FFFF });
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
            let m = Mem::new(b, i.map(|i| (i, scale)), disp);
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
}
