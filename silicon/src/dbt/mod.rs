//! The fast engine: a translator from x86 to x86.
//!
//! Guest and computer speak the same language, so nearly every instruction is emitted as itself.
//! What changes:
//!
//! * *Memory operands.*  The linear address is computed, looked up in the TLB's first level
//!   ([`crate::mmu::tlb::L1`], addressed off the stack pointer), and becomes a host pointer.  On a
//!   miss the entry is copied from the second level; if it is not there either, or the operand
//!   crosses a page, is no plain memory, or would overwrite code, the whole instruction is
//!   interpreted by [`crate::cpu::step`] and generated code goes on behind it.  So walks, faults,
//!   flags and counters are those of the reference engine by construction.
//! * *Control transfers* ([`block::Link`]).  Direct ones are linked block to block; into another
//!   page only while a small table says that the page is still mapped there.  Indirect ones go
//!   through a table to a landing pad that compares the whole address.
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
//! same time ([`crate::bus`]), each block begins with a look at the bell: so what another has written
//! over code is noticed before the next block, and a chain of blocks ends when somebody waits.

pub mod asm;
pub mod block;
pub mod cache;
mod callback;
mod clock;
mod code32;
pub mod flags;
pub mod gate;
pub mod glue;
pub mod groups;
pub mod home;
pub mod kinds;
pub mod lower;
pub mod map;
mod middle;
mod mode;
pub mod native;
pub mod record;
pub mod signals;
mod strings;
mod system;
pub mod tables;
pub mod transfer;
pub mod translate;
mod twin;
pub mod undefined;
mod x87;
pub mod zeroed;

use std::io;

use self::asm::Asm;
use self::block::{Block, Key, Link};
use self::cache::Cache;
use self::glue::Helpers;
use self::middle::Middles;
use self::mode::{MODE_UNGROUPED, MODE_VECTOR, class_of, has_groups, is_user, mode_key};
use self::tables::{FETCH_ENTRIES, JUMP_ENTRIES, NO_REQUEST, jump_index};
use self::translate::{Plan, Tools};
use self::zeroed::Zeroed;
use crate::addr::{AddressMap, PAGE_OFFSET};
use crate::arch::bits::{cr0, rflags};
use crate::code::{Holder, Writes};
use crate::cpu::fxstate;
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::step::step;
use crate::cpu::trap::{Exec, Trap};
use crate::engine::Engine;
use crate::mmu::tlb::{Entry, L1_CLASSES, perm};
use crate::mmu::walk::Access;
use crate::vmx;

pub(crate) const KIND_WRITE: u32 = 1 << 16;
pub(crate) const KIND_CLASS: u32 = 20;

/// The mode of a table of indirect targets that is empty.
const NO_MODE: u32 = u32::MAX;

/// A block found lately, under a generation of the tables.
#[derive(Clone, Copy, Default)]
struct Recent {
    rip: u64,
    mode: u32,
    generation: u32,
    block: u32,
}

/// The engine.
pub struct Dbt {
    cache: Cache,
    fixed: usize,
    _registration: signals::Registration,
    tools: Tools,
    blocks: Vec<Block>,
    index: AddressMap<Key, u32>,
    /// By frame: the blocks that were made of code in it.
    frames: Holder<Vec<u32>>,
    pages: AddressMap<(u64, u64), u32>,
    middles: Middles,
    /// What the fetch and jump tables were filled under: ASNs and the TLB's epoch.
    tables_of: (u32, u32, u64),
    /// The mode of the blocks in each table of indirect targets.
    jump_modes: [u32; L1_CLASSES],
    /// Which of their entries are in use.
    jump_used: [Vec<u16>; L1_CLASSES],
    /// Grow with every change of `tables_of`: of what concerns user mode, and the others.
    generations: [u32; 2],
    /// By [`jump_index`]: two blocks found lately, the last one first.
    recent: Zeroed<[Recent; 2]>,
    /// The tables for CPL 0 name a page that is not mapped globally.
    kernel_has_local: bool,
    trap: Option<Trap>,
    /// The next block is to be the version without groups.
    ungrouped: bool,
    translated_instructions: u64,
    translated_blocks: u64,
    invalidated: u64,
    flushes: u64,
    slow: u64,
    fills: u64,
    entered: u64,
}

/// The engine for a processor.
///
/// # Errors
/// If the computer gives no executable memory.
pub fn engine(core: &mut Core) -> io::Result<Box<dyn Engine>> {
    let mut cache = Cache::new()?;
    let mut a = Asm::new(cache.here());
    let helpers = Helpers {
        fill: callback::fill as *const () as u64,
        step: callback::interpret as *const () as u64,
        fault: callback::interpret_fault as *const () as u64,
        lookup: callback::lookup as *const () as u64,
        flags: callback::flags as *const () as u64,
    };
    let glue = glue::write(&mut a, helpers);
    cache.append(&a.bytes);
    core.jit.makers = glue.makers;
    let fixed = cache.used();
    let start = cache.base() + fixed as u64;
    let end = cache.base() + cache::CACHE_BYTES as u64;
    let registration = signals::register(start as usize..end as usize, glue.fault as usize, false)?;
    let frames = Holder::new(core.mem.clone());
    core.holder = frames.number();
    Ok(Box::new(Dbt {
        cache,
        fixed,
        _registration: registration,
        tools: Tools::new(glue),
        blocks: Vec::new(),
        index: AddressMap::default(),
        frames,
        pages: AddressMap::default(),
        middles: Middles::new(),
        tables_of: (0, 0, 0),
        jump_modes: [NO_MODE; L1_CLASSES],
        jump_used: Default::default(),
        generations: [0; 2],
        recent: Zeroed::new(JUMP_ENTRIES)?,
        kernel_has_local: false,
        trap: None,
        ungrouped: false,
        translated_instructions: 0,
        translated_blocks: 0,
        invalidated: 0,
        flushes: 0,
        slow: 0,
        fills: 0,
        entered: 0,
    }))
}

impl Engine for Dbt {
    fn run(&mut self, core: &mut Core) -> Exec<()> {
        core.jit.engine = std::ptr::from_mut(self) as usize;
        if core.is_parallel != self.tools.is_parallel {
            self.tools.is_parallel = core.is_parallel;
            self.flush_code(core);
        }
        let mut is_stuck = false;
        loop {
            self.sync(core);
            let is_short = core.countdown < translate::MAX_INSTRUCTIONS as i64;
            let is_asked = core.attention != 0 || core.agent.is_rung();
            if core.countdown <= 0 || is_asked || is_short && core.may_stop_early {
                return Ok(());
            }
            let request = std::mem::replace(&mut core.jit.request, NO_REQUEST);
            let link = self.tools.links.get(request as usize).copied();
            let is_stepped = std::mem::take(&mut is_stuck) || must_step(core);
            self.ungrouped |= link.is_some_and(|l| !has_groups(l.mode));
            let flushes = self.flushes;
            let block = if is_stepped { None } else { self.find(core, link)? };
            self.sync_tables(core); // the fetch may have displaced translations
            self.ungrouped = false;
            let Some(block) = block else {
                self.slow += 1;
                step(core)?;
                continue;
            };
            if i64::from(self.blocks[block as usize].count) > core.countdown {
                self.interpret_rest(core)?;
                continue;
            }
            if let Some(link) = link.filter(|_| flushes == self.flushes) {
                self.make_link(link, block);
            }
            let before = core.countdown;
            self.enter(core, block);
            // If a group failed, and the block without groups is too long for the budget.
            let is_left = self.ungrouped || core.jit.request != NO_REQUEST || core.agent.is_rung();
            is_stuck = core.countdown == before && !is_left;
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

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("translated_blocks", self.translated_blocks),
            ("translated_instructions", self.translated_instructions),
            ("code_bytes", self.cache.used() as u64),
            ("invalidated_blocks", self.invalidated),
            ("cache_flushes", self.flushes),
            ("interpreted", self.slow),
            ("fills", self.fills),
            ("entries", self.entered),
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
    }

    /// Drop what the fetch and jump tables say of pages that may be mapped elsewhere now.
    fn sync_tables(&mut self, core: &mut Core) {
        let now = (core.tlb.asn, core.tlb.global_asn, core.tlb.fetch_epoch);
        if now == self.tables_of {
            return;
        }
        let only_local = (now.1, now.2) == (self.tables_of.1, self.tables_of.2);
        self.tables_of = now;
        let keep_kernel = only_local && !std::mem::take(&mut self.kernel_has_local);
        for pair in 0..if keep_kernel { 1 } else { 2 } {
            self.generations[pair] = self.generations[pair].wrapping_add(1);
            core.jit.fetch[pair].fill(0);
        }
        self.empty_jumps(core, |mode| is_user(mode) || !keep_kernel);
    }

    /// Empty the tables of indirect targets whose mode is such.
    fn empty_jumps(&mut self, core: &mut Core, which: impl Fn(u32) -> bool) {
        for (n, mode) in self.jump_modes.iter_mut().enumerate() {
            if *mode != NO_MODE && which(*mode) {
                *mode = NO_MODE;
                for slot in self.jump_used[n].drain(..) {
                    core.jit.jump[n][usize::from(slot)] = self.tools.glue.indirect;
                }
            }
        }
    }

    /// Enter a block into its table of indirect targets.
    fn set_jump(&mut self, core: &mut Core, number: u32) {
        let b = &self.blocks[number as usize];
        let (table, slot) = (class_of(b.key.mode), jump_index(b.key.rip));
        let entry = &mut core.jit.jump[table][slot];
        if *entry == self.tools.glue.indirect {
            self.jump_used[table].push(slot as u16);
        }
        *entry = b.landing;
    }

    /// What of the processor's state is built into the code that runs now.  `None` if it has to
    /// be interpreted.  The tables of indirect targets know no other blocks afterwards.
    fn mode_now(&mut self, core: &mut Core) -> Option<u32> {
        let mode = mode_key(core)?;
        let table = class_of(mode);
        if self.jump_modes[table] != mode {
            let other = self.jump_modes[table];
            if core.jit.jump[table][0] == 0 {
                core.jit.jump[table].fill(self.tools.glue.indirect); // its first use
            }
            self.empty_jumps(core, |m| m == other || (m ^ mode) & MODE_VECTOR != 0);
            self.jump_modes[table] = mode;
        }
        Some(mode)
    }

    /// Interpret the last instructions before a deadline: too few for a block.
    fn interpret_rest(&mut self, core: &mut Core) -> Exec<()> {
        while core.countdown > 0 && core.attention == 0 && !core.agent.is_rung() {
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
            None if core.countdown < translate::MAX_INSTRUCTIONS as i64 => return Ok(None),
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
        let blocks = in_frame.into_iter().flatten().map(|&n| &self.blocks[n as usize]);
        !is_target && self.middles.is_cold(key, blocks)
    }

    /// Enter a block into the tables that generated code looks at.
    fn remember(&mut self, core: &mut Core, number: u32) {
        let b = &self.blocks[number as usize];
        let pair = usize::from(!is_user(b.key.mode));
        let is_global = core.tlb.lookup_fetch(b.key.rip >> 12).is_some_and(|e| e.perm & perm::GLOBAL != 0);
        self.kernel_has_local |= pair == 1 && !is_global;
        let page = page_number(&mut self.pages, b.key.rip, b.key.hpa);
        core.jit.fetch[pair][(b.key.rip >> 12) as usize % FETCH_ENTRIES] = page;
        if has_groups(b.key.mode) {
            self.set_jump(core, number);
        }
    }

    fn translate(&mut self, core: &mut Core, key: Key) -> Option<u32> {
        if !self.cache.has_room() {
            self.flush_code(core);
        }
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
        let number = self.blocks.len() as u32;
        let second = self.second_page(core, key.rip);
        let plan = Plan { key, number, here: self.cache.here(), how: core.jit.record.how };
        let index = &self.index;
        let hpa = |rip: u64| key.hpa.wrapping_add(rip.wrapping_sub(key.rip));
        let is_known = |rip: u64| index.contains_key(&Key { rip, hpa: hpa(rip), ..key });
        let t = translate::translate(&mut self.tools, plan, bytes, second.as_ref(), is_known)?;
        let second = second.filter(|_| t.uses_second).map(|s| s.hpa);
        self.cache.append(&t.code);
        self.translated_blocks += 1;
        self.translated_instructions += u64::from(t.count);
        self.blocks.push(Block {
            key,
            bytes: t.bytes,
            second,
            count: t.count,
            main: t.main,
            landing: t.landing,
            again: t.again,
            is_dead: false,
        });
        self.index.insert(key, number);
        self.hold(core, key.hpa).push(number);
        if let Some(hpa) = second {
            self.hold(core, hpa).push(number);
        }
        Some(number)
    }

    /// Hold the frame of `hpa`, and nobody may write there without asking.
    fn hold(&mut self, core: &mut Core, hpa: u64) -> &mut Vec<u32> {
        let pfn = hpa >> 12;
        let (is_new, in_frame) = self.frames.hold(pfn);
        if is_new {
            let host = core.mem.host_ptr(hpa & !PAGE_OFFSET) as u64;
            core.tlb.l1_protect_where(|page| page == host);
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
    fn make_link(&mut self, link: Link, number: u32) {
        let b = &self.blocks[number as usize];
        if link.target != b.key.rip || link.mode != b.key.mode || b.is_dead {
            return;
        }
        if let Some(place) = link.page_place {
            let page = self.pages[&(b.key.rip >> 12, b.key.hpa >> 12)];
            self.cache.patch(place, &page.to_le_bytes());
        }
        self.cache.patch_jump(link.place, b.main);
    }

    fn enter(&mut self, core: &mut Core, number: u32) {
        self.entered += 1;
        core.flags_to_jit();
        look(core);
        self.cache.serialize();
        gate::enter(self.tools.glue.enter, core, self.blocks[number as usize].main);
        core.flags_from_record();
        fxstate::normalize(&mut core.fx);
        self.tell_x87(core, 0, |core| core.fx.pending() != 0);
    }

    /// Drop the translations of code that overlaps `len` bytes at `hpa` (inside one frame).
    fn invalidate(&mut self, core: &mut Core, hpa: u64, len: u64) {
        let pfn = hpa >> 12;
        let Some(in_frame) = self.frames.get_mut(pfn) else { return };
        let (blocks, cache, index) = (&mut self.blocks, &mut self.cache, &mut self.index);
        let indirect = self.tools.glue.indirect;
        let mut dropped = 0;
        in_frame.retain(|&n| {
            let b = &mut blocks[n as usize];
            if b.is_dead {
                return false; // dropped through its other page
            }
            let overlaps = b.overlaps(hpa, len);
            if overlaps {
                b.is_dead = true;
                index.remove(&b.key);
                let entry = &mut core.jit.jump[class_of(b.key.mode)][jump_index(b.key.rip)];
                if *entry == b.landing {
                    *entry = indirect;
                }
                let rel = b.again.wrapping_sub(b.main + 5) as u32;
                let mut jump = [0xE9, 0, 0, 0, 0];
                jump[1..].copy_from_slice(&rel.to_le_bytes());
                cache.patch(b.main, &jump);
                dropped += 1;
            }
            !overlaps
        });
        self.invalidated += dropped;
        self.middles.forget();
        if in_frame.is_empty() {
            self.frames.release(pfn);
        }
    }

    fn flush_code(&mut self, core: &mut Core) {
        self.cache.truncate(self.fixed);
        self.blocks.clear();
        self.index.clear();
        self.frames.release_all();
        self.tools.clear();
        self.pages.clear();
        self.middles.forget();
        self.tables_of = (0, 0, 0);
        self.generations = self.generations.map(|g| g.wrapping_add(1));
        core.jit.request = NO_REQUEST;
        core.jit.fetch = [[0; FETCH_ENTRIES]; 2];
        self.empty_jumps(core, |_| true);
        self.flushes += 1;
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

/// Whether the next instruction has debug conditions or alignment to look after.
fn must_step(core: &Core) -> bool {
    must_step_but(core, 0)
}

/// The same, some bits of RFLAGS aside.
fn must_step_but(core: &Core, aside: u64) -> bool {
    core.rflags & !aside & (rflags::TF | rflags::RF) != 0
        || core.dr[7] & 0xFF != 0
        || core.pending_db != 0
        || (core.cpl == 3 && core.flag(rflags::AC) && core.cr0 & cr0::AM != 0)
}
