//! Running: one dispatcher, two engines.
//!
//! The dispatcher works between instructions: it delivers interrupts, performs VM exits, keeps the
//! clock and the budget.  An engine only executes instructions; whatever it cannot do it leaves
//! to [`step`], the plain interpreter.

use std::sync::Arc;
use std::time::Duration;

use crate::arch::bits::rflags;
use crate::arch::exit::{Exit, reason};
use crate::bus::news;
use crate::cpu::event::{self, Event, Kind};
use crate::cpu::pmu;
use crate::cpu::state::{Activity, Clock, Core, Shadow};
use crate::cpu::step::step;
use crate::cpu::trap::{Exec, Trap};
use crate::dbt::cache::CACHE_BYTES;
use crate::dbt::home::Home;
use crate::dbt::promotion::Windows;
use crate::dbt::signals;
use crate::engine::{Engine, Reference};
use crate::mem::Memory;
use crate::vmx;

/// Instructions between two looks at the kick flag and the wall clock.
const SLICE: i64 = 200_000;

/// A processor with the engine that runs it.
pub struct Processor {
    /// Its state.
    pub core: Home,
    engine: Box<dyn Engine>,
}

/// Which engine runs a processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// The plain interpreter.
    Reference,
    /// The translator.
    Dbt,
}

impl Processor {
    /// A processor at reset.
    ///
    /// # Errors
    /// If the computer has no room for the engine.
    pub fn new(mem: Arc<Memory>, kind: EngineKind, clock: Clock, apic_id: u32) -> std::io::Result<Self> {
        let mut core = Home::new(mem, clock, apic_id)?;
        let engine: Box<dyn Engine> = match kind {
            EngineKind::Reference => Box::new(Reference),
            EngineKind::Dbt => crate::dbt::engine(&mut core, CACHE_BYTES)?,
        };
        Ok(Self { core, engine })
    }

    /// A processor at reset that is run by the translator, with so many bytes for code: a multiple
    /// of [`crate::dbt::cache::LEAST_BYTES`].
    ///
    /// # Errors
    /// If the computer has no room for the engine.
    pub fn with_code_bytes(
        mem: Arc<Memory>,
        clock: Clock,
        apic_id: u32,
        bytes: usize,
    ) -> std::io::Result<Self> {
        let mut core = Home::new(mem, clock, apic_id)?;
        let engine = crate::dbt::engine(&mut core, bytes)?;
        Ok(Self { core, engine })
    }

    /// Execute until an exit or stop, at most `budget` instructions (0: no limit).  `poll` is
    /// asked after every slice whether to stop with `KICK`.
    pub fn run(&mut self, budget: u64, poll: &mut dyn FnMut() -> bool) -> Exit {
        let _present = self.core.agent.clone().arrive();
        self.run_present(budget, poll)
    }

    /// The same, for who has made the processor present on the bus.
    pub fn run_present(&mut self, budget: u64, poll: &mut dyn FnMut() -> bool) -> Exit {
        pmu::set_running(&mut self.core, true);
        let mut exit = self.run_on(budget, poll);
        pmu::set_running(&mut self.core, false);
        self.engine.settle(&mut self.core);
        let is_vm_exit = exit.reason < reason::BUDGET;
        if self.core.ring0.is_outside && !self.core.vmx.non_root && !is_vm_exit {
            (exit.gla, exit.gpa) = (self.core.rip, self.core.rflags);
        }
        exit
    }

    fn run_on(&mut self, budget: u64, poll: &mut dyn FnMut() -> bool) -> Exit {
        let end = if budget == 0 { u64::MAX } else { self.core.retired().saturating_add(budget) };
        loop {
            signals::look_now_and_then();
            let rung = self.core.agent.answer();
            let is_over = rung & news::KICK != 0 || poll();
            self.core.agent.bus().give_way();
            self.core.catch_up();
            if is_over {
                match self.core.vmx.non_root.then(|| vmx::events::on_kick(&mut self.core)).flatten() {
                    Some(exit) => {
                        if let Some(exit) = self.leave(exit) {
                            return exit;
                        }
                    }
                    None => return Exit::new(reason::KICK, 0),
                }
            }
            if self.core.retired() >= end {
                return Exit::new(reason::BUDGET, 0);
            }
            if let Err(trap) = self.turn(end)
                && let Some(exit) = self.settle(trap)
            {
                return exit;
            }
        }
    }

    /// One turn: what is due between instructions, then a run of the engine.
    fn turn(&mut self, end: u64) -> Exec<()> {
        let core = &mut *self.core;
        core.attention = 0;
        pmu::distance(core); // an overflow comes to attention
        between(core)?;
        if core.activity != Activity::Active {
            return idle(core);
        }
        let mut exact = (end - core.retired()).min(pmu::distance(core));
        if core.clock == Clock::Virtual {
            exact = exact.min(deadline(core).saturating_sub(core.tsc()).max(1));
        }
        core.may_stop_early = exact > SLICE.cast_unsigned();
        core.set_countdown(SLICE.min(exact.min(i64::MAX as u64).cast_signed()));
        let is_single = core.shadow != Shadow::None || core.flag(rflags::TF) || core.dr[7] & 0xFF != 0;
        if is_single || vmx::events::must_step(core) {
            let result = step(core);
            self.engine.settle(core);
            return result;
        }
        self.engine.run(core)
    }

    /// Deal with a trap.  Returns the exit to hand to the caller, if it is for the caller.
    fn settle(&mut self, trap: Trap) -> Option<Exit> {
        match trap {
            Trap::Again => {
                vmx::events::note_iteration(&mut self.core);
                None
            }
            Trap::Stop(stop) => Some(*stop),
            Trap::Exit(exit) => self.leave(*exit),
            Trap::Exception(e) if vmx::events::comes_before(&self.core, &e) => {
                self.core.pending_db = e.payload;
                vmx::events::note_iteration(&mut self.core);
                None
            }
            Trap::Exception(e) => match event::raise(&mut self.core, e) {
                Ok(()) => None,
                Err(Trap::Exit(exit)) => self.leave(*exit),
                Err(Trap::Stop(stop)) => Some(*stop),
                Err(Trap::Exception(_) | Trap::Again) => unreachable!("raise resolves exceptions"),
            },
        }
    }

    /// Perform a VM exit.
    fn leave(&mut self, exit: Exit) -> Option<Exit> {
        let exit = vmx::exit::perform(&mut self.core, exit);
        self.core.vmx.is_host_outside.then_some(exit)
    }

    /// Drop every cached translation, of memory and of code.
    pub fn flush(&mut self) {
        self.core.tlb.flush_all();
        self.core.refresh();
        self.engine.flush(&mut self.core);
    }

    /// Who gets windows from now on: see [`Windows`].
    pub fn use_windows(&mut self, windows: Windows) {
        self.engine.use_windows(&mut self.core, windows);
    }

    /// The engine's own counters.
    #[must_use]
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.engine.statistics(&self.core)
    }
}

/// The TSC at which the dispatcher must look again at the latest.
fn deadline(core: &Core) -> u64 {
    if core.vmx.non_root { vmx::events::deadline(core) } else { core.apic.deadline() }
}

/// Between two instructions: interrupts, VM exits that are due.
fn between(core: &mut Core) -> Exec<()> {
    if core.vmx.non_root {
        return match vmx::events::due(core) {
            Some(exit) => Err(Trap::Exit(Box::new(exit))),
            None => Ok(()),
        };
    }
    let now = core.tsc();
    if core.apic.deadline() <= now {
        core.apic.tick(now);
    }
    if core.nmi_pending && !core.nmi_blocked && core.shadow == Shadow::None {
        core.nmi_pending = false;
        core.nmi_blocked = true;
        core.activity = Activity::Active;
        return event::deliver_or_raise(core, Event { vector: 2, kind: Kind::Nmi, error: None, length: 0 });
    }
    if core.flag(rflags::IF) && core.shadow == Shadow::None && core.apic.pending().is_some() {
        core.activity = Activity::Active;
        if let Some(vector) = core.apic.accept() {
            return event::deliver_or_raise(
                core,
                Event { vector, kind: Kind::External, error: None, length: 0 },
            );
        }
    }
    Ok(())
}

/// Nothing executes: let time pass.
fn idle(core: &mut Core) -> Exec<()> {
    pmu::settle(core);
    let (now, until) = (core.tsc(), deadline(core));
    let can_wake = core.activity == Activity::Hlt || core.vmx.non_root;
    if !core.vmx.non_root || !can_wake || until == u64::MAX {
        let why = if core.activity == Activity::Shutdown { reason::SHUTDOWN } else { reason::HALT };
        return Err(Trap::Stop(Box::new(Exit::new(why, until))));
    }
    match core.clock {
        Clock::Virtual => core.tsc_skew = core.tsc_skew.wrapping_add(until.saturating_sub(now)),
        Clock::Wall => {
            std::thread::sleep(Duration::from_nanos(until.saturating_sub(now).min(1_000_000)));
        }
    }
    pmu::skip_idle(core);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{Holder, Writes};

    #[test]
    fn a_page_whose_dirty_mark_was_taken_is_marked_by_the_next_write() {
        for kind in [EngineKind::Reference, EngineKind::Dbt] {
            let mem = Memory::new(1 << 20).unwrap();
            let mut processor = Processor::new(mem.clone(), kind, Clock::Virtual, 0).unwrap();
            let core = &mut *processor.core;
            for (at, entry) in [(0x8000, 0x9003), (0x9000, 0xA003), (0xA000, 0x83)] {
                mem.store(at, 8, entry);
            }
            core.seg[crate::arch::segment::seg::CS].attr = 0xA09B;
            (core.cr0, core.cr3, core.cr4, core.efer, core.rip) = (0x8001_0033, 0x8000, 0x20, 0x500, 0x1000);
            core.refresh();
            // 20 times nop; mov [5000h], al; jmp.  The rest of a budget ends among the nops.
            mem.write_bytes(0x1000, &[0x90; 20]);
            mem.write_bytes(0x1014, &[0x88, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00, 0xEB, 0xE3]);
            for turn in 0..3 {
                assert_eq!(reason::BUDGET, processor.run(10 + 22 * 9, &mut || false).reason);
                assert!(mem.take_dirty(5, true), "{kind:?}, turn {turn}");
                assert!(!mem.take_dirty(5, true));
            }
            let translated = processor.statistics().iter().any(|s| s.0 == "fills" && s.1 > 0);
            assert_eq!(kind == EngineKind::Dbt, translated);
        }
    }

    #[test]
    fn the_reference_engine_reports_writes_over_code_that_another_engine_translated() {
        let mem = Memory::new(1 << 20).unwrap();
        let mut processor = Processor::new(mem.clone(), EngineKind::Reference, Clock::Virtual, 0).unwrap();
        let core = &mut *processor.core;
        core.seg[crate::arch::segment::seg::CS].base = 0;
        core.rip = 0x1000;
        core.refresh();
        mem.write_bytes(0x1000, &[0xA2, 0x00, 0x50, 0xEB, 0xFB]); // mov [5000h], al; jmp
        let mut other = Holder::<()>::new(mem.clone());
        other.hold(5);
        for is_single in [false, true] {
            if is_single {
                processor.core.shadow = Shadow::Sti;
            }
            processor.core.rip = 0x1000;
            assert_eq!(reason::BUDGET, processor.run(1, &mut || false).reason);
            assert_eq!(0, processor.core.code_writes.len());
            assert_eq!(Writes::Frames(vec![5]), other.writes());
        }
    }
}
