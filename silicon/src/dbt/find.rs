//! The block for an address: one that is there, one that is moved there ([`super::moved`]), or one that is
//! translated.

use super::block::{Block, Key, NO_PAGE};
use super::mode::{MODE_UNGROUPED, has_groups, is_user};
use super::moved::Begin;
use super::tables::FETCH_ENTRIES;
use super::translate::{self, Plan};
use super::{Dbt, guess};
use crate::addr::{AddressMap, PAGE_OFFSET};
use crate::arch::segment::seg;
use crate::cpu::segment;
use crate::cpu::state::Core;
use crate::cpu::trap::Exec;
use crate::mmu::tlb::{Entry, perm};
use crate::mmu::walk::Access;

impl Dbt {
    /// The block for RIP, translating it if need be; `None` if RIP's instruction is to be
    /// interpreted.  `is_target`: a jump led there.
    pub(super) fn find(&mut self, core: &mut Core, is_target: bool) -> Exec<Option<u32>> {
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
            None => match self.move_here(core, key) {
                Some(n) => n,
                None if has_groups(mode) && self.is_cold(&key, is_target) => return Ok(None),
                None => match self.translate(core, key) {
                    Some(n) => n,
                    None => return Ok(None),
                },
            },
        };
        self.remember(core, number);
        Ok(Some(number))
    }

    /// Whether to interpret the instruction at `key` because nothing jumps there.  (To a block
    /// without groups something does.)
    fn is_cold(&mut self, key: &Key, is_target: bool) -> bool {
        let in_frame = self.frames.get(&(key.hpa >> 12));
        let blocks = in_frame.into_iter().flatten().map(|&n| &self.blocks[n]);
        !is_target && self.middles.is_cold(key, blocks)
    }

    /// Enter a block into the tables that generated code looks at.
    pub(super) fn remember(&mut self, core: &mut Core, number: u32) {
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

    pub(super) fn translate(&mut self, core: &mut Core, key: Key) -> Option<u32> {
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
        let begin = Begin::of(&self.tools);
        let t = translate::translate(&mut self.tools, plan, bytes, second.as_ref(), is_known, &peek)?;
        let second = second.filter(|_| t.uses_second).map_or(NO_PAGE, |s| s.hpa);
        self.cache.append(&t.code);
        self.emitted_bytes += t.code.len() as u64;
        self.translated_blocks += 1;
        self.translated_instructions += u64::from(t.count);
        let origin = t.moves.and_then(|moves| self.note_origin(&key, begin, &moves, t.code.len()));
        self.keep(
            core,
            Block {
                key,
                second,
                origin: origin.unwrap_or(0),
                main: t.main,
                head: (t.main - t.landing) as u8,
                tail: (t.again - t.main) as u32,
                bytes: t.bytes,
                count: t.count,
                is_dead: false,
            },
        );
        self.offer(number);
        Some(number)
    }

    /// A block whose code is in the cache is there from now on.
    pub(super) fn keep(&mut self, core: &mut Core, block: Block) -> u32 {
        let (key, second) = (block.key, block.second());
        let number = self.blocks.push(block);
        self.index.insert(key, number);
        self.hold(core, key.hpa).push(number);
        if let Some(second) = second {
            self.hold(core, second).push(number);
        }
        number
    }

    /// Hold the frame of `hpa`, and nobody may write there without asking.
    pub(super) fn hold(&mut self, core: &mut Core, hpa: u64) -> &mut Vec<u32> {
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
}

/// The fetch translation of an address that the program may use now without a walk.
pub(super) fn fetchable(core: &Core, rip: u64) -> Option<Entry> {
    let entry = *core.tlb.lookup_fetch(rip >> 12)?;
    let is_usable = entry.perm & perm::SPECIAL == 0 && segment::is_canonical(rip);
    (is_usable && core.allows(&entry, Access::Fetch)).then_some(entry)
}

/// The number of a code page: of a frame at a linear page.
fn page_number(pages: &mut AddressMap<(u64, u64), u32>, rip: u64, hpa: u64) -> u32 {
    let next = pages.len() as u32 + 1;
    *pages.entry((rip >> 12, hpa >> 12)).or_insert(next)
}
