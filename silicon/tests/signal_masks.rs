//! A handler that was there before ours is called with the signals blocked that the kernel would block.
//!
//! Source: sigaction(2).

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use silicon::dbt::signals::look;

static SEEN: AtomicU64 = AtomicU64::new(0);

/// The signals that this thread has blocked, one bit for each.
fn blocked() -> u64 {
    // SAFETY: a query; a mask has 64 bits at least.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
        *(&raw const mask).cast()
    }
}

extern "C" fn on_signal(_: libc::c_int) {
    SEEN.store(blocked(), SeqCst);
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: a set that is made here.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            assert_eq!(0, libc::sigaddset(&raw mut set, signal));
        }
        set
    }
}

fn install(flags: libc::c_int, mask: &[libc::c_int]) -> libc::sighandler_t {
    // SAFETY: the new action is fully set up.
    unsafe {
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = std::mem::zeroed();
        new.sa_sigaction = on_signal as *const () as usize;
        (new.sa_flags, new.sa_mask) = (flags, set_of(mask));
        assert_eq!(0, libc::sigaction(libc::SIGFPE, &raw const new, &raw mut old));
        old.sa_sigaction
    }
}

fn raise() -> (u64, u64) {
    SEEN.store(u64::MAX, SeqCst);
    // SAFETY: there is a handler.
    assert_eq!(0, unsafe { libc::raise(libc::SIGFPE) });
    (SEEN.load(SeqCst), blocked())
}

#[test]
fn masks_are_the_kernels() {
    let own = set_of(&[libc::SIGUSR2]);
    // SAFETY: a set of this function's.
    assert_eq!(0, unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const own, std::ptr::null_mut()) });
    for flags in [0, libc::SA_NODEFER, libc::SA_RESTART] {
        for mask in [&[][..], &[libc::SIGUSR1], &[libc::SIGUSR1, libc::SIGFPE]] {
            install(flags, mask);
            let expected = raise();
            look();
            assert_eq!(expected, raise(), "flags {flags:#x}, mask {mask:?}");
            assert_ne!(on_signal as *const () as usize, install(flags, mask), "ours was there");
        }
    }
}
