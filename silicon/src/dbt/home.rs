//! Where a processor's state lives: at the top of a private stack.
//!
//! Generated code runs with the stack pointer at the state, so that state is addressed off the
//! stack pointer and calls (and signals) use the room below it.  The state is built here, not
//! moved here: it is larger than a thread's stack may be.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::zeroed::{Vacant, map};
use crate::cpu::state::{Clock, Core};
use crate::mem::Memory;

/// Bytes of stack below the state.
const STACK_BYTES: usize = 512 << 10;
const GUARD_BYTES: usize = 4096;
const BYTES: usize = GUARD_BYTES + STACK_BYTES + size_of::<Core>().next_multiple_of(4096);

/// Owner of a processor's state.
pub struct Home {
    core: NonNull<Core>,
    map: NonNull<u8>,
}

// SAFETY: `Home` owns its `Core`, which is `Send` itself.
unsafe impl Send for Home {}

impl Home {
    /// A processor after reset, with a stack below it.
    ///
    /// # Errors
    /// If the computer gives no memory.
    pub fn new(mem: Arc<Memory>, clock: Clock, apic_id: u32) -> io::Result<Home> {
        let map = map(BYTES)?;
        // SAFETY: the guard page below the stack is our own, and is made inaccessible; the place
        // for the state is inside, fresh, and aligned (STACK_BYTES is a multiple of its alignment).
        let vacant = unsafe {
            libc::mprotect(map.as_ptr().cast(), GUARD_BYTES, libc::PROT_NONE);
            Vacant::new(map.add(GUARD_BYTES + STACK_BYTES).cast::<Core>().as_ptr())
        };
        let core = NonNull::from(Core::build(vacant, mem, clock, apic_id)?);
        Ok(Home { core, map })
    }
}

impl Deref for Home {
    type Target = Core;
    fn deref(&self) -> &Core {
        // SAFETY: built in `new`, owned by us.
        unsafe { self.core.as_ref() }
    }
}

impl DerefMut for Home {
    fn deref_mut(&mut self) -> &mut Core {
        // SAFETY: built in `new`, owned by us, borrowed exclusively.
        unsafe { self.core.as_mut() }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // SAFETY: built and mapped in `new`, dropped once.
        unsafe {
            ptr::drop_in_place(self.core.as_ptr());
            libc::munmap(self.map.as_ptr().cast(), BYTES);
        }
    }
}
