//! Signals at any moment lose nothing: neither of what a guest does nor of the signals.
//!
//! What: while a processor runs a program that faults in its windows all the time, another thread sends it
//! SIGSEGV, SIGPROF and SIGINT; the handlers are this process's.
//! Source: signal(7), tgkill(2).  Invariants: each SIGPROF and SIGINT that is sent when the last one was
//! handled is handled, too; the processor's state, memory and counts are those of one that nobody disturbs.
//! (A SIGSEGV that is sent while one of a fault waits is nobody's: "standard signals do not queue".)
//!
//! `make fuzz-windows` is the long form: `SIGNALS` says how many of each kind are handled.

mod address_beds;
mod address_forms;
mod arena_bed;
mod random;

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use address_beds::{bed, has_avx};
use address_forms::program;
use arena_bed::{ALONE, LOW, faults, memory_of, run, seen};
use silicon::dbt::promotion::Windows;
use silicon::processor::{EngineKind, Processor};

const KINDS: [libc::c_int; 3] = [libc::SIGSEGV, libc::SIGPROF, libc::SIGINT];
/// Signals of each kind, if nothing else is said.
const FEW: u64 = 2_000;
/// The same, where two have to come within the microseconds of one fault.
const MANY: u64 = 20_000;
/// Between two of a kind: 10,000 a second.
const PAUSE: Duration = Duration::from_micros(100);
/// Instructions that a processor runs at a time.
const TURN: u64 = 50_000;

static HANDLED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

extern "C" fn on_signal(signal: libc::c_int) {
    let kind = KINDS.iter().position(|&k| k == signal).expect("one of ours");
    HANDLED[kind].fetch_add(1, SeqCst);
}

/// `flags`: whether the handlers want the stack for signals.
fn install(signals: &[libc::c_int], flags: libc::c_int) {
    for &signal in signals {
        // SAFETY: the new action is fully set up, and its handler may run at any moment.
        unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = on_signal as *const () as usize;
            new.sa_flags = flags | libc::SA_RESTART;
            assert_eq!(0, libc::sigaction(signal, &raw const new, std::ptr::null_mut()));
        }
    }
}

/// Send until so many of each kind from the first on were handled; how many were sent, and in how many seconds.
///
/// Sleeps are as short as they can be (usually Linux adds 50 us to each), and signals that came late are made
/// good: else the sender, and not who handles them, would say how many there are in a second.
fn send(thread: libc::pid_t, first: usize, most: u64) -> ([u64; 3], f64) {
    // SAFETY: of this thread.
    assert_eq!(0, unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) });
    let (begin, mut sent, mut next, mut again) = (Instant::now(), [0; 3], [0; 3], [Duration::ZERO; 3]);
    let handled = || HANDLED.each_ref().map(|n| n.load(SeqCst));
    while handled()[first..].iter().any(|&n| n < most) {
        std::thread::sleep(PAUSE / 4);
        let now = begin.elapsed();
        let due = (now.as_nanos() / PAUSE.as_nanos()) as u64;
        for (kind, signal) in KINDS.into_iter().enumerate().skip(first) {
            let all = handled()[kind];
            let is_lost = signal == libc::SIGSEGV && now >= again[kind];
            if all < due.min(most) && (all >= next[kind] || is_lost) {
                // SAFETY: the thread is there until this ends.
                let done = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
                assert_eq!(0, done);
                sent[kind] += 1;
                (next[kind], again[kind]) = (all + 1, now + PAUSE);
            }
        }
    }
    (sent, begin.elapsed().as_secs_f64())
}

/// Seconds that this thread had a core.
fn core_seconds() -> f64 {
    // SAFETY: all zeros is a time; the kernel fills it.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    assert_eq!(0, unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) });
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Three handlers may be on top of each other, each on 3.6 kBytes of the kernel's with AVX-512; a thread of
/// the tests has 8 for them.
fn enlarge_stack_for_signals() {
    let stack = Vec::leak(vec![0u8; 64 << 10]);
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: memory that stays.
    assert_eq!(0, unsafe { libc::sigaltstack(&raw const new, std::ptr::null_mut()) });
}

fn outcome(p: &mut Processor) -> ((u64, String), u64, [u64; 3]) {
    (seen(p), memory_of(p), faults(p))
}

#[test]
fn signals_at_any_moment_lose_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    enlarge_stack_for_signals();
    install(&KINDS, libc::SA_ONSTACK);
    storm(0, FEW);
}

/// The stack for signals that a thread of Rust has takes two handlers with AVX-512, not three: ours alone.
#[test]
fn nobody_comes_on_top_of_our_handler() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    install(&KINDS[1..], 0);
    storm(1, MANY);
}

/// Signals from the first of these kinds on.
fn storm(first: usize, usual: u64) {
    let most = std::env::var("SIGNALS").map_or(usual, |n| n.parse().expect("SIGNALS: a number"));
    let code = program(5, has_avx()).code;
    let made = |engine, windows| bed(engine, windows, LOW, 5, &code);
    for handled in &HANDLED {
        handled.store(0, SeqCst);
    }
    let mut disturbed = made(EngineKind::Dbt, Windows::Always);
    let is_over = AtomicBool::new(false);
    // SAFETY: a query.
    let thread = unsafe { libc::gettid() };
    let (mut turns, is_over) = (0, &is_over);
    let before = core_seconds();
    let (sent, seconds) = std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let sent = send(thread, first, most);
            is_over.store(true, SeqCst);
            sent
        });
        while !is_over.load(SeqCst) {
            run(&mut disturbed, TURN);
            turns += 1;
        }
        sender.join().unwrap()
    });
    let on_core = core_seconds() - before;
    let handled = HANDLED.each_ref().map(|n| n.load(SeqCst));
    let [per_second, per_core_second] = [seconds, on_core].map(|s| handled.map(|n| (n as f64 / s) as u64));
    println!(
        "{sent:?} signals (SIGSEGV, SIGPROF, SIGINT), {handled:?} handled, {per_second:?} a second for \
         {seconds:.1} s, {per_core_second:?} a second in which the processor's thread had a core, over {} \
         instructions with {} faults",
        turns * TURN,
        faults(&disturbed).iter().sum::<u64>(),
    );
    assert_eq!(sent[1..], handled[1..]);
    assert!(handled[0] <= sent[0] && handled[first..].iter().all(|&n| most <= n));
    let mut calm = made(EngineKind::Dbt, Windows::Always);
    (0..turns).for_each(|_| run(&mut calm, TURN));
    assert_eq!(outcome(&mut calm), outcome(&mut disturbed));
    assert!(faults(&calm).iter().sum::<u64>() > turns);
}
