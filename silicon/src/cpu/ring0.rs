//! Ring 0 that is not there: software outside takes what leads to CPL 0, while code runs above it.
//!
//! On a computer a hypervisor of the kind that needs no VMX sits at CPL 0 behind an IDT, a GDT and
//! a TSS of its own.  Here that software is outside: an event that is delivered while CPL is
//! greater than 0 ends the run instead ([`reason::EVENT`]), as if every gate of the IDT had DPL 3
//! and led there.  Nothing of the delivery has happened then.  CPUID is as with CPUID faulting on.
//!
//! Beside it: what becomes of *sensitive* instructions that are not privileged, at CPL 1 to 3.
//! Source: Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual
//! Machine Monitor", for which they are; Popek and Goldberg, "Formal Requirements for Virtualizable
//! Third Generation Architectures", for why they matter.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::arch::exception::vector;
use crate::arch::exit::{Exit, reason};
use crate::cpu::event::Event;
use crate::cpu::state::Core;
use crate::cpu::trap::{Exec, Trap, gp};
use crate::vmx::exit::interruption;

/// What becomes of a sensitive instruction at a CPL above 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sensitive {
    /// It executes, as IA-32 has it.
    #[default]
    Silent,
    /// #GP(0), as of a processor that can be virtualized.
    Trap,
    /// The run ends before it, at CPL 1 and 2, where kernels are.
    Stop,
}

/// Who is at CPL 0.
#[derive(Clone, Copy, Default, Debug)]
pub struct Ring0 {
    /// Software outside: what leads there ends the run.
    pub is_outside: bool,
    /// See there.
    pub sensitive: Sensitive,
}

/// Whether the code that runs now is deprivileged: ring 0 is outside.
#[must_use]
pub fn is_below(core: &Core) -> bool {
    core.ring0.is_outside && core.cpl > 0 && !core.vmx.non_root
}

/// Whether sensitive instructions are looked at now.
#[must_use]
pub fn looks(core: &Core) -> bool {
    let level = if core.ring0.sensitive == Sensitive::Stop { 1..=2 } else { 1..=3 };
    core.ring0.sensitive != Sensitive::Silent && level.contains(&core.cpl) && !core.vmx.non_root
}

/// The end of the run that an event makes, instead of its delivery.
///
/// `payload`: the address of a page fault, the DR6 bits of a debug exception.
///
/// # Errors
/// That.
pub fn take(core: &Core, event: &Event, payload: u64) -> Exec<()> {
    if !is_below(core) {
        return Ok(());
    }
    let (intr_info, intr_error) = interruption(event);
    let qualification = if matches!(event.vector, vector::PF | vector::DB) { payload } else { 0 };
    let length = u32::from(event.length);
    Err(Trap::Stop(Box::new(Exit {
        length,
        intr_info,
        intr_error,
        ..Exit::new(reason::EVENT, qualification)
    })))
}

/// What a sensitive instruction meets before it executes.
///
/// # Errors
/// #GP(0), or the end of the run.
#[inline]
pub fn check(core: &Core, insn: &Instruction) -> Exec<()> {
    if core.ring0.sensitive == Sensitive::Silent || !looks(core) || !is_sensitive(insn) {
        return Ok(());
    }
    match core.ring0.sensitive {
        Sensitive::Stop => {
            let length = insn.len() as u32;
            Err(Trap::Stop(Box::new(Exit { length, ..Exit::new(reason::SENSITIVE, 0) })))
        }
        _ => Err(gp(0)),
    }
}

/// Whether the instruction is sensitive, and no level keeps a program from executing it.
///
/// INT n and its kin are not among them: through the host's gates they trap as it is.
#[must_use]
pub fn is_sensitive(insn: &Instruction) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Sgdt | M::Sidt | M::Sldt | M::Smsw | M::Str => true,
        M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq => true,
        M::Lar | M::Lsl | M::Verr | M::Verw => true,
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => true,
        M::Retf | M::Iret | M::Iretd | M::Iretq => true,
        M::Call => insn.is_call_far() || insn.is_call_far_indirect(),
        M::Jmp => insn.is_jmp_far() || insn.is_jmp_far_indirect(),
        M::Mov | M::Push | M::Pop => (0..insn.op_count())
            .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_segment_register()),
        _ => false,
    }
}
