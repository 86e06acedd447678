//! What executes instructions, and the plainest way to do it.

use crate::code::NOBODY;
use crate::cpu::state::Core;
use crate::cpu::step::step;
use crate::cpu::trap::Exec;
use crate::dbt::promotion::Windows;

/// An executor of instructions.
pub trait Engine: Send {
    /// Execute until `core.countdown` is used up (or nearly, if `core.may_stop_early`),
    /// `core.attention` is set, the bell is rung, or a trap.  At least one instruction is tried.  Called between
    /// instructions with no interrupt shadow, TF clear and no breakpoints armed.
    ///
    /// # Errors
    /// The trap of the instruction that RIP names.
    fn run(&mut self, core: &mut Core) -> Exec<()>;
    /// Deal with what was written over code, and pass it on to whoever else holds translations of
    /// it: before anybody but this processor can run.
    fn settle(&mut self, core: &mut Core);
    /// Drop everything derived from memory or translations.
    fn flush(&mut self, core: &mut Core);
    /// The engine's own counters.
    fn statistics(&self, core: &Core) -> Vec<(&'static str, u64)>;
    /// Who gets windows ([`crate::mmu::window`]) from now on; nothing to an engine that has none.
    fn use_windows(&mut self, _core: &mut Core, _windows: Windows) {}
}

/// The reference engine: one instruction after the other.
#[derive(Default)]
pub struct Reference;

impl Engine for Reference {
    fn run(&mut self, core: &mut Core) -> Exec<()> {
        while core.countdown.get() > 0 {
            let result = step(core);
            self.settle(core);
            result?;
            if core.attention != 0 || core.agent.is_rung() {
                break;
            }
        }
        Ok(())
    }
    #[inline]
    fn settle(&mut self, core: &mut Core) {
        if !core.code_writes.is_empty() {
            for (hpa, _) in core.code_writes.drain(..) {
                core.mem.report_code(hpa >> 12, NOBODY, &core.agent);
            }
        }
    }
    fn flush(&mut self, _core: &mut Core) {}
    fn statistics(&self, _core: &Core) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
