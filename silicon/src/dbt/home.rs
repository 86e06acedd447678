//! Where a processor's state lives: at the top of a private stack.
//!
//! Generated code runs with the stack pointer at the state, so that state is addressed off the
//! stack pointer and calls (and signals) use the room below it.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr;

use crate::cpu::state::Core;

/// Bytes of stack below the state.
const STACK_BYTES: usize = 512 << 10;
const GUARD_BYTES: usize = 4096;

/// Owner of a processor's state.
pub struct Home {
    core: ptr::NonNull<Core>,
    map: *mut libc::c_void,
    len: usize,
}

// SAFETY: `Home` owns its `Core`, which is `Send` itself.
unsafe impl Send for Home {}

impl Home {
    /// Move `core` to a place with a stack below it.
    ///
    /// # Errors
    /// If the computer gives no memory.
    pub fn new(core: Core) -> io::Result<Home> {
        let len = GUARD_BYTES + STACK_BYTES + size_of::<Core>().next_multiple_of(4096);
        // SAFETY: a fresh private mapping; the guard page below the stack is made inaccessible;
        // the place for the state is aligned (STACK_BYTES is a multiple of its alignment).
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let map = libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0);
            if map == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            libc::mprotect(map, GUARD_BYTES, libc::PROT_NONE);
            let place = map.cast::<u8>().add(GUARD_BYTES + STACK_BYTES).cast::<Core>();
            place.write(core);
            Ok(Home { core: ptr::NonNull::new_unchecked(place), map, len })
        }
    }
}

impl Deref for Home {
    type Target = Core;
    fn deref(&self) -> &Core {
        // SAFETY: initialised in `new`, owned by us.
        unsafe { self.core.as_ref() }
    }
}

impl DerefMut for Home {
    fn deref_mut(&mut self) -> &mut Core {
        // SAFETY: initialised in `new`, owned by us, borrowed exclusively.
        unsafe { self.core.as_mut() }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // SAFETY: initialised and mapped in `new`, dropped once.
        unsafe {
            ptr::drop_in_place(self.core.as_ptr());
            libc::munmap(self.map, self.len);
        }
    }
}
