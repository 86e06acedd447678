//! What generated code calls: first-level misses, interpreted instructions, indirect targets.

use super::block::{Key, Site};
use super::find::fetchable;
use super::flags::Whereabouts;
use super::kinds::uses_vector_state;
use super::mode::{MODE_UNGROUPED, has_groups, is_user, must_step, must_step_but, relies_on_stack};
use super::tables::jump_index;
use super::{Dbt, KIND_CLASS, KIND_FIRST, KIND_OFFSET, KIND_WRITE, KIND_WRITES, Recent, gate, look, signals};
use crate::addr::PAGE_OFFSET;
use crate::arch::bits::rflags;
use crate::arch::exit::{Exit, reason};
use crate::cpu::decode::MAX_LENGTH;
use crate::cpu::event;
use crate::cpu::segment;
use crate::cpu::state::{Core, Mode, Shadow, monotonic_ns};
use crate::cpu::step::{fetch, step, step_known};
use crate::cpu::trap::{Exec, Trap};
use crate::mmu::tlb::{Entry, L1_CLASSES, perm};
use crate::mmu::walk::Access;
use crate::mmu::window::{Current, is_stack};
use crate::vmx;

impl Dbt {
    /// The host address to go on at for RIP, if its block is translated already.
    fn known(&mut self, core: &mut Core) -> u64 {
        let Some(mut mode) = self.mode_now(core) else { return 0 };
        if self.ungrouped {
            mode |= MODE_UNGROUPED;
        }
        // RIP 0 stands for an empty entry.
        let generation = self.generations[usize::from(!is_user(mode))];
        let slot = jump_index(core.rip);
        let recent = &mut self.recent[slot];
        let is_it = |r: &Recent| (r.rip, r.mode, r.generation) == (core.rip, mode, generation) && r.rip != 0;
        if let Some(i) = recent.iter().position(is_it) {
            let block = recent[i].block;
            if !self.blocks[block].is_dead {
                recent.swap(0, i);
                self.ungrouped = false;
                if has_groups(mode) {
                    self.set_jump(core, block);
                }
                return self.blocks[block].main;
            }
        }
        let Some(entry) = fetchable(core, core.rip) else { return 0 };
        let key = Key { rip: core.rip, hpa: entry.hpa | (core.rip & PAGE_OFFSET), mode };
        let Some(&block) = self.index.get(&key) else { return 0 };
        self.ungrouped = false;
        self.remember(core, block);
        self.recent[slot] = [Recent { rip: core.rip, mode, generation, block }, self.recent[slot][0]];
        self.blocks[block].main
    }

    /// A block was translated without the page behind it: if that is known now, translate it
    /// again.  (At once: if that waited for the next time, which may be in another process, the
    /// page would be unknown again.)
    fn retry_crossing(&mut self, core: &mut Core, site: Site) {
        let b = &self.blocks[site.block];
        let is_known = fetchable(core, (site.rip | PAGE_OFFSET).wrapping_add(1)).is_some();
        if !b.is_dead && is_known && self.has_room() {
            let (key, last) = (b.key, u64::from(b.bytes) - 1);
            self.invalidate(core, key.hpa + last, 1);
            self.translate(core, key);
        }
    }

    /// An indirect transfer went to an address that is not canonical: take it back and let the
    /// interpreter raise the fault, which names the transfer itself.
    fn undo_transfer(&mut self, core: &mut Core) -> u64 {
        let i = self.tools.indirects[core.jit.indirect];
        core.flags_from_record();
        core.rip = i.rip;
        core.gpr[4] = core.gpr[4].wrapping_sub(i.popped as u64);
        core.countdown.add(1);
        core.shadow = if i.is_shadowed { Shadow::Sti } else { Shadow::None };
        let result = step(core);
        core.flags_to_jit();
        self.trap = result.err();
        0
    }

    /// Walk for the first access of an instruction that generated code has come to, unless the TLB has it.
    fn walk(&mut self, core: &mut Core, gva: u64, access: Access) {
        let entry = core.tlb.lookup(gva >> 12);
        if entry.is_some_and(|e| core.allows(e, access)) {
            return;
        }
        if segment::is_canonical(gva) && (entry.is_some() || !core.tlb.displaces(gva >> 12)) {
            self.walked = Some(core.translate(gva, access).map(|_| ()));
        }
    }

    /// Interpret the instruction of a site, those that belong to it, and the delivery of an
    /// exception, as long as nobody else has to look.  Returns whether it was that one alone.
    fn execute(&mut self, core: &mut Core, site: Site) -> Exec<bool> {
        let mut is_out = site.is_vector;
        if is_out {
            gate::vector_state_out(core);
        }
        let x87 = is_out.then(|| gate::x87_state(core));
        let mut result = match self.tools.prepared.get(site.prepared.wrapping_sub(1)) {
            Some((insn, execute)) => step_known(core, insn, *execute),
            None => self.walked.take().unwrap_or(Ok(())).and_then(|()| step(core)),
        };
        let mut is_alone = true;
        while result.is_ok() && core.countdown.get() > 0 && goes_together(core) {
            if !is_out && next_uses_vector_state(core) {
                gate::vector_state_out(core);
                is_out = true;
            }
            is_alone = false;
            result = step(core);
        }
        if is_out && (!is_alone || x87 != Some(gate::x87_state(core))) {
            gate::vector_state_in(core);
        }
        match result {
            Err(Trap::Exception(e)) if core.vmx.non_root => event::raise(core, e).map(|()| false),
            _ => result.map(|()| is_alone),
        }
    }

    /// What the rest of a block relies on.  (A group's pointer may be to a page whose translation was
    /// displaced.)
    fn relied_on(&self, core: &Core) -> ([u64; 2], u64, Option<Current>) {
        (self.generations, core.tlb.displaced, core.tlb.windows.current())
    }

    /// Interpret the instruction of a site; returns where generated code goes on, or 0 to leave.
    fn interpret(&mut self, core: &mut Core, number: u32) -> u64 {
        self.slow += 1;
        let site = self.tools.sites[number];
        self.tell_x87(core, site.x87, |_| gate::is_x87_pending());
        match site.flags {
            Whereabouts::Live => core.flags_from_live(),
            Whereabouts::Record => core.flags_from_record(),
            Whereabouts::Recipe(recipe) => {
                let flags = recipe.flags(core);
                core.set_arith(flags);
            }
        }
        core.rip = site.rip;
        core.countdown.add(i64::from(site.remaining));
        // (An instruction in an interrupt shadow is interpreted alone.)
        if site.is_group && core.shadow == Shadow::None && self.walked.is_none() {
            core.flags_to_jit();
            self.ungrouped = true;
            return self.known(core);
        }
        let before = self.relied_on(core);
        let result = self.execute(core, site);
        core.flags_to_jit();
        let is_alone = match result {
            Ok(is_alone) => is_alone,
            Err(trap) => {
                self.trap = Some(trap);
                return 0;
            }
        };
        self.sync(core);
        if let Some((vpn, is_write)) = core.tlb.windows.awaited.filter(|_| core.cpl == 3) {
            core.tlb.windows.awaited = None;
            fill_page(core, vpn, is_write);
        }
        if site.is_crossing && self.blocks[site.block].second().is_none() {
            self.retry_crossing(core, site);
        }
        if !is_left_alone(core) || core.countdown.get() <= 0 || must_step(core) {
            return 0;
        }
        let rest = i64::from(site.remaining) - 1;
        let is_astray = std::mem::take(&mut self.is_astray);
        let goes_on =
            is_alone && site.next != 0 && !site.is_group && !is_astray && before == self.relied_on(core);
        let block = &self.blocks[site.block];
        let is_alive =
            goes_on && !block.is_dead && (!relies_on_stack(block.key.mode) || is_stack(core.gpr[4]));
        if is_alive && core.rip == site.next_rip && rest <= core.countdown.get() {
            core.countdown.add(-rest);
            return site.next;
        }
        self.known(core)
    }
}

/// Whether the dispatcher has nothing to do between these two instructions.
fn is_left_alone(core: &mut Core) -> bool {
    if core.attention != 0 {
        look(core);
        if vmx::events::is_quiet(core) {
            core.attention = 0;
        }
    }
    core.attention == 0 && !core.agent.is_rung()
}

/// Whether the next instruction is to be interpreted with the last one: it is in an interrupt
/// shadow, or follows an IRET that set RFLAGS.RF (as after a page fault), and is no news otherwise.
fn goes_together(core: &mut Core) -> bool {
    if core.shadow != Shadow::None {
        return !must_step(core);
    }
    core.flag(rflags::RF) && !must_step_but(core, rflags::RF) && is_left_alone(core)
}

/// Whether the next instruction may work on x87 or SSE state.
fn next_uses_vector_state(core: &mut Core) -> bool {
    // (A look must not do anything that is counted.)
    let is_inside = core.rip & PAGE_OFFSET <= PAGE_OFFSET - MAX_LENGTH as u64;
    if core.mode != Mode::Bits64 || !is_inside || fetchable(core, core.rip).is_none() {
        return true;
    }
    fetch(core).is_ok_and(|(insn, _)| uses_vector_state(&insn))
}

fn parts<'a>(core: *mut Core) -> (&'a mut Core, &'a mut Dbt) {
    gate::parts(core)
}

/// Whether generated code may write to the page of an entry, which is plain memory, without asking
/// from now on.
fn grant_writes(core: &Core, e: &Entry) -> bool {
    let pfn = e.hpa >> 12;
    if !core.allows(e, Access::Write) || core.mem.is_code(pfn) {
        return false;
    }
    core.mem.mark_dirty(e.hpa);
    !core.is_parallel || core.mem.code().grant(pfn)
}

/// A first-level miss: copy the entry from the second level.  0 if the instruction has to be
/// interpreted.
pub(super) extern "C" fn fill(core: *mut Core, gva: u64, kind: u64) -> u64 {
    let (core, dbt) = parts(core);
    let (size, write) = (kind & 0xFFFF, kind & u64::from(KIND_WRITE) != 0);
    let class = (kind >> KIND_CLASS) as usize % L1_CLASSES.next_power_of_two();
    if (gva & PAGE_OFFSET) + size > 4096 {
        return 0;
    }
    if kind & u64::from(KIND_FIRST) != 0 {
        let access = if kind & u64::from(KIND_WRITES) != 0 { Access::Write } else { Access::Read };
        dbt.walk(core, gva + (kind >> KIND_OFFSET), access);
    }
    let Some(&e) = core.tlb.lookup(gva >> 12) else { return 0 };
    let is_granted = e.perm & perm::SPECIAL == 0
        && if write { grant_writes(core, &e) } else { core.allows(&e, Access::Read) };
    if !is_granted {
        return 0;
    }
    let host = core.mem.host_ptr(e.hpa) as u64;
    core.tlb.l1_fill(class, &e, host, write);
    dbt.walked = None;
    dbt.fills += 1;
    host + (gva & PAGE_OFFSET)
}

pub(super) extern "C" fn interpret(core: *mut Core, number: u64) -> u64 {
    let (core, dbt) = parts(core);
    let next = dbt.interpret(core, number as u32);
    dbt.cache.serialize();
    core.heed();
    next
}

pub(super) extern "C" fn interpret_fault(core: *mut Core, at: u64, accessed: u64) -> u64 {
    let (core, dbt) = parts(core);
    let faults = dbt.tools.faults.part(dbt.cache.region_at(at));
    let Ok(i) = faults.binary_search_by_key(&at, |f| f.0) else {
        // A defect of the translator: this machine must not go on, the others may.
        dbt.trap = Some(Trap::Stop(Box::new(Exit::new(reason::LOST, at))));
        return 0;
    };
    // What the block takes for known of registers, an access in the window proves.
    dbt.is_astray = core.tlb.windows.page_at(accessed).is_none();
    let next = interpret(core, faults[i].1.into());
    let (core, dbt) = parts(core);
    dbt.is_astray = false;
    fill_window(core, accessed);
    next
}

/// The program faulted in its window: let the page lead to where the TLB says now, or, if the guest's own
/// handler has to see to that first, when the program goes on.
fn fill_window(core: &mut Core, accessed: u64) {
    let Some(vpn) = core.tlb.windows.page_at(accessed) else {
        core.tlb.windows.note_stray();
        return;
    };
    let is_write = accessed & signals::IS_WRITE != 0;
    core.tlb.windows.awaited = Some((vpn, is_write)).filter(|_| core.cpl != 3);
    fill_page(core, vpn, is_write);
}

/// Let a page of the window lead to where the TLB says.
fn fill_page(core: &mut Core, vpn: u64, is_write: bool) {
    let Some(&e) = core.tlb.lookup(vpn).filter(|_| core.cpl == 3) else { return };
    if e.perm & perm::SPECIAL != 0 || !core.allows(&e, Access::Read) {
        return;
    }
    // (A mark that is set already changes nothing.)
    let wants_writes = is_write || core.mem.is_dirty(e.hpa >> 12);
    let is_writable = wants_writes && grant_writes(core, &e);
    core.tlb.windows.fill(vpn, e.hpa, is_writable, &core.mem);
}

pub(super) extern "C" fn lookup(core: *mut Core) -> u64 {
    let (core, dbt) = parts(core);
    dbt.lookups += 1;
    let next = if segment::is_canonical(core.rip) { dbt.known(core) } else { dbt.undo_transfer(core) };
    dbt.sought = (next == 0).then_some(core.rip);
    core.heed();
    next
}

/// Put saved flags into the record instead of a recipe for them.
pub(super) extern "C" fn flags(core: *mut Core) {
    let (core, _) = parts(core);
    core.flags_from_record();
    core.flags_to_jit();
}

pub(super) extern "C" fn time(_core: *mut Core) -> u64 {
    monotonic_ns()
}
