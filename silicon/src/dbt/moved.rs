//! Translations that are moved: a program's code that is translated for one linear address, taken over for
//! another one.
//!
//! Operating systems place a program and its libraries elsewhere each time, so the same frame is executed
//! at other addresses in each process.  To translate it anew costs several times what it costs to copy
//! what the last translation has emitted, and to change what depends on where guest code or generated code
//! is: [`super::asm::Asm`] notes these places ([`Move`]) while code is emitted, [`Origin`] has them with
//! what else the translation left behind.
//!
//! Invariant: what is moved is what a translation with the same guesses would emit.  So only blocks are
//! moved that are all in one page, in the high arenas of 64-bit programs ([`crate::mmu::window`]), where
//! each address needs a constant of the same length and lies in an arena or not as before.

use std::ops::Range;

use iced_x86::{Instruction, OpKind};

use super::Dbt;
use super::block::{Block, Key, Link, NO_PAGE, PAGE_TO_PLACE, Site};
use super::mode::{is_32, is_user};
use super::numbered::Numbered;
use super::tables::{FETCH_ENTRIES, JUMP_ENTRIES, Tables, jump_index};
use super::tools::Tools;
use super::zeroed::Zeroed;
use crate::cpu::state::Core;
use crate::mmu::window::is_high;

/// Entries of the table of blocks that can be moved.
const ENTRIES: usize = 1 << 17;

/// What has to change where code is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// A displacement to a place outside of the block.
    Host,
    /// A guest address, 8 bytes.
    Guest,
    /// The number of a site.
    Site,
    /// The number of a link.
    Link,
    /// The number of an indirect transfer.
    Indirect,
    /// The offset of an entry of the table of code pages.
    Page,
    /// The offset of the block's entry in the table of indirect targets.
    Jump,
}

/// A place in a block's code, from its first byte on, that has to change where it is moved.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// Where.
    pub at: u16,
    /// What there is.
    pub what: What,
}

/// Elements that a translation has appended to a list.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    first: u32,
    count: u16,
}

impl Part {
    fn of<T>(list: &Numbered<T>, first: u32) -> Option<Self> {
        let count = u16::try_from(list.next().wrapping_sub(first)).ok()?;
        Some(Self { first, count })
    }

    fn numbers(self) -> Range<u32> {
        self.first..self.first + u32::from(self.count)
    }
}

/// The next numbers of the lists when a translation begins.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    sites: u32,
    prepared: u32,
    faults: u32,
    links: u32,
    indirects: u32,
    x87: u32,
}

impl Begin {
    /// Now.
    #[must_use]
    pub fn of(tools: &Tools) -> Self {
        Self {
            sites: tools.sites.next(),
            prepared: tools.prepared.next(),
            faults: tools.faults.next(),
            links: tools.links.next(),
            indirects: tools.indirects.next(),
            x87: tools.x87.next(),
        }
    }
}

/// What a translation has left behind that can be moved.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Bytes of code.
    bytes: u16,
    sites: Part,
    prepared: Part,
    faults: Part,
    links: Part,
    indirects: Part,
    moves: Part,
}

/// The blocks that can be moved, by where their code is.
pub struct Movable {
    /// One more than a block's number.
    blocks: Zeroed<u32>,
}

impl Movable {
    /// None yet.
    ///
    /// # Errors
    /// If the computer gives no addresses.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { blocks: Zeroed::new(ENTRIES)? })
    }

    fn entry(&mut self, key: &Key) -> &mut u32 {
        let mixed = (key.hpa ^ u64::from(key.mode) << 44).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &mut self.blocks[(mixed >> 47) as usize]
    }
}

/// Whether a constant takes 8 bytes.
#[must_use]
pub fn is_wide(v: u64) -> bool {
    u32::try_from(v).is_err() && i32::try_from(v.cast_signed()).is_err()
}

/// The same instruction at another address.
fn moved(mut insn: Instruction, by: u64) -> Instruction {
    insn.set_ip(insn.ip().wrapping_add(by));
    if insn.is_ip_rel_memory_operand() {
        insn.set_memory_displacement64(insn.memory_displacement64().wrapping_add(by));
    }
    if insn.op_count() > 0 && insn.op0_kind() == OpKind::NearBranch64 {
        insn.set_near_branch64(insn.near_branch64().wrapping_add(by));
    }
    insn
}

fn word(code: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(code[at..at + 4].try_into().expect("four bytes"))
}

fn address(code: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(code[at..at + 8].try_into().expect("eight bytes"))
}

impl Dbt {
    /// Whether a block of this key may ever be moved, or be one that was.
    fn may_move(key: &Key) -> bool {
        is_user(key.mode) && !is_32(key.mode) && is_high(key.rip)
    }

    /// Note what the translation of `key` has left behind since `begin`, if it can be moved.
    pub(super) fn note_origin(
        &mut self,
        key: &Key,
        begin: Begin,
        moves: &[Move],
        bytes: usize,
    ) -> Option<u32> {
        let tools = &mut self.tools;
        if !Self::may_move(key) || tools.x87.next() != begin.x87 {
            return None;
        }
        let first = tools.moves.next();
        let origin = Origin {
            bytes: u16::try_from(bytes).ok()?,
            sites: Part::of(&tools.sites, begin.sites)?,
            prepared: Part::of(&tools.prepared, begin.prepared)?,
            faults: Part::of(&tools.faults, begin.faults)?,
            links: Part::of(&tools.links, begin.links)?,
            indirects: Part::of(&tools.indirects, begin.indirects)?,
            moves: Part { first, count: u16::try_from(moves.len()).ok()? },
        };
        for one in moves {
            tools.moves.push(*one);
        }
        Some(tools.origins.push(origin) + 1)
    }

    /// From now on a block is the one to be moved to other addresses.
    pub(super) fn offer(&mut self, number: u32) {
        let b = &self.blocks[number];
        if b.origin != 0 {
            *self.movable.entry(&b.key) = number + 1;
        }
    }

    /// The block for `key`, made of one at another address, if there is one that can be moved there.
    pub(super) fn move_here(&mut self, core: &mut Core, key: Key) -> Option<u32> {
        if !Self::may_move(&key) {
            return None;
        }
        let from = self.movable.entry(&key).checked_sub(1)?;
        let b = self
            .blocks
            .get(from)
            .filter(|b| (b.key.hpa, b.key.mode) == (key.hpa, key.mode) && !b.is_dead && b.origin != 0)?;
        let (b, origin) = (b.clone(), self.tools.origins[b.origin - 1]);
        if !self.has_room() {
            return None; // what is moved may be what is dropped
        }
        let by = key.rip.wrapping_sub(b.key.rip);
        let host = self.cache.here().wrapping_sub(b.landing());
        let begin = Begin::of(&self.tools);
        let code = self.moved_code(&b, origin, begin, key.rip, host)?;
        self.move_notes(origin, begin, self.blocks.next(), by, host);
        self.cache.append(&code);
        self.moved += 1;
        let block = Block { key, main: b.main.wrapping_add(host), second: NO_PAGE, origin: 0, ..b };
        Some(self.keep(core, block))
    }

    /// A block's code for another address, `host` bytes behind it; `None` if it has to be another.
    fn moved_code(&self, b: &Block, origin: Origin, begin: Begin, rip: u64, host: u64) -> Option<Vec<u8>> {
        let by = rip.wrapping_sub(b.key.rip);
        let mut code = self.cache.code(b.landing(), origin.bytes.into()).to_vec();
        for n in origin.moves.numbers() {
            let Move { at, what } = self.tools.moves[n];
            let at = usize::from(at);
            if what == What::Guest {
                let old = address(&code, at);
                let new = old.wrapping_add(by);
                if !is_wide(new) || is_high(old) != is_high(new) {
                    return None;
                }
                code[at..at + 8].copy_from_slice(&new.to_le_bytes());
                continue;
            }
            let old = word(&code, at);
            let new = match what {
                What::Host => old.wrapping_sub(host as u32),
                What::Site => old - origin.sites.first + begin.sites,
                What::Link => old - origin.links.first + begin.links,
                What::Indirect => old - origin.indirects.first + begin.indirects,
                What::Page => {
                    let table = super::glue::table(std::mem::offset_of!(Tables, fetch)) as u32;
                    let entry = (old - table) / 4;
                    let pages = entry.wrapping_add((by >> 12) as u32) % FETCH_ENTRIES as u32;
                    table + 4 * (entry / FETCH_ENTRIES as u32 * FETCH_ENTRIES as u32 + pages)
                }
                What::Jump => {
                    let table = super::glue::table(std::mem::offset_of!(Tables, jump)) as u32;
                    let class = (old - table) / 8 / JUMP_ENTRIES as u32;
                    table + 8 * (class * JUMP_ENTRIES as u32 + jump_index(rip) as u32)
                }
                What::Guest => unreachable!("8 bytes"),
            };
            code[at..at + 4].copy_from_slice(&new.to_le_bytes());
        }
        for n in origin.links.numbers() {
            let Link { target, place, out, is_far, .. } = self.tools.links[n];
            if is_high(target) != is_high(target.wrapping_add(by)) {
                return None;
            }
            if place == b.main + 1 {
                continue; // the jump that is written there when the code is overwritten
            }
            let at = (place - b.landing()) as usize;
            code[at..at + 4].copy_from_slice(&out.to_le_bytes());
            if is_far {
                code[at - PAGE_TO_PLACE as usize..][..4].fill(0);
            }
        }
        Some(code)
    }

    /// Append what a translation has left behind once more, for a block of this number that is so far
    /// away.
    fn move_notes(&mut self, origin: Origin, begin: Begin, block: u32, by: u64, host: u64) {
        let tools = &mut self.tools;
        for n in origin.prepared.numbers() {
            let (insn, execute) = tools.prepared[n];
            tools.prepared.push((moved(insn, by), execute));
        }
        for n in origin.sites.numbers() {
            let site = tools.sites[n];
            let prepared = match site.prepared {
                0 => 0,
                n => n - origin.prepared.first + begin.prepared,
            };
            tools.sites.push(Site {
                next: if site.next == 0 { 0 } else { site.next.wrapping_add(host) },
                rip: site.rip.wrapping_add(by),
                next_rip: site.next_rip.wrapping_add(by),
                block,
                prepared,
                ..site
            });
        }
        for n in origin.faults.numbers() {
            let (at, site) = tools.faults[n];
            tools.faults.push((at.wrapping_add(host), site - origin.sites.first + begin.sites));
        }
        for n in origin.links.numbers() {
            let link = tools.links[n];
            let (target, place) = (link.target.wrapping_add(by), link.place.wrapping_add(host));
            tools.links.push(Link { target, place, to: 0, noted: 0, ..link });
        }
        for n in origin.indirects.numbers() {
            let indirect = tools.indirects[n];
            tools.indirects.push(super::block::Indirect { rip: indirect.rip.wrapping_add(by), ..indirect });
        }
    }
}
