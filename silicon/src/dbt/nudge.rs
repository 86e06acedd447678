//! Nudges: a signal that has a thread's generated code leave at the head of its next block.
//!
//! Generated code looks at its countdown alone.  Another thread cannot change that: each block stores it
//! without a lock, and in a short loop the store that is on its way always wins.  The thread itself can,
//! in the handler of a signal.  The signal is the last of the real-time ones that nobody has a handler
//! for; without one, who rings is heard when the countdown ends.
//!
//! Source: signal(7), tgkill(2).

use std::cell::Cell;
use std::ptr;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::cpu::countdown::Countdown;

thread_local! {
    /// What this thread's generated code counts down.
    static COUNTDOWN: Cell<*const Countdown> = const { Cell::new(ptr::null()) };
    /// This thread's number; 0: not asked yet.
    static NUMBER: Cell<u32> = const { Cell::new(0) };
}

/// The signal.
static SIGNAL: LazyLock<Option<libc::c_int>> =
    LazyLock::new(|| (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev().find(|&signal| take(signal)));

extern "C" fn on_nudge(_: libc::c_int) {
    // SAFETY: null, or the state that this thread runs now.
    if let Some(countdown) = unsafe { COUNTDOWN.get().as_ref() } {
        countdown.interrupt();
    }
}

/// Install our handler for a signal, if there is none.
fn take(signal: libc::c_int) -> bool {
    // SAFETY: the new action is fully set up, and its handler may run at any moment.
    unsafe {
        let mut found: libc::sigaction = std::mem::zeroed();
        let is_known = libc::sigaction(signal, ptr::null(), &raw mut found) == 0;
        if !is_known || found.sa_sigaction != libc::SIG_DFL {
            return false;
        }
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = on_nudge as *const () as usize;
        new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut new.sa_mask); // as for those of `signals`
        libc::sigaction(signal, &raw const new, ptr::null_mut()) == 0
    }
}

fn number() -> u32 {
    if NUMBER.get() == 0 {
        // SAFETY: a query.
        NUMBER.set(unsafe { libc::gettid() }.cast_unsigned());
    }
    NUMBER.get()
}

/// While it lasts, this thread runs code of the processor whose countdown this is, and `who` says so.
pub struct Running(*const AtomicU32);

impl Running {
    /// Say so.
    ///
    /// # Safety
    /// Both have to last as long as the result.
    pub unsafe fn new(who: &AtomicU32, countdown: *const Countdown) -> Self {
        LazyLock::force(&SIGNAL);
        COUNTDOWN.set(countdown);
        who.store(number(), SeqCst);
        Self(who)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: as promised.
        unsafe { &*self.0 }.store(0, SeqCst);
        COUNTDOWN.set(ptr::null());
    }
}

/// Have the thread's generated code leave soon, if one runs any.
pub fn nudge(who: &AtomicU32) {
    match (who.load(SeqCst), *SIGNAL) {
        (0, _) | (_, None) => {}
        (thread, _) if thread == number() => on_nudge(0),
        (thread, Some(signal)) => {
            // SAFETY: the signal has our handler; a thread that is gone by now is nobody, or does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
        }
    }
}
