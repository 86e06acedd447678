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
use self::block::{Block, Key, Link, NO_PAGE, PAGE_TO_PLACE};
use self::cache::{Cache, REGIONS};
use self::glue::Helpers;
use self::middle::Middles;
use self::mode::{MODE_AVX, MODE_UNGROUPED, MODE_VECTOR, class_of, has_groups, is_user, mode_key, must_step};
use self::numbered::{Numbered, region_of};
use self::promotion::{Promotion, Windows};
use self::tables::{FETCH_ENTRIES, JUMP_ENTRIES, NO_MODE, NO_REQUEST, Used, jump_index};
use self::tools::Tools;
use self::translate::Plan;
use self::zeroed::Zeroed;
use crate::addr::{AddressMap, PAGE_OFFSET};
use crate::arch::segment::seg;
use crate::code::{Holder, Writes};
use crate::cpu::fxstate;
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::step::step;
use crate::cpu::trap::{Exec, Trap};
use crate::engine::Engine;
use crate::mmu::tlb::{Entry, L1_CLASSES, perm};
use crate::mmu::walk::Access;
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
    translated_instructions: u64,
    translated_blocks: u64,
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
        translated_instructions: 0,
        translated_blocks: 0,
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
            let block = if is_stepped { None } else { self.find(core, link)? };
            self.sync_tables(core); // the fetch may have displaced translations
            self.ungrouped = false;
            let Some(block) = block else {
                self.slow += 1;
                step(core)?;
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

    /// Interpret the last instructions before a deadline: too few for a block.
    fn interpret_rest(&mut self, core: &mut Core) -> Exec<()> {
        while core.countdown.get() > 0 && core.attention == 0 && !core.agent.is_rung() {
            self.slow += 1;
            step(core)?;
        }
        Ok(())
    }

    /// The block for RIP, translating it if need be; `None` if RIP's instruction is to be
    /// interpreted.  `link`: the one that is to be made, if any.
    fn find(&mut self, core: &mut Core, link: Option<Link>) -> Exec<Option<u32>> {
        let Some(mut mode) = self.mode_now(core) else { return Ok(None) };
        if std::mem::take(&mut self.ungrouped) {
            mode |= MODE_UNGROUPED;
        }
        let rip = core.rip;
        let linear = segment::code_linear(core, rip)?;
        let (hpa, special) = core.translate(linear, Access::Fetch)?;
        if special {
            return Ok(None);
        }
        let key = Key { rip, hpa, mode };
        let number = match self.index.get(&key).copied() {
            Some(n) => n,
            // (Where a run was broken off, code would be translated that nobody jumps to.)
            None if core.countdown.get() < translate::MAX_INSTRUCTIONS as i64 => return Ok(None),
            None if has_groups(mode) && self.is_cold(&key, link) => return Ok(None),
            None => match self.translate(core, key) {
                Some(n) => n,
                None => return Ok(None),
            },
        };
        self.remember(core, number);
        Ok(Some(number))
    }

    /// Whether to interpret the instruction at `key` because nothing jumps there.  (To a block
    /// without groups something does.)
    fn is_cold(&mut self, key: &Key, link: Option<Link>) -> bool {
        let is_target = link.is_some_and(|link| link.target == key.rip);
        let in_frame = self.frames.get(&(key.hpa >> 12));
        let blocks = in_frame.into_iter().flatten().map(|&n| &self.blocks[n]);
        !is_target && self.middles.is_cold(key, blocks)
    }

    /// Enter a block into the tables that generated code looks at.
    fn remember(&mut self, core: &mut Core, number: u32) {
        let b = &self.blocks[number];
        let pair = usize::from(!is_user(b.key.mode));
        let is_global = core.tlb.lookup_fetch(b.key.rip >> 12).is_some_and(|e| e.perm & perm::GLOBAL != 0);
        self.kernel_has_local |= pair == 1 && !is_global;
        let page = page_number(&mut self.pages, b.key.rip, b.key.hpa);
        let entry = (b.key.rip >> 12) as usize % FETCH_ENTRIES;
        self.fetch_used[pair].add(entry);
        core.jit.fetch[pair][entry] = page;
        if has_groups(b.key.mode) {
            self.set_jump(core, number);
        }
    }

    fn translate(&mut self, core: &mut Core, key: Key) -> Option<u32> {
        self.make_room(core);
        if !core.mem.contains(key.hpa, 1) {
            return None;
        }
        self.hold(core, key.hpa); // before the code is read
        let number = self.translate_held(core, key);
        let pfn = key.hpa >> 12;
        if self.frames.get(&pfn).is_some_and(Vec::is_empty) {
            self.frames.release(pfn);
        }
        number
    }

    fn translate_held(&mut self, core: &mut Core, key: Key) -> Option<u32> {
        let room = 4096 - (key.hpa & PAGE_OFFSET);
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..room as usize];
        if !core.mem.read_bytes(key.hpa, bytes) {
            return None;
        }
        let number = self.blocks.next();
        let second = self.second_page(core, key.rip);
        let (here, how) = (self.cache.here(), core.record.how);
        let plan = Plan { key, number, here, how, registers: core.gpr, fs: core.seg[seg::FS].base };
        let index = &self.index;
        let hpa = |rip: u64| key.hpa.wrapping_add(rip.wrapping_sub(key.rip));
        let is_known = |rip: u64| index.contains_key(&Key { rip, hpa: hpa(rip), ..key });
        let peek = |gva: u64| guess::peek(core, gva);
        let t = translate::translate(&mut self.tools, plan, bytes, second.as_ref(), is_known, &peek)?;
        let second = second.filter(|_| t.uses_second).map_or(NO_PAGE, |s| s.hpa);
        self.cache.append(&t.code);
        self.emitted_bytes += t.code.len() as u64;
        self.translated_blocks += 1;
        self.translated_instructions += u64::from(t.count);
        self.blocks.push(Block {
            key,
            second,
            main: t.main,
            head: (t.main - t.landing) as u8,
            tail: (t.again - t.main) as u32,
            bytes: t.bytes,
            count: t.count,
            is_dead: false,
        });
        self.index.insert(key, number);
        self.hold(core, key.hpa).push(number);
        if second != NO_PAGE {
            self.hold(core, second).push(number);
        }
        Some(number)
    }

    /// Hold the frame of `hpa`, and nobody may write there without asking.
    fn hold(&mut self, core: &mut Core, hpa: u64) -> &mut Vec<u32> {
        let pfn = hpa >> 12;
        let (is_new, in_frame) = self.frames.hold(pfn);
        if is_new {
            let (base, frame) = (core.mem.base() as u64, hpa & !PAGE_OFFSET);
            core.tlb.l1_protect_where(base, |page| page == base + frame);
            let change = core.tell_mark();
            if core.is_parallel && core.mem.code().is_granted(pfn) {
                core.agent.clone().wait_for(change, || core.catch_up());
                core.mem.code().revoke(pfn);
            }
        }
        in_frame
    }

    /// The page behind that of `rip`, if the program could go on there without a walk.
    fn second_page(&mut self, core: &Core, rip: u64) -> Option<translate::Second> {
        let behind = (rip | PAGE_OFFSET).wrapping_add(1);
        let entry = fetchable(core, behind)?;
        let mut bytes = [0; 14];
        core.mem.read_bytes(entry.hpa, &mut bytes).then_some(())?;
        let page = page_number(&mut self.pages, behind, entry.hpa);
        Some(translate::Second { bytes, page, hpa: entry.hpa })
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

/// The fetch translation of an address that the program may use now without a walk.
fn fetchable(core: &Core, rip: u64) -> Option<Entry> {
    let entry = *core.tlb.lookup_fetch(rip >> 12)?;
    let is_usable = entry.perm & perm::SPECIAL == 0 && segment::is_canonical(rip);
    (is_usable && core.allows(&entry, Access::Fetch)).then_some(entry)
}

/// The number of a code page: of a frame at a linear page.
fn page_number(pages: &mut AddressMap<(u64, u64), u32>, rip: u64, hpa: u64) -> u32 {
    let next = pages.len() as u32 + 1;
    *pages.entry((rip >> 12, hpa >> 12)).or_insert(next)
}
