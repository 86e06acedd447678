//! The fast engine: a translator from x86 to x86.
//!
//! Guest and computer speak the same language, so nearly every instruction is emitted as itself.
//! What changes:
//!
//! * *Memory operands.*  The linear address is computed, looked up in the TLB's first level
//!   ([`crate::mmu::tlb::L1`], addressed off the stack pointer), and becomes a host pointer.  On a
//!   miss the entry is copied from the second level, after a walk if the instruction begins with
//!   reading there; if there is none, or the operand crosses a page, is no plain memory, or would
//!   overwrite code, the whole instruction is interpreted by [`crate::cpu::step`] and generated code
//!   goes on behind it.  So walks, faults, flags and counters are those of the reference engine by
//!   construction.
//! * *Windows* ([`crate::mmu::window`]).  Programs that compute access memory as it is, in addresses
//!   where the computer's own page tables have what the TLB holds ([`window`]).  32-bit ones cannot
//!   leave theirs; of 64-bit ones bases are checked ([`arena`], [`facts`]).  Who gets one:
//!   [`promotion`].
//! * *Control transfers* ([`block::Link`]).  Direct ones are linked block to block; into another
//!   page only while a small table says that the page is still mapped there.  Indirect ones go
//!   through a table to a landing pad that compares the whole address.  A loop that is one block
//!   is translated twice: its later rounds begin with what the first one proved ([`rounds`]).
//! * *Programs that lie elsewhere.*  Code of a 64-bit program that was translated at another address has
//!   that translation copied and changed instead ([`moved`], [`find`]).
//! * *Everything sensitive* is interpreted in place, but for the short ones of what kernels do all
//!   the time ([`system`]).
//! * *32-bit code* with flat segments runs like 64-bit code, its addresses 32 bits wide
//!   ([`code32`]); other 32-bit code, and 16-bit code, is interpreted.
//!
//! Registers: [`map`].  Flags ([`flags`], [`record`]): a check spoils the computer's, so they are
//! made again from the operands that they came from; between blocks those are in a record.  They
//! are exact at every fault and stop.
//!
//! The instruction budget is exact: each block takes its length from `countdown` at its head; when
//! that does not cover it, the interpreter does the rest.  An instruction that is interpreted, or
//! faults, inside a block gives back what was not retired.
//!
//! Self-modifying code: frames with translations are marked in [`crate::mem::Memory`]; writes to
//! them never get a first-level entry, so they are interpreted and noticed.  Where others run at the
//! same time ([`crate::bus`]), whoever rings interrupts the countdown: so what another has written over
//! code is noticed before he goes on, and a chain of blocks ends when somebody waits.

mod arena;
pub mod asm;
mod avx;
pub mod block;
pub mod cache;
mod callback;
mod clock;
mod code32;
pub mod drop;
mod facts;
mod find;
pub mod flags;
pub mod gate;
pub mod glue;
pub mod groups;
mod guess;
pub mod home;
pub mod kinds;
mod levels;
pub mod lower;
pub mod map;
mod middle;
mod mode;
pub mod moved;
pub mod native;
pub mod nudge;
mod numbered;
pub mod promotion;
pub mod record;
pub mod reserved;
mod rounds;
pub mod signals;
mod strings;
mod system;
pub mod tables;
pub mod tools;
pub mod transfer;
pub mod translate;
mod twin;
pub mod undefined;
mod window;
mod x87;
pub mod zeroed;

use std::io;

use self::asm::Asm;
use self::block::{Block, Key, PAGE_TO_PLACE};
use self::cache::{Cache, REGIONS};
use self::glue::Helpers;
use self::middle::Middles;
use self::mode::{MODE_AVX, MODE_VECTOR, class_of, has_groups, is_user, mode_key, must_step};
use self::moved::Movable;
use self::numbered::{Numbered, region_of};
use self::promotion::{Promotion, Windows};
use self::tables::{FETCH_ENTRIES, JUMP_ENTRIES, NO_MODE, NO_REQUEST, Used, jump_index};
use self::tools::Tools;
use self::zeroed::Zeroed;
use crate::addr::AddressMap;
use crate::code::{Holder, Writes};
use crate::cpu::decode::MAX_LENGTH;
use crate::cpu::fxstate;
use crate::cpu::state::Core;
use crate::cpu::step::step;
use crate::cpu::trap::{Exec, Trap};
use crate::engine::Engine;
use crate::mmu::tlb::L1_CLASSES;
use crate::mmu::window::Current;
use crate::vmx;

pub(crate) const KIND_WRITE: u32 = 1 << 16;
/// The first thing that the instruction does beside its fetch is to access what is there.
pub(crate) const KIND_FIRST: u32 = 1 << 17;
/// It writes there.  (What is checked may be written by others of its group alone.)
pub(crate) const KIND_WRITES: u32 = 1 << 18;
pub(crate) const KIND_CLASS: u32 = 20;
/// How far behind the address that is: at most [`MAX_OFFSET`].
pub(crate) const KIND_OFFSET: u32 = 22;
const MAX_OFFSET: u32 = 0x3FF;

/// A block found lately, under a generation of the tables.
#[derive(Clone, Copy, Default)]
struct Recent {
    rip: u64,
    mode: u32,
    block: u32,
    generation: u64,
}

/// The engine.
pub struct Dbt {
    cache: Cache,
    _registration: signals::Registration,
    tools: Tools,
    blocks: Numbered<Block>,
    /// By region: the links from other regions to blocks in it, and some that were.
    incoming: [Vec<u32>; REGIONS],
    index: AddressMap<Key, u32>,
    /// By frame: the blocks that were made of code in it.
    frames: Holder<Vec<u32>>,
    pages: AddressMap<(u64, u64), u32>,
    middles: Middles,
    /// Blocks that can be moved to other addresses.
    movable: Movable,
    /// What the fetch and jump tables were filled under: ASNs and the TLB's epoch.
    tables_of: (u32, u32, u64),
    /// Which entries of the tables of indirect targets may be in use.
    jump_used: [Used<{ JUMP_ENTRIES / 64 }>; L1_CLASSES],
    /// Which entries of the fetch tables may be in use.
    fetch_used: [Used<{ FETCH_ENTRIES / 64 }>; 2],
    /// Grow with every change of `tables_of`: of what concerns user mode, and the others.
    generations: [u64; 2],
    /// By [`jump_index`]: two blocks found lately, the last one first.
    recent: Zeroed<[Recent; 2]>,
    /// The tables for CPL 0 name a page that is not mapped globally.
    kernel_has_local: bool,
    trap: Option<Trap>,
    /// What became of the walk for an instruction's first access, which is to be interpreted now.
    walked: Option<Exec<()>>,
    promotion: Promotion,
    /// The access that is interpreted was to be in a window, and is in none of its arenas.
    is_astray: bool,
    /// The window that the base of GS is for, if that is known: before generated code is entered, the
    /// current one.
    window: Option<Current>,
    /// The window with which code in the programs' table of indirect targets runs.
    window_of_jumps: Option<Current>,
    /// The next block is to be the version without groups.
    ungrouped: bool,
    /// Where a jump led to that has no block.
    sought: Option<u64>,
    translated_instructions: u64,
    translated_blocks: u64,
    /// Blocks made of those at other addresses.
    moved: u64,
    emitted_bytes: u64,
    invalidated: u64,
    /// Regions of the cache that were emptied to be filled again.
    recycled: u64,
    flushes: u64,
    slow: u64,
    fills: u64,
    /// Entries from the dispatcher.
    entered: u64,
    /// Look-ups of indirect targets that their table did not have.
    lookups: u64,
    /// Links made.
    links: u64,
}

/// The engine for a processor, with so many bytes for code ([`Cache::new`]).
///
/// # Errors
/// If the computer gives no executable memory.
pub fn engine(core: &mut Core, code_bytes: usize) -> io::Result<Box<dyn Engine>> {
    let mut cache = Cache::new(code_bytes)?;
    let mut a = Asm::new(cache.here());
    let helpers = Helpers {
        fill: callback::fill as *const () as u64,
        step: callback::interpret as *const () as u64,
        fault: callback::interpret_fault as *const () as u64,
        lookup: callback::lookup as *const () as u64,
        flags: callback::flags as *const () as u64,
        time: callback::time as *const () as u64,
    };
    let glue = glue::write(&mut a, helpers);
    cache.append(&a.bytes);
    core.jit.makers = glue.makers;
    core.jit.jump_modes = [NO_MODE; L1_CLASSES];
    cache.fix();
    let start = cache.here();
    let end = cache.base() + cache.bytes() as u64;
    let registration = signals::register(start as usize..end as usize, glue.fault as usize, false)?;
    let frames = Holder::new(core.mem.clone());
    core.holder = frames.number();
    Ok(Box::new(Dbt {
        cache,
        _registration: registration,
        tools: Tools::new(glue),
        blocks: Numbered::default(),
        incoming: Default::default(),
        index: AddressMap::default(),
        frames,
        pages: AddressMap::default(),
        middles: Middles::new(),
        movable: Movable::new()?,
        tables_of: (0, 0, 0),
        jump_used: Default::default(),
        fetch_used: Default::default(),
        generations: [0; 2],
        recent: Zeroed::new(JUMP_ENTRIES)?,
        kernel_has_local: false,
        trap: None,
        walked: None,
        promotion: Promotion::default(),
        is_astray: false,
        window: None,
        window_of_jumps: None,
        ungrouped: false,
        sought: None,
        translated_instructions: 0,
        translated_blocks: 0,
        moved: 0,
        emitted_bytes: 0,
        invalidated: 0,
        recycled: 0,
        flushes: 0,
        slow: 0,
        fills: 0,
        entered: 0,
        lookups: 0,
        links: 0,
    }))
}

impl Engine for Dbt {
    fn run(&mut self, core: &mut Core) -> Exec<()> {
        core.jit.engine = std::ptr::from_mut(self) as usize;
        let _running = gate::running(core);
        self.window = None; // another thread has another, and others ran on this one
        let mut is_stuck = false;
        loop {
            self.sync(core);
            self.promotion.consider(core, self.fills);
            let is_short = core.countdown.get() < translate::MAX_INSTRUCTIONS as i64;
            let is_asked = core.attention != 0 || core.agent.is_rung();
            if core.countdown.get() <= 0 || is_asked || is_short && core.may_stop_early {
                return Ok(());
            }
            let request = std::mem::replace(&mut core.jit.request, NO_REQUEST);
            let link = self.tools.links.get(request as u32).copied();
            let is_stepped = std::mem::take(&mut is_stuck) || must_step(core);
            let is_without = link.is_some_and(|l| !has_groups(l.mode));
            self.ungrouped |= is_without;
            let link = link.filter(|_| !is_without || self.learn(core));
            let before = (self.flushes, self.recycled);
            let sought = self.sought.take();
            let is_target = [link.map(|l| l.target), sought].contains(&Some(core.rip));
            let block = if is_stepped { None } else { self.find(core, is_target)? };
            self.sync_tables(core); // the fetch may have displaced translations
            self.ungrouped = false;
            let Some(block) = block else {
                self.interpret_piece(core)?;
                continue;
            };
            if i64::from(self.blocks[block].count) > core.countdown.get() {
                self.interpret_rest(core)?;
                continue;
            }
            if link.is_some() && before == (self.flushes, self.recycled) {
                self.make_link(request as u32, block);
            }
            let before = core.countdown.get();
            self.enter(core, block);
            // If a group failed, and the block without groups is too long for the budget.
            let is_left = self.ungrouped || core.jit.request != NO_REQUEST || core.agent.is_rung();
            is_stuck = core.countdown.get() == before && !is_left;
            if let Some(trap) = self.trap.take() {
                core.jit.request = NO_REQUEST;
                return Err(trap);
            }
        }
    }

    fn settle(&mut self, core: &mut Core) {
        if !core.code_writes.is_empty() {
            for (hpa, len) in std::mem::take(&mut core.code_writes) {
                self.invalidate(core, hpa, len);
                if self.frames.is_shared(hpa >> 12) {
                    core.mem.report_code(hpa >> 12, core.holder, &core.agent);
                }
            }
        }
    }

    fn flush(&mut self, core: &mut Core) {
        self.flush_code(core);
    }

    fn use_windows(&mut self, core: &mut Core, windows: Windows) {
        self.promotion.set(core, windows);
    }

    fn statistics(&self, core: &Core) -> Vec<(&'static str, u64)> {
        let windows = core.tlb.windows.counts;
        vec![
            ("translated_blocks", self.translated_blocks),
            ("moved_blocks", self.moved),
            ("translated_instructions", self.translated_instructions),
            ("emitted_bytes", self.emitted_bytes),
            ("code_bytes", self.cache.used() as u64),
            ("blocks", self.blocks.len() as u64),
            ("note_bytes", (0..REGIONS).map(|region| self.note_bytes(region) as u64).sum()),
            ("code_pages", self.pages.len() as u64),
            ("invalidated_blocks", self.invalidated),
            ("cache_recycled", self.recycled),
            ("cache_flushes", self.flushes),
            ("interpreted", self.slow),
            ("fills", self.fills),
            ("entries", self.entered),
            ("lookups", self.lookups),
            ("links", self.links),
            ("windows_opened", windows.opened),
            ("window_fills", windows.filled),
            ("window_drops", windows.dropped),
            ("window_strays", windows.strayed),
        ]
    }
}

impl Dbt {
    /// Bring shortcuts up to date with what happened to translations and to code.
    fn sync(&mut self, core: &mut Core) {
        self.settle(core);
        let frames = match self.frames.writes() {
            Writes::Frames(frames) => frames,
            Writes::TooMany => self.frames.keys().copied().collect(),
        };
        for pfn in frames {
            self.invalidate(core, pfn << 12, 4096);
        }
        self.sync_tables(core);
        let rules = core.l1_rules();
        core.tlb.own_l1(rules);
        let window = core.tlb.windows.current();
        if std::mem::replace(&mut self.window_of_jumps, window) != window {
            self.empty_jumps(core, is_user);
            core.jit.jump_modes[0] = NO_MODE;
        }
    }

    /// Drop what the fetch and jump tables say of pages that may be mapped elsewhere now.
    fn sync_tables(&mut self, core: &mut Core) {
        let now = (core.tlb.asn, core.tlb.global_asn, core.tlb.fetch_epoch);
        if now == self.tables_of {
            return;
        }
        if now.0 != self.tables_of.0 {
            self.promotion.begin(core, self.fills);
        }
        let only_local = (now.1, now.2) == (self.tables_of.1, self.tables_of.2);
        self.tables_of = now;
        let keep_kernel = only_local && !std::mem::take(&mut self.kernel_has_local);
        for pair in 0..if keep_kernel { 1 } else { 2 } {
            self.generations[pair] += 1;
            self.fetch_used[pair].drain(|entry| core.jit.fetch[pair][entry] = 0);
        }
        self.empty_jumps(core, |mode| is_user(mode) || !keep_kernel);
    }

    /// Enter a block into its table of indirect targets.
    fn set_jump(&mut self, core: &mut Core, number: u32) {
        let b = &self.blocks[number];
        let (table, slot) = (class_of(b.key.mode), jump_index(b.key.rip));
        self.jump_used[table].add(slot);
        core.jit.jump[table][slot] = b.landing();
    }

    /// What of the processor's state is built into the code that runs now.  `None` if it has to
    /// be interpreted.  The tables of indirect targets know no other blocks afterwards.
    fn mode_now(&mut self, core: &mut Core) -> Option<u32> {
        let mode = mode_key(core)?;
        let table = class_of(mode);
        if core.jit.jump_modes[table] != mode {
            let other = core.jit.jump_modes[table];
            if core.jit.jump[table][0] == 0 {
                core.jit.jump[table].fill(self.tools.glue.indirect); // its first use
            }
            self.empty_jumps(core, |m| m == other || (m ^ mode) & (MODE_VECTOR | MODE_AVX) != 0);
            core.jit.jump_modes[table] = mode;
        }
        // (Kernels, too: their SYSRET goes on in the window.)
        if self.window != core.tlb.windows.current() {
            self.window = core.tlb.windows.current();
            self.window.into_iter().for_each(|window| window::enter(&mut core.jit, window));
        }
        Some(mode)
    }

    /// Interpret up to a jump, or until the dispatcher has to look.
    fn interpret_piece(&mut self, core: &mut Core) -> Exec<()> {
        let cpl = core.cpl;
        for _ in 0..translate::MAX_INSTRUCTIONS {
            let before = core.rip;
            self.slow += 1;
            step(core)?;
            let is_straight = core.rip.wrapping_sub(before) <= MAX_LENGTH as u64;
            self.sought = (!is_straight && core.cpl == cpl).then_some(core.rip);
            let is_asked = core.attention != 0 || core.agent.is_rung() || !core.code_writes.is_empty();
            if !is_straight || is_asked || core.countdown.get() <= 0 || must_step(core) {
                break;
            }
        }
        Ok(())
    }

    /// Interpret the last instructions before a deadline: too few for a block.
    fn interpret_rest(&mut self, core: &mut Core) -> Exec<()> {
        while core.countdown.get() > 0 && core.attention == 0 && !core.agent.is_rung() {
            self.slow += 1;
            step(core)?;
        }
        Ok(())
    }

    /// Make the link that generated code asked for when it left, now that its target is known.
    fn make_link(&mut self, link: u32, number: u32) {
        let (place, region) = (&mut self.tools.links[link], region_of(number));
        let b = &self.blocks[number];
        if place.target != b.key.rip || place.mode != b.key.mode || b.is_dead {
            return;
        }
        if place.is_far {
            let page = self.pages[&(b.key.rip >> 12, b.key.hpa >> 12)];
            self.cache.patch(place.place - PAGE_TO_PLACE, &page.to_le_bytes());
        }
        self.links += 1;
        self.cache.patch_jump(place.place, b.main);
        place.to = region as u8;
        if region != region_of(link) && place.noted & 1 << region == 0 {
            place.noted |= 1 << region;
            self.incoming[region].push(link);
        }
    }

    fn enter(&mut self, core: &mut Core, number: u32) {
        core.countdown.settle();
        core.heed();
        self.entered += 1;
        core.flags_to_jit();
        look(core);
        self.cache.serialize();
        gate::enter(self.tools.glue.enter, core, self.blocks[number].main);
        core.flags_from_record();
        fxstate::normalize(&mut core.fx);
        self.tell_x87(core, 0, |core| core.fx.pending() != 0);
    }
}

/// Note whether generated code may set RFLAGS.IF and go on.
fn look(core: &mut Core) {
    core.jit.is_open = u64::from(vmx::events::is_open(core));
}
