//! Dropping translations: code that was overwritten, and what there is no room for.

use super::Dbt;
use super::block::{Block, Key};
use super::cache::REGIONS;
use super::mode::class_of;
use super::numbered::region_of;
use super::tables::{NO_MODE, NO_REQUEST, jump_index};
use crate::cpu::state::Core;

/// Bytes of notes that a region of the cache may have for each byte of its room for code.
pub const NOTES_FOR_CODE: usize = 2;
/// What is noted of a block beside [`Block`]: its places in the index and under its frames.
const BLOCK_BYTES: usize = size_of::<(Key, u32)>() + 2 * size_of::<u32>();
/// Bytes that a cache has for each code page that may have a number.
pub const CODE_FOR_PAGE: usize = 384;

impl Dbt {
    /// Drop the translations of code that overlaps `len` bytes at `hpa` (inside one frame).
    pub(super) fn invalidate(&mut self, core: &mut Core, hpa: u64, len: u64) {
        self.invalidate_for(core, hpa, len, |_| true);
    }

    /// The same, of those for which `which` says so.
    pub(super) fn invalidate_for(
        &mut self,
        core: &mut Core,
        hpa: u64,
        len: u64,
        which: impl Fn(&Key) -> bool,
    ) {
        let pfn = hpa >> 12;
        let Some(in_frame) = self.frames.get_mut(pfn) else { return };
        let (blocks, cache, index) = (&mut self.blocks, &mut self.cache, &mut self.index);
        let indirect = self.tools.glue.indirect;
        let mut dropped = 0;
        in_frame.retain(|&n| {
            let b = &mut blocks[n];
            if b.is_dead {
                return false; // dropped through its other page
            }
            let overlaps = b.overlaps(hpa, len) && which(&b.key);
            if overlaps {
                b.is_dead = true;
                index.remove(&b.key);
                forget_jump(core, b, indirect);
                let rel = b.again().wrapping_sub(b.main + 5) as u32;
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

    /// Bytes of what is noted of the blocks in a region.
    pub(super) fn note_bytes(&self, region: usize) -> usize {
        let blocks = self.blocks.part(region).len() * (size_of::<Block>() + BLOCK_BYTES);
        self.tools.bytes(region) + blocks + self.incoming[region].len() * size_of::<u32>()
    }

    /// Whether there is room for another block in the region that is filled.
    pub(super) fn has_room(&self) -> bool {
        let most = NOTES_FOR_CODE * self.cache.region_bytes();
        self.cache.has_room() && self.note_bytes(self.cache.region()) < most && !self.is_out_of_pages()
    }

    /// Whether as many code pages have a number as may.  (Which of them are used any more, nobody knows.)
    fn is_out_of_pages(&self) -> bool {
        self.pages.len() >= self.cache.bytes() / CODE_FOR_PAGE
    }

    /// Make room for another block.
    pub(super) fn make_room(&mut self, core: &mut Core) {
        if self.is_out_of_pages() {
            self.flush_code(core);
        } else if !self.has_room() {
            self.recycle(core, (self.cache.region() + 1) % REGIONS);
        }
    }

    /// Drop the blocks in a region of the cache, the one that was begun first, and go on there.
    fn recycle(&mut self, core: &mut Core, region: usize) {
        let dropped = self.blocks.part(region);
        self.recycled += u64::from(!dropped.is_empty());
        let mut frames = Vec::with_capacity(dropped.len());
        for b in dropped {
            frames.push(b.key.hpa >> 12);
            frames.extend(b.second().map(|hpa| hpa >> 12));
            if !b.is_dead {
                self.index.remove(&b.key);
                forget_jump(core, b, self.tools.glue.indirect);
            }
        }
        frames.sort_unstable();
        frames.dedup();
        for pfn in frames {
            let Some(in_frame) = self.frames.get_mut(pfn) else { continue };
            in_frame.retain(|&n| region_of(n) != region);
            if in_frame.is_empty() {
                self.frames.release(pfn);
            }
        }
        self.unlink(region);
        self.tools.begin(region);
        self.blocks.begin(region);
        self.cache.begin(region);
        self.middles.forget();
        self.generations = self.generations.map(|g| g + 1);
    }

    /// Undo the links to blocks in a region.
    fn unlink(&mut self, region: usize) {
        for number in std::mem::take(&mut self.incoming[region]) {
            // (It may be the number of another one by now, which is not noted.)
            let Some(link) = self.tools.links.get_mut(number) else { continue };
            if link.noted & 1 << region != 0 {
                link.noted &= !(1 << region);
                if usize::from(link.to) == region {
                    self.cache.patch(link.place, &link.out.to_le_bytes());
                }
            }
        }
    }

    /// Empty the tables of indirect targets whose mode is such.
    pub(super) fn empty_jumps(&mut self, core: &mut Core, which: impl Fn(u32) -> bool) {
        for (n, mode) in core.jit.jump_modes.iter().enumerate() {
            if *mode != NO_MODE && which(*mode) {
                let indirect = self.tools.glue.indirect;
                self.jump_used[n].drain(|slot| core.jit.jump[n][slot] = indirect);
            }
        }
    }

    /// Drop everything.
    pub(super) fn flush_code(&mut self, core: &mut Core) {
        for region in (0..REGIONS).rev() {
            self.tools.begin(region);
            self.blocks.begin(region);
            self.cache.begin(region);
            self.incoming[region].clear();
        }
        self.index.clear();
        self.frames.release_all();
        self.pages.clear();
        self.middles.forget();
        self.tables_of = (0, 0, 0);
        self.generations = self.generations.map(|g| g + 1);
        core.jit.request = NO_REQUEST;
        for (used, fetch) in self.fetch_used.iter_mut().zip(&mut core.jit.fetch) {
            used.drain(|entry| fetch[entry] = 0);
        }
        self.empty_jumps(core, |_| true);
        self.flushes += 1;
    }
}

/// A block is no indirect target any more.
fn forget_jump(core: &mut Core, b: &Block, indirect: u64) {
    let entry = &mut core.jit.jump[class_of(b.key.mode)][jump_index(b.key.rip)];
    if *entry == b.landing() {
        *entry = indirect;
    }
}
