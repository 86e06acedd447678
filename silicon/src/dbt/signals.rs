//! The signals by which generated code's faults come back, and everybody else's handlers for them.
//!
//! [`register`] names a range of generated code and an address to go on at.  When a synchronous
//! signal (SIGSEGV, SIGBUS, SIGFPE, SIGILL) hits inside a range, its R14 receives the faulting RIP
//! (and R15 the exception's vector or the page that was accessed) and execution goes on there; every other signal
//! goes to whoever would have handled it without us.
//!
//! *Whose signals they are.*  Whoever installs a handler later takes the signals from us: a guest's
//! division by zero would then be our process's.  So who holds them is looked at again ([`look`])
//! while a processor runs; a handler that was found there goes in front of the chain of the others, and ours
//! comes back.  A thread that blocks one of the signals would be ended by the kernel: they are
//! unblocked.  A look costs five system calls, more than many a VM exit; so within a run it is
//! taken once in about a millisecond ([`look_now_and_then`]).  A handler that another thread (or a
//! callback of the run's own) installs is thus in front of ours for so long, and a fault of the
//! guest in that time is its: that cannot be seen from here.
//!
//! Source: sigaction(2), signal(7); the kernel's rules for masks are kept for those that we call.

use std::arch::x86_64::_rdtsc;
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};

use crate::addr::FRAME_BYTES;

/// Most ranges at one time (four for each processor).
const SLOTS: usize = 5460;
/// A slot that is being filled.
const BUSY: usize = 1;

struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    recover: AtomicUsize,
    wants_vector: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        recover: AtomicUsize::new(0),
        wants_vector: AtomicUsize::new(0),
    }
}; SLOTS];
/// One past the highest slot ever used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// A registered range; dropping it ends the registration.
#[derive(Debug)]
pub struct Registration(usize);

impl Drop for Registration {
    fn drop(&mut self) {
        TABLE[self.0].start.store(0, Release);
    }
}

/// Go on at `recover`, with the faulting RIP in R14, when code in `range` faults; in R15 is the vector,
/// if wanted, and else the page that was accessed, with [`IS_WRITE`].
///
/// The recovery code runs with every other register, the flags and the x87/SSE state as they
/// were at the fault.
///
/// # Errors
/// If the table is full.
pub fn register(range: Range<usize>, recover: usize, wants_vector: bool) -> io::Result<Registration> {
    look();
    for (i, slot) in TABLE.iter().enumerate() {
        if slot.start.compare_exchange(0, BUSY, AcqRel, Relaxed).is_ok() {
            slot.end.store(range.end, Relaxed);
            slot.recover.store(recover, Relaxed);
            slot.wants_vector.store(usize::from(wants_vector), Relaxed);
            slot.start.store(range.start, Release);
            USED.fetch_max(i + 1, AcqRel);
            return Ok(Registration(i));
        }
    }
    Err(io::Error::other("no room for another range of generated code: use fewer processors"))
}

/// The slot whose range holds `rip`: where to go on, and whether the vector is wanted.
fn find(rip: usize) -> Option<(usize, bool)> {
    TABLE[..USED.load(Acquire).min(SLOTS)].iter().find_map(|slot| {
        let start = slot.start.load(Acquire);
        let inside = start > BUSY && (start..slot.end.load(Relaxed)).contains(&rip);
        let answer = (slot.recover.load(Relaxed), slot.wants_vector.load(Relaxed) != 0);
        (inside && slot.start.load(Acquire) == start).then_some(answer)
    })
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// A handler that is not ours, and those that were there before it.  Never changed or freed once
/// handlers can see it; there is a new one only when somebody installed a handler.
struct Link {
    action: libc::sigaction,
    older: *const Link,
}

/// By signal: the handlers that are not ours, the newest first.
static CHAINS: [AtomicPtr<Link>; 4] = [const { AtomicPtr::new(ptr::null_mut()) }; 4];
/// By signal: the link whose handler is being called, and the thread.
static PASSING: [(AtomicPtr<Link>, AtomicUsize); 4] =
    [const { (AtomicPtr::new(ptr::null_mut()), AtomicUsize::new(0)) }; 4];

/// Of a page fault's error code, and of what the recovery code finds in R15: it was a write.
pub const IS_WRITE: u64 = 2;

/// Ticks of the TSC between two looks within a run: a millisecond or less.
const PATIENCE: u64 = 2_000_000;

thread_local! {
    static LOOKED: Cell<u64> = const { Cell::new(0) };
}

/// The computer's TSC: the cheapest clock there is, where its rate does not matter much.
#[inline]
#[must_use]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { _rdtsc() }
}

/// [`look`], if this thread did not lately.
#[inline]
pub fn look_now_and_then() {
    let now = ticks();
    if now.wrapping_sub(LOOKED.get()) > PATIENCE {
        look();
    }
}

/// Make sure that this thread's faults come to us, whoever installed or blocked what since.
#[cold]
pub fn look() {
    static LOCK: Mutex<()> = Mutex::new(());
    LOOKED.set(ticks());
    {
        let _lock = LOCK.lock();
        SIGNALS.iter().zip(&CHAINS).for_each(|(&signal, chain)| take(signal, chain));
    }
    // SAFETY: a set that is made here.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in &SIGNALS {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}

/// Install our handler if it is not there, and remember the one that was.
fn take(signal: libc::c_int, chain: &AtomicPtr<Link>) {
    // SAFETY: the old action is stored before ours can run; ours is fully set up; the links are
    // never freed.
    unsafe {
        let mut found: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, ptr::null(), &raw mut found);
        let ours = on_fault as *const () as usize;
        if found.sa_sigaction == ours {
            return;
        }
        let older = without(chain.load(Acquire), found.sa_sigaction);
        chain.store(Box::into_raw(Box::new(Link { action: found, older })), Release);
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = ours;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // A frame takes 3.6 kBytes with AVX-512, a stack for signals often 8: nobody comes on top of ours.
        libc::sigfillset(&raw mut new.sa_mask);
        libc::sigaction(signal, &raw const new, ptr::null_mut());
    }
}

/// The chain without a handler.
///
/// # Safety
/// `link` is null or a link.
unsafe fn without(link: *const Link, handler: libc::sighandler_t) -> *const Link {
    // SAFETY: links are never freed.
    let Some(l) = (unsafe { link.as_ref() }) else { return link };
    // SAFETY: as above.
    let older = unsafe { without(l.older, handler) };
    if l.action.sa_sigaction == handler {
        older
    } else if older == l.older {
        link
    } else {
        Box::into_raw(Box::new(Link { action: l.action, older }))
    }
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context to a SA_SIGINFO handler.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = gregs[libc::REG_RIP as usize];
    // SAFETY: as above.  (A positive code says that it was an instruction.)
    let is_fault = unsafe { (*info).si_code } > 0;
    if is_fault && let Some((recover, wants_vector)) = find(rip as usize) {
        gregs[libc::REG_R14 as usize] = rip;
        gregs[libc::REG_R15 as usize] = if wants_vector {
            gregs[libc::REG_TRAPNO as usize]
        } else {
            // SAFETY: as above; of a fault there is an address.
            let page = unsafe { (*info).si_addr() } as i64 & !(FRAME_BYTES as i64 - 1);
            page | gregs[libc::REG_ERR as usize] & IS_WRITE as i64
        };
        gregs[libc::REG_RIP as usize] = recover as i64;
        return;
    }
    let Some(i) = SIGNALS.iter().position(|&s| s == signal) else { return };
    // SAFETY: a query.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) } as usize;
    let (passing, of_thread) = &PASSING[i];
    let mut link: *const Link = CHAINS[i].load(Acquire);
    if !is_fault && of_thread.load(Acquire) == thread {
        // A handler that we called raises its signal again, for those that were there before it.
        // SAFETY: links are never freed.
        link = unsafe { passing.load(Acquire).as_ref() }.map_or(link, |l| l.older);
    } else if is_fault && is_stuck(rip.cast_unsigned()) {
        // SAFETY: as above.
        link = unsafe { link.as_ref() }.map_or(link, |l| l.older);
        CHAINS[i].store(link.cast_mut(), Release);
    }
    passing.store(link.cast_mut(), Release);
    of_thread.store(thread, Release);
    // SAFETY: a link of this signal, and what the kernel gave us.
    unsafe { pass_on(link, signal, info, context, is_fault) };
    of_thread.store(0, Release);
}

/// Whether a fault was passed on so often without effect that its handler has obviously retired
/// (faulthandler's returns at once when it was disabled).
fn is_stuck(rip: u64) -> bool {
    const OFTEN: u64 = 100_000;
    static LAST: AtomicU64 = AtomicU64::new(0);
    static TIMES: AtomicU64 = AtomicU64::new(0);
    if LAST.swap(rip, AcqRel) != rip {
        TIMES.store(0, Release);
    }
    TIMES.fetch_add(1, AcqRel) % OFTEN == OFTEN - 1
}

/// Let a handler that is not ours deal with it, as the kernel would have called it.
///
/// # Safety
/// `link` is null or a link of this signal; the rest is what our handler was given.
unsafe fn pass_on(
    link: *const Link,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    is_fault: bool,
) {
    // SAFETY: links are never freed; a handler is called as its flags say; masks are put back.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        let action = link.as_ref().map_or(default, |l| l.action);
        match action.sa_sigaction {
            libc::SIG_IGN if !is_fault => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                // The instruction faults again, or the signal comes again, and has its effect.
                libc::sigaction(signal, &raw const action, ptr::null_mut());
                if !is_fault {
                    libc::raise(signal);
                }
            }
            handler => {
                let mut before = std::mem::zeroed();
                let (mut mask, interrupted) = (action.sa_mask, context.cast::<libc::ucontext_t>());
                // Of a mask the kernel's frames have 64 bits, one for each signal.
                *(&raw mut mask).cast::<u64>() |= *(&raw const (*interrupted).uc_sigmask).cast::<u64>();
                if action.sa_flags & libc::SA_NODEFER == 0 {
                    libc::sigaddset(&raw mut mask, signal);
                }
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, &raw mut before);
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                    std::mem::transmute::<usize, Full>(handler)(signal, info, context);
                } else {
                    std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal);
                }
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
            }
        }
    }
}
