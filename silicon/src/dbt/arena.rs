//! Lowering of memory operands of 64-bit programs in a window ([`crate::mmu::window`]).
//!
//! An operand of the computer's with segment GS (or, in the lowest arena, with another displacement)
//! is the program's own.  Before it a base is checked to be in an arena, unless that is known
//! ([`super::facts`]): the access waits for a branch that is predicted, never for a look-up.  Which
//! arena it is likely to be is guessed from what registers and memory hold when the block is
//! translated.  Where nothing can be guessed, or was guessed wrong several times ([`super::guess`]), the way
//! into the window is looked up by the address's arena: that waits for a load, but never fails.
//! Where a check fails, the rest of the block runs in the version whose accesses have their own
//! checks, in the first level of the TLB.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::asm::{Mem, RSP, T0, T1, Through, at, cc, state};
use super::block::Site;
use super::facts::{Arena, Fact};
use super::glue::{segment_base, table};
use super::kinds::{has_base, is_short};
use super::map::{HOST_OF_RSP, host_of, number};
use super::tables::Tables;
use super::translate::{Cold, Translator};
use crate::arch::segment::seg;
use crate::mmu::window::{ARENA_SHIFT, HIGH, LOW, is_high, low_place};

/// The stack pointer's number.
const STACK: usize = 4;

/// How an operand is accessed in a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// What T0 has to be.
    pub compute: Compute,
    /// What has to lie in the arena.
    pub check: Option<Check>,
    /// What is done about the distance of an arena that is far.
    pub far: Far,
    /// The operand then.
    pub mem: Mem,
    /// A register that is known to be near the arena, and how far from its value the operand is.
    pub proves: Option<(usize, u64)>,
}

/// What T0 has to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Compute {
    /// Anything.
    Nothing,
    /// A constant.
    Constant(u64),
    /// A guest register without a place.
    Register(usize),
    /// The operand's address in this process, in whatever arena it is.
    Host,
    /// The operand's linear address.
    Address,
    /// The base of FS.
    Thread,
}

/// How the distance of the lowest arena comes into an operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Far {
    /// It is in the displacement, or the operand leads to a high arena.
    Not,
    /// It is added to T0.
    Added,
    /// T0 is the distance, and an index is added.
    Loaded(Option<(u8, u8)>),
}

/// What has to lie in an arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Check {
    /// The guest's register; `None`: the operand's address in T0.
    register: Option<usize>,
    /// The arena's number; of a high one the other's does as well.
    number: u64,
}

/// Where the table of distances is, counted from the state.
fn distances() -> i32 {
    table(offset_of!(Tables, distances)) as i32
}

/// An operand of the computer's own in the window.
fn own(mem: Mem) -> Mem {
    Mem { through: Some(Through::Own), ..mem }
}

/// An operand in the lowest arena, which is far: how its distance comes in, and the operand then.
fn far(mem: Mem) -> (Far, Mem) {
    let with = |base, index| own(Mem { base: Some(base), index, ..mem });
    match (mem.base, mem.index) {
        (Some(T0), _) => (Far::Added, own(mem)),
        (Some(base), index) => (Far::Loaded(index), with(base, Some((T0, 0)))),
        (None, index) => (Far::Loaded(None), with(T0, index)),
    }
}

fn register(r: Register) -> Option<usize> {
    (r != Register::None).then(|| number(r))
}

impl Translator<'_> {
    /// How a 64-bit program's operand is accessed in its window, if it can be.
    pub(super) fn reach(&self, insn: &Instruction) -> Option<Reach> {
        if is_short(insn) {
            return None;
        }
        if has_base(insn) {
            return self.in_thread(insn);
        }
        let displacement = insn.memory_displacement64();
        let base = insn.memory_base();
        if base == Register::RIP || base == Register::None && insn.memory_index() == Register::None {
            return self.constant(displacement);
        }
        let disp = displacement as i32;
        let index = register(insn.memory_index());
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        match (register(base), index) {
            (Some(b), None) => self.based(insn, b, None, disp),
            (Some(b), Some(i)) => {
                let swaps = scale == 0 && self.is_near(i) && !self.is_near(b);
                let (b, i) = if swaps { (i, b) } else { (b, i) };
                self.based(insn, b, Some((i, scale)), disp)
            }
            (None, Some(i)) => self.indexed(i, scale, disp),
            (None, None) => None,
        }
        .or_else(|| self.whole(insn))
        .or(Some(Reach {
            compute: Compute::Host,
            check: None,
            far: Far::Not,
            mem: own(at(T0)),
            proves: None,
        }))
    }

    /// An operand whose address is computed, and checked to be in the arena where it is likely to be.
    fn whole(&self, insn: &Instruction) -> Option<Reach> {
        let likely = self.facts.likely_operand(insn)?;
        let arena = self.guessed(insn, likely)?;
        let check = Check { register: None, number: likely >> ARENA_SHIFT };
        self.through(arena, Some(check), Compute::Address, at(T0))
    }

    /// An operand at a constant distance from the base of FS.
    fn in_thread(&self, insn: &Instruction) -> Option<Reach> {
        let is_fs = insn.memory_segment() == Register::FS;
        if !is_fs || insn.memory_base() != Register::None || insn.memory_index() != Register::None {
            return None;
        }
        let arena = self.guessed(insn, self.fs)?;
        let check = Check { register: None, number: self.fs >> ARENA_SHIFT };
        let mem = Mem::new(Some(T0), None, insn.memory_displacement64() as i32);
        self.through(arena, Some(check), Compute::Thread, mem)
    }

    /// The arena of an address, unless guesses were wrong at this instruction.
    fn guessed(&self, insn: &Instruction, likely: u64) -> Option<Arena> {
        let instruction = insn.ip().wrapping_sub(self.rip).wrapping_add(self.hpa);
        self.arena_of(likely).filter(|_| !self.tools.places.is_mixed(instruction))
    }

    /// An operand with a base that is near an arena or, as far as is known, in one.
    fn based(&self, insn: &Instruction, base: usize, index: Option<(usize, u8)>, disp: i32) -> Option<Reach> {
        let (arena, check) = match self.facts.of(base) {
            Fact::Near(arena, _) => (arena, None),
            _ => {
                let likely = self.facts.likely(Some(base), None, 0)?;
                let number = likely >> ARENA_SHIFT;
                let arena = self.guessed(insn, likely)?;
                (arena, Some(Check { register: Some(base), number }))
            }
        };
        let index = match index {
            Some((i, _)) if !self.is_small(i, arena) => return None,
            Some((i, scale)) => Some((host_of(i)?, scale)),
            None => None,
        };
        let (host, compute) = match host_of(base) {
            Some(host) => (host, Compute::Nothing),
            None => (T0, Compute::Register(base)),
        };
        let proves = index.is_none().then_some((base, i64::from(disp).unsigned_abs()));
        let reach = self.through(arena, check, compute, Mem::new(Some(host), index, disp))?;
        Some(Reach { proves, ..reach })
    }

    /// An operand in the lowest arena with an index alone, which is small.
    fn indexed(&self, index: usize, scale: u8, disp: i32) -> Option<Reach> {
        let host = host_of(index).filter(|_| self.has_low && self.is_small(index, Arena::Low))?;
        self.through(Arena::Low, None, Compute::Nothing, Mem::new(None, Some((host, scale)), disp))
    }

    /// An operand whose address is known.
    fn constant(&self, address: u64) -> Option<Reach> {
        if is_high(address) {
            return self.through(Arena::High, None, Compute::Constant(address), at(T0));
        }
        let disp = i32::try_from(address).ok().filter(|_| self.has_low)?;
        self.through(Arena::Low, None, Compute::Nothing, Mem::new(None, None, disp))
    }

    /// The operand in an arena.
    fn through(&self, arena: Arena, check: Option<Check>, compute: Compute, mem: Mem) -> Option<Reach> {
        let (far, mem) = match arena {
            Arena::High => (Far::Not, Mem { through: Some(Through::High), ..mem }),
            Arena::Low if i64::from(mem.disp) < -(Arena::Low.drift().cast_signed()) => return None,
            Arena::Low if self.is_far => far(mem),
            Arena::Low => {
                let disp = i32::try_from(i64::from(mem.disp) + low_place().cast_signed()).ok()?;
                (Far::Not, own(Mem { disp, ..mem }))
            }
        };
        Some(Reach { compute, check, far, mem, proves: None })
    }

    fn is_near(&self, r: usize) -> bool {
        matches!(self.facts.of(r), Fact::Near(..))
    }

    /// Whether an index leads from an arena no further than into its guard.
    fn is_small(&self, r: usize, arena: Arena) -> bool {
        match self.facts.of(r) {
            Fact::Small => true,
            Fact::Signed => arena == Arena::High,
            Fact::Near(..) | Fact::Unknown => false,
        }
    }

    fn arena_of(&self, address: u64) -> Option<Arena> {
        match address >> ARENA_SHIFT {
            LOW => self.has_low.then_some(Arena::Low),
            number => HIGH.contains(&number).then_some(Arena::High),
        }
    }

    /// Emit what comes before the operand.
    pub(super) fn approach(&mut self, insn: &Instruction, reach: Reach) -> Mem {
        match reach.compute {
            Compute::Nothing => {}
            Compute::Constant(v) => self.constant_address(insn, T0, v),
            Compute::Register(r) => self.a.load(T0, super::asm::state(super::glue::slot(r))),
            Compute::Host => self.host_address(insn),
            Compute::Thread => self.a.load(T0, state(segment_base(seg::FS))),
            Compute::Address => {
                self.keep_flags();
                self.address(insn, 0);
            }
        }
        if let Some(check) = reach.check {
            self.require(insn, check.register.and_then(host_of).unwrap_or(T0), check.number);
            let arena = if check.number == LOW { Arena::Low } else { Arena::High };
            check.register.into_iter().for_each(|register| self.facts.prove(register, arena));
        }
        self.add_distance(reach.far);
        if let Some((register, by)) = reach.proves {
            self.facts.prove_by(register, by);
        }
        let is_stack = reach.mem.base == Some(HOST_OF_RSP) && reach.mem.index.is_none();
        if is_stack && reach.mem.through == Some(Through::High) {
            self.facts.prove(STACK, Arena::High);
        }
        self.in_window(insn, reach.mem)
    }

    /// Load the operand's address, which is a constant: one that moves with the code, perhaps.
    pub(super) fn constant_address(&mut self, insn: &Instruction, to: u8, v: u64) {
        if insn.is_ip_rel_memory_operand() { self.a.guest(to, v) } else { self.a.imm(to, v) }
    }

    /// T0 = the operand's address in this process; if it is in no arena, one that is not canonical.  T1 is
    /// lost, the computer's flags are not.
    fn host_address(&mut self, insn: &Instruction) {
        self.operand_offset(insn, 0);
        self.arena_number(T0);
        self.a.rr(false, &[0x0F, 0xB6], T1, T1); // movzx T1d, T1b
        self.a.load(T1, Mem::new(Some(RSP), Some((T1, 3)), distances()));
        self.a.lea(T0, Mem::new(Some(T0), Some((T1, 0)), 0));
    }

    /// Bring the lowest arena's distance into the operand.  T1 may be lost, the computer's flags are not.
    fn add_distance(&mut self, far: Far) {
        let distance = Mem::new(Some(RSP), None, distances() + 8 * LOW as i32);
        match far {
            Far::Not => {}
            Far::Added => {
                self.a.load(T1, distance);
                self.a.lea(T0, Mem::new(Some(T0), Some((T1, 0)), 0));
            }
            Far::Loaded(index) => {
                self.a.load(T0, distance);
                if index.is_some() {
                    self.a.lea(T0, Mem::new(Some(T0), index, 0));
                }
            }
        }
    }

    /// A word on the stack, or at RBP.
    pub(super) fn stack_word(&mut self, insn: &Instruction, host: u8, disp: i32) -> Mem {
        let mem = Mem { through: Some(Through::High), ..Mem::new(Some(host), None, disp) };
        let guest = if host == HOST_OF_RSP { STACK } else { usize::from(host) };
        let is_known = matches!(self.facts.of(guest), Fact::Near(Arena::High, _));
        let check = (!is_known).then_some(Check { register: Some(guest), number: HIGH[1] });
        self.approach(insn, Reach { compute: Compute::Nothing, check, far: Far::Not, mem, proves: None })
    }

    /// Leave for the version without windows unless a register's value is in the arena of a number, or if
    /// that is high in the other one.  The computer's flags, which are kept before, and T1 are lost.
    fn require(&mut self, insn: &Instruction, host: u8, number: u64) {
        self.keep_flags();
        self.arena_number(host);
        self.compare_number(number as u8);
        let branch = self.a.jcc_later(cc::NE);
        let back = self.a.here();
        let other = HIGH.contains(&number).then(|| HIGH[usize::from(number == HIGH[0])] as u8);
        let rest = (self.count - self.index) as u8;
        let (other, flags, x87) = (other.map(|other| (other, back)), self.flags, self.x87);
        self.cold.push(Cold::Outside { branch, other, rip: insn.ip(), flags, x87, rest });
    }

    /// T1's lowest byte = the arena's number of a value (of one whose bits above bit 49 are not zero: it
    /// is no address then).
    fn arena_number(&mut self, host: u8) {
        let b = if host < 8 { 0x20 } else { 0 };
        self.a.raw(&[0xC4, 0x43 | b, 0xFB, 0xF0, 0xC0 | (T1 & 7) << 3 | (host & 7), ARENA_SHIFT as u8]);
    }

    fn compare_number(&mut self, number: u8) {
        self.a.rr(false, &[0x80], 7, T1); // cmp T1b, imm8
        self.a.raw(&[number]);
    }

    /// Compare the arena's number of the guest's stack pointer with that of stacks.  The computer's
    /// flags and T1 are lost.
    pub(super) fn stack_number(&mut self) {
        self.arena_number(HOST_OF_RSP);
        self.compare_number(HIGH[1] as u8);
    }

    /// Before another block may begin: make sure that the stack pointer is in an arena.  If it is not, go
    /// on at `rip`, with so many instructions of the block left.
    pub(super) fn settle_stack(&mut self, rip: u64, remaining: usize) {
        if super::mode::relies_on_stack(self.mode) && !self.facts.is_stack_settled() {
            self.prove_stack(rip, remaining);
        }
    }

    /// The same before a transfer that moves it: in the window its access proves it.
    pub(super) fn settle_before(&mut self, insn: &Instruction) {
        let is_tracked = super::mode::relies_on_stack(self.mode) && !self.has_window;
        if is_tracked && !self.facts.is_stack_proved() {
            self.prove_stack(insn.ip(), self.count - self.index);
        }
    }

    fn prove_stack(&mut self, rip: u64, remaining: usize) {
        self.keep_flags();
        let site = Site {
            rip,
            remaining: remaining as u8,
            block: self.block,
            flags: self.whereabouts(),
            x87: self.x87,
            is_group: true,
            ..Site::default()
        };
        self.stack_number();
        let branch = self.a.jcc_later(cc::NE);
        self.cold.push(Cold::Step { branch, site });
        self.facts.prove(STACK, Arena::High);
    }

    /// What an instruction did to the registers; control goes on behind it.
    pub(super) fn follow(&mut self, insn: &Instruction) {
        if !super::mode::relies_on_stack(self.mode) {
            return;
        }
        let is_leave = self.has_window && insn.mnemonic() == iced_x86::Mnemonic::Leave;
        self.facts.follow(insn, &mut self.tools.info, self.peek, is_leave);
        if !self.facts.is_stack_near() {
            self.settle_stack(insn.next_ip(), self.count - self.index - 1);
        }
    }

    /// Emit the way out of a check that failed: `other` is the number that does as well, and where to
    /// go on then.
    pub(super) fn write_other(&mut self, other: Option<(u8, u64)>) {
        if let Some((number, back)) = other {
            self.compare_number(number);
            self.a.jcc(cc::E, back);
        }
    }
}
