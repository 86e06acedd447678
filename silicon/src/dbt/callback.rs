//! What generated code calls: first-level misses, interpreted instructions, indirect targets.

use super::block::{Key, Site};
use super::mode::MODE_UNGROUPED;
use super::tables::jump_index;
use super::{Dbt, KIND_CLASS, KIND_WRITE, Recent, fetchable, gate, look, must_step};
use crate::addr::PAGE_OFFSET;
use crate::arch::exit::{Exit, reason};
use crate::cpu::segment;
use crate::cpu::state::{Core, Shadow};
use crate::cpu::step::{step, step_known};
use crate::cpu::trap::Trap;
use crate::mmu::tlb::perm;
use crate::mmu::walk::Access;
use crate::vmx;

impl Dbt {
    /// The host address to go on at for RIP, if its block is translated already.
    fn known(&mut self, core: &mut Core) -> u64 {
        let Some(mut mode) = self.mode_now(core) else { return 0 };
        if self.ungrouped {
            mode |= MODE_UNGROUPED;
        }
        // RIP 0 stands for an empty entry.
        let generation = self.generation;
        let slot = jump_index(core.rip);
        let r = self.recent[slot];
        if (r.rip, r.mode, r.generation) == (core.rip, mode, generation) && r.rip != 0 {
            let b = &self.blocks[r.block as usize];
            if !b.is_dead {
                self.ungrouped = false;
                return b.main;
            }
        }
        let Some(entry) = fetchable(core, core.rip) else { return 0 };
        let key = Key { rip: core.rip, hpa: entry.hpa | (core.rip & PAGE_OFFSET), mode };
        let Some(&block) = self.index.get(&key) else { return 0 };
        self.ungrouped = false;
        self.remember(core, block);
        self.recent[slot] = Recent { rip: core.rip, mode, generation, block };
        self.blocks[block as usize].main
    }

    /// A block was translated without the page behind it: if that is known now, drop the block.
    fn retry_crossing(&mut self, core: &mut Core, site: Site) {
        let b = &self.blocks[site.block as usize];
        if !b.is_dead && fetchable(core, (site.rip | PAGE_OFFSET).wrapping_add(1)).is_some() {
            let (hpa, last) = (b.key.hpa, u64::from(b.bytes) - 1);
            self.invalidate(core, hpa + last, 1);
        }
    }

    /// An indirect transfer went to an address that is not canonical: take it back and let the
    /// interpreter raise the fault, which names the transfer itself.
    fn undo_transfer(&mut self, core: &mut Core) -> u64 {
        let i = self.indirects[core.jit.indirect as usize];
        core.flags_from_jit();
        core.rip = i.rip;
        core.gpr[4] = core.gpr[4].wrapping_sub(i.popped as u64);
        core.countdown += 1;
        core.shadow = if i.is_shadowed { Shadow::Sti } else { Shadow::None };
        let result = step(core);
        core.flags_to_jit();
        self.trap = result.err();
        0
    }

    /// Interpret the instruction of a site; returns where generated code goes on, or 0 to leave.
    fn interpret(&mut self, core: &mut Core, number: u32) -> u64 {
        self.slow += 1;
        let site = self.sites[number as usize];
        if site.flags_kept {
            core.jit.flags = core.jit.kept_flags;
        }
        core.flags_from_jit();
        core.rip = site.rip;
        core.countdown += i64::from(site.remaining);
        // (An instruction in an interrupt shadow is interpreted alone.)
        if site.is_group && core.shadow == Shadow::None {
            self.ungrouped = true;
            return self.known(core);
        }
        let mut is_out = site.is_vector;
        if is_out {
            gate::vector_state_out(core);
        }
        let generation = self.generation;
        let mut result = match self.prepared.get((site.prepared as usize).wrapping_sub(1)) {
            Some((insn, execute)) => step_known(core, insn, *execute),
            None => step(core),
        };
        // An instruction in an interrupt shadow belongs to the one before it.
        while result.is_ok() && core.shadow != Shadow::None && core.countdown > 0 && !must_step(core) {
            if !is_out {
                gate::vector_state_out(core);
                is_out = true;
            }
            result = step(core);
        }
        if is_out {
            gate::vector_state_in(core);
        }
        core.flags_to_jit();
        if let Err(trap) = result {
            self.trap = Some(trap);
            return 0;
        }
        self.sync(core);
        if site.is_crossing && self.blocks[site.block as usize].second.is_none() {
            self.retry_crossing(core, site);
        }
        if core.attention != 0 {
            look(core);
            if vmx::events::is_quiet(core) {
                core.attention = 0;
            }
        }
        if core.attention != 0 || core.countdown <= 0 || must_step(core) {
            return 0;
        }
        let rest = i64::from(site.remaining) - 1;
        let goes_on = site.next != 0 && !site.is_group && self.generation == generation;
        let is_alive = goes_on && !self.blocks[site.block as usize].is_dead;
        if is_alive && core.rip == site.next_rip && rest <= core.countdown {
            core.countdown -= rest;
            return site.next;
        }
        self.known(core)
    }
}

fn parts<'a>(core: *mut Core) -> (&'a mut Core, &'a mut Dbt) {
    gate::parts(core)
}

/// A first-level miss: copy the entry from the second level.  0 if the instruction has to be
/// interpreted.
pub(super) extern "C" fn fill(core: *mut Core, gva: u64, kind: u64) -> u64 {
    let (core, dbt) = parts(core);
    let (size, write) = (kind & 0xFFFF, kind & u64::from(KIND_WRITE) != 0);
    let class = (kind >> KIND_CLASS) as usize;
    if (gva & PAGE_OFFSET) + size > 4096 {
        return 0;
    }
    let Some(&e) = core.tlb.lookup(gva >> 12) else { return 0 };
    let access = if write { Access::Write } else { Access::Read };
    let is_code = core.mem.is_code(e.hpa >> 12);
    if e.perm & perm::SPECIAL != 0 || !core.allows(&e, access) || (write && is_code) {
        return 0;
    }
    if write {
        core.mem.mark_dirty(e.hpa);
    }
    let host = core.mem.host_ptr(e.hpa) as u64;
    core.tlb.l1_fill(class, gva >> 12, host, write);
    dbt.fills += 1;
    host + (gva & PAGE_OFFSET)
}

pub(super) extern "C" fn interpret(core: *mut Core, number: u64) -> u64 {
    let (core, dbt) = parts(core);
    dbt.interpret(core, number as u32)
}

pub(super) extern "C" fn interpret_fault(core: *mut Core, at: u64) -> u64 {
    let (core, dbt) = parts(core);
    let Ok(i) = dbt.faults.binary_search_by_key(&at, |f| f.0) else {
        // A defect of the translator: this machine must not go on, the others may.
        dbt.trap = Some(Trap::Stop(Box::new(Exit::new(reason::LOST, at))));
        return 0;
    };
    let number = dbt.faults[i].1;
    dbt.interpret(core, number)
}

pub(super) extern "C" fn lookup(core: *mut Core) -> u64 {
    let (core, dbt) = parts(core);
    if segment::is_canonical(core.rip) { dbt.known(core) } else { dbt.undo_transfer(core) }
}
