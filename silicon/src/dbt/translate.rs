//! Translation of one block: a run of guest instructions that ends with a transfer, at the end of
//! its page, or after [`MAX_INSTRUCTIONS`].

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use super::asm::{Asm, Mem, RSP, T0, T1, cc, state};
use super::block::{Indirect, Key, Link, Site};
use super::code32;
use super::facts::{Facts, Peek};
use super::flags::Flags;
use super::glue::table;
use super::groups::{MAX_GROUPS, Member};
use super::moved::{Move, What};
use super::rounds::Rounds;
use super::tables::{JUMP_ENTRIES, Tables};
use super::tools::Tools;
use crate::cpu::decode::route;
use crate::cpu::pointers;
use crate::cpu::state::Core;
use std::mem::offset_of;

/// Longest block.
pub const MAX_INSTRUCTIONS: usize = 96;

/// Code that is emitted behind the block: the ways off the straight path.
pub(super) enum Cold {
    /// A first-level miss: where the branch is, where to come back, what is accessed.  For a
    /// group: the flags, the block's number of instructions from here on, the place's tag of reading.
    Fill { branch: usize, back: u64, kind: u32, tag: Mem, site: Site, group: Option<(Flags, u8, Mem)> },
    /// The page behind is not the one that was translated.
    Cross { branch: usize, rip: u64, flags: Flags, x87: u32, index: usize },
    /// An instruction has to be interpreted after all.
    Step { branch: usize, site: Site },
    /// A value is not in the arena that it was taken for, but perhaps in the other one; else the block
    /// without windows goes on at `rip` with `rest` instructions.
    Outside { branch: usize, other: Option<(u8, u64)>, rip: u64, flags: Flags, x87: u32, rest: u8 },
    /// The instruction budget does not cover the block, or somebody rang.
    Leave { branch: usize, flags: Flags },
    /// The flags in the record have to be made before they can be loaded.
    Flags { branch: usize, back: u64 },
    /// A transfer to `target` whose jump is at `branch`; the block has `rest` instructions behind.
    Exit { branch: usize, target: u64, flags: Flags, x87: u32, rest: u8 },
}

/// What a translation yields.
pub struct Translated {
    /// The code, assembled for the cache's next byte.
    pub code: Vec<u8>,
    /// What has to change where it is moved; `None`: it cannot be.
    pub moves: Option<Vec<Move>>,
    /// Host addresses: see [`super::block::Block`].
    pub main: u64,
    /// See `main`.
    pub landing: u64,
    /// See `main`.
    pub again: u64,
    /// Instructions.
    pub count: u8,
    /// Bytes of guest code in the first page.
    pub bytes: u16,
    /// The last instruction reaches into the second page.
    pub uses_second: bool,
}

/// The page behind the one that is translated.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    /// Its first bytes: as many as an instruction may have beyond its first.
    pub bytes: [u8; 14],
    /// Its number as a code page.
    pub page: u32,
    /// Where it is.
    pub hpa: u64,
}

/// The state of a translation in progress.
pub(super) struct Translator<'a> {
    pub a: Asm,
    pub tools: &'a mut Tools,
    pub mode: u32,
    pub class: usize,
    pub is_user: bool,
    pub has_vector: bool,
    /// 32-bit code.
    pub is_32: bool,
    /// Its operands are accessed in the guest's window.
    pub has_window: bool,
    /// The window has the lowest arena.
    pub has_low: bool,
    /// It has it far: its distance is loaded.
    pub is_far: bool,
    /// Where the block begins.
    pub rip: u64,
    /// Where that is.
    pub hpa: u64,
    /// What is known of registers.
    pub facts: Facts,
    /// What the base of FS is likely to be.
    pub fs: u64,
    /// See [`Peek`].
    pub peek: Peek<'a>,
    /// Where to interpret from if an access in the window faults.
    pub access_site: Option<Site>,
    pub flags: Flags,
    /// How the record at the head is likely to tell the flags; `None` once it is another's.
    pub how_at_head: Option<u32>,
    /// For each instruction: the flags behind it are needed.
    pub needed: Vec<bool>,
    pub cold: Vec<Cold>,
    pub block: u32,
    /// The STI whose interrupt shadow has not ended yet: its number in the block.
    pub shadow_from: Option<usize>,
    pub count: usize,
    pub index: usize,
    pub vector: bool,
    /// Cold fills whose instruction is not finished yet.
    pub open_sites: usize,
    /// Go on with another block where the present instruction had to be interpreted.
    pub is_last_in_block: bool,
    /// Which accesses share a check.
    pub plan: Vec<Option<Member>>,
    /// Groups whose pointer is in its slot.
    pub ready: [bool; MAX_GROUPS],
    /// The group whose pointer T0 holds.
    pub t0_group: Option<usize>,
    /// See there.
    pub rounds: Rounds,
    /// One more than the number of the report of the block's x87 instructions so far, or 0 if there are none
    /// that are not told.
    pub x87: u32,
}

/// Of the block to come.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What it is a translation of.
    pub key: Key,
    /// Its number.
    pub number: u32,
    /// Its host address.
    pub here: u64,
    /// The `how` of the flags' record as it is now.
    pub how: u32,
    /// The general registers as they are now.
    pub registers: [u64; 16],
    /// The base of FS as it is now.
    pub fs: u64,
}

/// What follows the page's last instruction that is all in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tail {
    /// The next instruction lies in this page, or the block has ended.
    Here,
    /// The last instruction crosses into the next page.
    Crossing,
    /// The next instruction crosses into the next page, which is not known.
    Unknown,
}

/// Decode a run of instructions from the bytes up to the end of a page.  `second` are the first
/// bytes of the following page, if known: then the crossing instruction is the last of the run.
/// The run goes on behind a conditional jump forward, unless a block `is_known` there.
fn decode(
    bytes: &[u8],
    second: Option<&[u8]>,
    rip: u64,
    bits: u32,
    is_known: impl Fn(u64) -> bool,
) -> (Vec<Instruction>, Tail) {
    let mut out = Vec::new();
    let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
    while out.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
        let from = decoder.position();
        let mut insn = decoder.decode();
        pointers::tag(&mut insn, bits as u8, &bytes[from..]);
        if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
            let Some(second) = second else { return (out, Tail::Unknown) };
            let both = [&bytes[from..], second].concat();
            let at = rip + from as u64;
            let mut insn = Decoder::with_ip(bits, &both, at, DecoderOptions::NONE).decode();
            if insn.is_invalid() {
                return (out, Tail::Unknown);
            }
            pointers::tag(&mut insn, bits as u8, &both);
            out.push(code32::widen(insn));
            return (out, Tail::Crossing);
        }
        if insn.is_invalid() {
            break;
        }
        out.push(code32::widen(insn));
        let goes_on = super::kinds::may_fall_through(&insn)
            && insn.near_branch_target() > insn.ip()
            && !is_known(insn.next_ip());
        if super::kinds::ends_block(&insn) && !goes_on {
            break;
        }
    }
    (out, Tail::Here)
}

/// Translate the code at `plan.key` whose bytes up to the end of the page are `bytes`.  `None` if the
/// first instruction is none.  `is_known` tells where blocks of the same mode begin in the page.
/// `peek`: see [`Peek`].
pub fn translate(
    tools: &mut Tools,
    plan: Plan,
    bytes: &[u8],
    second: Option<&Second>,
    is_known: impl Fn(u64) -> bool,
    peek: &dyn Fn(u64) -> Option<u64>,
) -> Option<Translated> {
    let Plan { key, number: block, here, how, registers, fs } = plan;
    let is_32 = super::mode::is_32(key.mode);
    if is_32 && key.rip >> 12 == 0xF_FFFF {
        return None; // behind this page comes address 0
    }
    let bits = super::mode::code_bits(key.mode);
    let (insns, tail) = decode(bytes, second.map(|s| &s.bytes[..]), key.rip, bits, is_known);
    if insns.is_empty() && tail == Tail::Here {
        return None;
    }
    let has_groups = super::mode::has_groups(key.mode);
    let has_window = super::mode::has_window(key.mode) && has_groups;
    let plan = if has_groups && !has_window {
        let is_barrier =
            |i: &Instruction| super::kinds::is_interpreted(i) || is_32 && code32::must_step(i, key.mode);
        super::groups::plan(&insns, &mut tools.info, is_32, is_barrier)
    } else {
        vec![None; insns.len()]
    };
    let mut t = Translator {
        a: Asm::new(here),
        tools,
        mode: key.mode,
        class: super::mode::class_of(key.mode),
        is_user: super::mode::is_user(key.mode),
        has_vector: super::mode::has_vector(key.mode),
        is_32,
        has_window,
        has_low: super::mode::has_low(key.mode),
        is_far: super::mode::is_far(key.mode),
        rip: key.rip,
        hpa: key.hpa,
        facts: Facts::at_head(registers),
        fs,
        peek,
        access_site: None,
        flags: Flags::at_head(),
        how_at_head: Some(how),
        needed: super::flags::needs(&insns, tail == Tail::Crossing),
        cold: Vec::new(),
        block,
        shadow_from: None,
        count: insns.len() + usize::from(tail == Tail::Unknown),
        index: 0,
        vector: false,
        open_sites: 0,
        is_last_in_block: false,
        plan,
        ready: [false; MAX_GROUPS],
        t0_group: None,
        rounds: if tail == Tail::Here { Rounds::of(&insns, key.rip) } else { Rounds::default() },
        x87: 0,
    };
    let landing = t.a.here();
    t.a.guest(T1, key.rip);
    t.a.rr(true, &[0x39], T1, T0); // cmp T0, T1
    let indirect = t.tools.glue.indirect;
    t.a.jcc(cc::NE, indirect);
    let main = t.a.here();
    t.enter();
    let end = insns.last().map_or(key.rip, Instruction::next_ip);
    let page = second.filter(|_| tail == Tail::Crossing).map(|s| s.page);
    loop {
        let open = t.run(&insns, page);
        if open && tail == Tail::Unknown {
            t.index = insns.len();
            t.step_across(end);
        } else if open {
            t.transfer(end);
        }
        if !t.begin_later_rounds() {
            break;
        }
    }
    t.write_cold(key.rip);
    let again = t.write_again(key.rip, main);
    let is_movable = tail == Tail::Here && !t.a.is_fixed;
    Some(Translated {
        code: t.a.bytes,
        moves: is_movable.then_some(t.a.moves),
        main,
        landing,
        again,
        count: t.count as u8,
        bytes: if tail == Tail::Here { (end - key.rip) as u16 } else { bytes.len() as u16 },
        uses_second: tail == Tail::Crossing,
    })
}

impl Translator<'_> {
    /// The head of a block: take its instructions from the countdown.
    pub fn enter(&mut self) {
        self.a.sub_mem_imm(state(offset_of!(Core, countdown)), self.count as u8);
        let (branch, flags) = (self.a.jcc_later(cc::S), self.flags);
        self.cold.push(Cold::Leave { branch, flags });
    }

    /// The block's instructions, the last of which crosses into code page `second` if that is one.  Whether
    /// control goes on behind them.
    fn run(&mut self, insns: &[Instruction], second: Option<u32>) -> bool {
        for (i, insn) in insns.iter().enumerate() {
            self.index = i;
            if let Some(page) = second.filter(|_| i + 1 == insns.len()) {
                self.check_page(insn.ip(), page);
            }
            let open = self.instruction(insn);
            self.end_shadow();
            if !open {
                return false;
            }
            self.follow(insn);
        }
        true
    }

    /// A site at the current host address.
    pub fn site(&self, insn: &Instruction) -> Site {
        Site {
            next: 0,
            rip: insn.ip(),
            next_rip: insn.next_ip(),
            block: self.block,
            remaining: (self.count - self.index) as u8,
            is_vector: self.vector,
            flags: self.whereabouts(),
            is_group: false,
            is_crossing: false,
            prepared: 0,
            x87: self.x87,
        }
    }

    /// Interpret the instruction here.
    pub fn step(&mut self, insn: &Instruction) {
        self.call_step();
        let next = if super::kinds::ends_block(insn) { 0 } else { self.a.here() };
        let prepared = self.tools.prepared.push((*insn, route(insn))) + 1;
        let site = Site { next, prepared, ..self.site(insn) };
        self.tools.sites.push(site);
        self.flags = Flags { live: true, recorded: true, recipe: None };
        self.how_at_head = None;
        self.ready = [false; MAX_GROUPS];
        self.t0_group = None;
        self.x87 = 0;
        self.facts.interpreted();
    }

    /// The number of the next site.
    pub fn next_site(&self) -> u32 {
        self.tools.sites.next()
    }

    /// Call the interpreter for the site that is about to be pushed.
    fn call_step(&mut self) {
        let number = self.next_site();
        self.a.imm(T1, u64::from(number));
        self.a.moves(What::Site, 4);
        self.a.call(self.tools.glue.step);
    }

    /// Interpret the instruction at `rip`, which is not all in this page.
    fn step_across(&mut self, rip: u64) {
        self.call_step();
        let remaining = (self.count - self.index) as u8;
        self.tools.sites.push(Site {
            rip,
            remaining,
            block: self.block,
            is_vector: true,
            is_crossing: true,
            flags: self.whereabouts(),
            x87: self.x87,
            ..Site::default()
        });
    }

    /// Make sure that the page behind that of `rip` is still code page `page`, or interpret the
    /// crossing instruction at `rip`.
    fn check_page(&mut self, rip: u64, page: u32) {
        self.keep_flags();
        let branch = self.unless_page(rip + 4096, page);
        self.cold.push(Cold::Cross { branch, rip, flags: self.flags, x87: self.x87, index: self.index });
    }

    /// Emit a branch that is taken unless code page `page` is mapped at an address, as far as is
    /// known; the place of its displacement.
    fn unless_page(&mut self, address: u64, page: u32) -> usize {
        let entry = (address >> 12) as usize % super::tables::FETCH_ENTRIES;
        let pair = usize::from(!self.is_user) * super::tables::FETCH_ENTRIES;
        let disp = table(offset_of!(Tables, fetch)) + 4 * (pair + entry);
        self.a.cmp_mem32_imm(state(disp), page);
        self.a.moves(What::Page, 8);
        self.a.jcc_later(cc::NE)
    }

    /// Go to a known address.
    pub fn transfer(&mut self, target: u64) {
        self.note_accesses(0);
        self.end_shadow();
        self.settle_stack(target, 0);
        self.record_flags();
        self.record_x87();
        let branch = self.a.jmp_later();
        self.cold.push(Cold::Exit { branch, target, flags: self.flags, x87: 0, rest: 0 });
    }

    /// Go to a known address if a condition holds.
    pub fn transfer_if(&mut self, insn: &Instruction, cc: u8) {
        let target = insn.near_branch_target();
        self.end_shadow();
        self.settle_stack(insn.ip(), self.count - self.index);
        self.make_live();
        let rest = (self.count - self.index - 1) as u8;
        if rest == 0 {
            self.record_x87();
        }
        if self.flags.recipe.is_none() {
            self.record_flags();
        }
        if self.go_round(target, cc) {
            return;
        }
        if rest == 0 {
            self.record_flags();
        }
        let branch = self.a.jcc_later(cc);
        self.cold.push(Cold::Exit { branch, target, flags: self.flags, x87: self.x87, rest });
    }

    /// Go to the address in T0; `popped`: what the instruction added to RSP.
    pub fn transfer_indirect(&mut self, insn: &Instruction, popped: i32) {
        self.transfer_to_class(insn, popped, self.class);
    }

    /// The same, to code of a class ([`super::mode::class_of`]).
    pub fn transfer_to_class(&mut self, insn: &Instruction, popped: i32, class: usize) {
        self.note_accesses(0);
        self.record_flags();
        self.record_x87();
        let is_shadowed = self.end_shadow();
        let number = self.tools.indirects.push(Indirect { rip: insn.ip(), popped, is_shadowed });
        let m = state(table(offset_of!(Tables, indirect)));
        self.a.rm(&[], false, &[0xC7], 0, m); // mov dword m, imm32
        self.a.raw(&number.to_le_bytes());
        self.a.moves(What::Indirect, 4);
        self.a.lea32(T1, Mem::new(Some(T0), Some((T0, 3)), 0));
        self.a.rr(false, &[0xC1], 5, T1); // shr T1d, 4
        self.a.raw(&[4]);
        self.a.rr(false, &[0x81], 4, T1); // and T1d, JUMP_ENTRIES - 1
        self.a.raw(&(JUMP_ENTRIES as u32 - 1).to_le_bytes());
        let which = class * JUMP_ENTRIES * 8;
        let disp = table(offset_of!(Tables, jump)) + which;
        let m = Mem::new(Some(RSP), Some((T1, 3)), disp as i32);
        self.a.rm(&[], false, &[0xFF], 4, m); // jmp [m]
    }

    fn write_cold(&mut self, rip: u64) {
        let page = rip >> 12;
        for cold in std::mem::take(&mut self.cold) {
            let here = self.a.here();
            match cold {
                Cold::Fill { branch, back, kind, tag, site, group } => {
                    self.a.patch(branch, here);
                    self.a.sub_mem(T0, tag);
                    let apart = group.map(|(.., read)| self.if_readable(read));
                    self.a.imm(T1, u64::from(kind));
                    self.a.call(self.tools.glue.fill);
                    self.a.jmp(back);
                    // Where the fill fails, it finds the site's number here.
                    let number = self.next_site();
                    self.a.raw(&number.to_le_bytes());
                    self.a.moves(What::Site, 4);
                    let rip = site.rip;
                    self.tools.sites.push(site);
                    if let (Some(branch), Some((flags, rest, _))) = (apart, group) {
                        (self.flags, self.x87) = (flags, site.x87);
                        let mode = self.mode | super::mode::MODE_UNGROUPED;
                        self.write_exit(Some(branch), rip, rest, page, mode);
                    }
                }
                Cold::Cross { branch, rip, flags, x87, index } => {
                    self.a.patch(branch, here);
                    (self.index, self.flags, self.x87) = (index, flags, x87);
                    self.step_across(rip);
                }
                Cold::Step { branch, site } => {
                    self.a.patch(branch, here);
                    self.call_step();
                    self.tools.sites.push(site);
                }
                Cold::Outside { branch, other, rip, flags, x87, rest } => {
                    self.a.patch(branch, here);
                    self.write_other(other);
                    (self.flags, self.x87) = (flags, x87);
                    let mode = self.mode | super::mode::MODE_UNGROUPED;
                    self.write_exit(None, rip, rest, page, mode);
                }
                Cold::Flags { branch, back } => {
                    self.a.patch(branch, here);
                    self.a.call(self.tools.glue.flags);
                    self.a.jmp(back);
                }
                Cold::Leave { branch, flags } => {
                    self.a.patch(branch, here);
                    (self.flags, self.x87) = (flags, 0);
                    self.record_flags();
                    self.give_back(self.count as u8);
                    self.a.store_guest(state(offset_of!(Core, rip)), rip);
                    self.a.jmp(self.tools.glue.exit);
                }
                Cold::Exit { branch, target, flags, x87, rest } => {
                    (self.flags, self.x87) = (flags, x87);
                    let mode = self.mode & !super::mode::MODE_UNGROUPED;
                    self.write_exit(Some(branch), target, rest, page, mode);
                }
            }
        }
    }

    /// Where the jump at the head of an overwritten block leads ([`super::Dbt::invalidate`]): its
    /// address is looked up again.  The table of indirect targets has blocks with groups alone, so
    /// the head of one without them is linked to its successor.
    fn write_again(&mut self, rip: u64, main: u64) -> u64 {
        let again = self.a.here();
        if super::mode::has_groups(self.mode) {
            self.a.guest(T0, rip);
            let entry = self.class * JUMP_ENTRIES + super::tables::jump_index(rip);
            self.a.rm(&[], false, &[0xFF], 4, state(table(offset_of!(Tables, jump)) + 8 * entry)); // jmp [m]
            self.a.moves(What::Jump, 4);
        } else {
            self.leave_for(self.mode, rip, main + 1, false);
        }
        again
    }

    /// Leave, and have a link made at `place`.
    fn leave_for(&mut self, mode: u32, target: u64, place: u64, is_far: bool) {
        let out = self.a.here().wrapping_sub(place + 4) as i32;
        self.a.store_guest(state(offset_of!(Core, rip)), target);
        let request = state(table(offset_of!(Tables, request)));
        let number = self.tools.links.push(Link { target, place, mode, out, is_far, to: 0, noted: 0 });
        self.a.store_imm(request, number.into());
        self.a.moves(What::Link, 4);
        self.a.jmp(self.tools.glue.exit);
    }

    /// Give instructions that did not run back to the countdown.
    fn give_back(&mut self, count: u8) {
        self.a.rm(&[], true, &[0x83], 0, state(offset_of!(Core, countdown))); // add qword m, imm8
        self.a.raw(&[count]);
    }

    /// Emit a branch that is taken if the first level has the page of the linear address in T0 for
    /// reading, and so would not have failed but for a group's range, or because it writes.  T1,
    /// the offset of the place, is lost.
    fn if_readable(&mut self, read: Mem) -> usize {
        self.a.load(T1, read);
        self.a.rr(true, &[0x01], T0, T1); // add T1, T0
        self.a.cmp_imm(T1, 4095);
        self.a.jcc_later(cc::BE)
    }

    /// The way from a branch, or from here, to the block of some mode at `target`, where `rest` instructions of
    /// this one did not run.
    fn write_exit(&mut self, branch: Option<usize>, target: u64, rest: u8, page: u64, mode: u32) {
        let base = self.a.base;
        let is_near = target >> 12 == page;
        let here = self.a.here();
        if let Some(branch) = branch {
            self.a.patch(branch, here);
        }
        self.record_flags();
        self.record_x87();
        if rest > 0 {
            self.give_back(rest);
        }
        let miss = (!is_near).then(|| self.unless_page(target, 0));
        let direct = branch.filter(|_| self.a.here() == here);
        let place = direct.unwrap_or_else(|| self.a.jmp_later());
        let stub = self.a.here();
        for jump in miss.into_iter().chain([place]) {
            self.a.patch(jump, stub);
        }
        // (The number compared with is before the branch and the jump: PAGE_TO_PLACE.)
        self.leave_for(mode, target, base + place as u64, miss.is_some());
    }
}
