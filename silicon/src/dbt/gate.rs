//! Passing between Rust and generated code.

use std::arch::asm;

use super::Dbt;
use super::nudge::Running;
use crate::cpu::fxstate;
use crate::cpu::state::{Core, Fx};

/// Run generated code at host address `host` through the way in at `enter`.
pub fn enter(enter: u64, core: &mut Core, host: u64) {
    // SAFETY: `enter` is the entry piece written by `glue::write`, which has this signature and
    // keeps the C calling convention; `core` lives in a `Home`, so there is a stack below it;
    // `host` is the main entry of a live block.
    unsafe {
        let f: extern "C" fn(*mut Core, u64) = std::mem::transmute(enter as usize);
        f(core, host);
    }
}

/// This thread runs the processor's generated code as long as that lasts.
pub fn running(core: &Core) -> Running {
    // SAFETY: `Dbt::run`, which borrows the state, drops the result before it returns.
    unsafe { Running::new(core.agent.thread(), &raw const core.countdown) }
}

/// The processor and the engine that a helper was called for.
#[allow(clippy::not_unsafe_ptr_arg_deref)] // only ever called by generated code, with its own state
pub fn parts<'a>(core: *mut Core) -> (&'a mut Core, &'a mut Dbt) {
    // SAFETY: generated code passes the state it runs on; `Dbt::run` put the engine's address
    // there and waits in `enter`, using neither until generated code comes back.
    unsafe {
        let core = &mut *core;
        let dbt = &mut *(core.jit.engine as *mut Dbt);
        (core, dbt)
    }
}

/// The XMM registers are stored in `core.fx` already; add the x87 state and MXCSR, which are
/// still in the computer's registers.
pub fn vector_state_out(core: &mut Core) {
    let mut now = Fx::at_reset();
    // SAFETY: a 64-byte aligned 512-byte buffer.
    unsafe { asm!("fxsave64 [{}]", in(reg) now.0.as_mut_ptr(), options(nostack, preserves_flags)) };
    core.fx.0[..160].copy_from_slice(&now.0[..160]);
    fxstate::normalize(&mut core.fx);
}

/// Let operands of generated code with segment GS begin at an address.  This thread uses the register
/// for nothing else.
pub fn set_window(address: u64) {
    debug_assert!(super::promotion::is_possible());
    // SAFETY: the computer lets programs write it (`is_possible`), and nothing of this process but
    // generated code has operands in GS.
    unsafe { asm!("wrgsbase {}", in(reg) address, options(nostack, preserves_flags)) };
}

/// Whether the guest's x87, whose state is in the computer's registers, has unmasked exceptions.
#[must_use]
pub fn is_x87_pending() -> bool {
    let (status, mut control): (u16, u16);
    control = 0;
    // SAFETY: stores two words; nothing changes.
    unsafe {
        asm!("fnstsw ax", "fnstcw [{}]", in(reg) &raw mut control, out("ax") status,
            options(nostack, preserves_flags));
    }
    status & !control & 0x3F != 0
}

/// Load the x87 state and MXCSR from `core.fx` (the XMM registers follow when generated code
/// goes on).
pub fn vector_state_in(core: &mut Core) {
    // SAFETY: an aligned image that FXSAVE made or the interpreter keeps valid.  The XMM registers
    // are declared lost; the x87 registers are nobody's here.
    unsafe {
        asm!(
            "fxrstor64 [{}]", in(reg) core.fx.0.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// What tells whether [`vector_state_in`] is needed after [`vector_state_out`]: the state that they
/// exchange, and how often the interpreter ran something in the computer's registers.
#[must_use]
pub fn x87_state(core: &Core) -> ([u8; 160], u64) {
    let mut state = [0; 160];
    state.copy_from_slice(&core.fx.0[..160]);
    (state, core.vectors.runs)
}
