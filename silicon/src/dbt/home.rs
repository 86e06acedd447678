//! Where a processor's state lives: at the top of a private stack.
//!
//! Generated code runs with the stack pointer at the state, so that state is addressed off the
//! stack pointer and calls (and signals) use the room below it.  The state is built here, not
//! moved here: it is larger than a thread's stack may be.  Behind the state is the [`Bell`].

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use super::zeroed::{Vacant, map};
use crate::cpu::state::{Clock, Core};
use crate::mem::Memory;

/// Bytes of stack below the state.
const STACK_BYTES: usize = 512 << 10;
const GUARD_BYTES: usize = 4096;
/// Where the bell is, counted from the state.
const BELL: usize = size_of::<Core>().next_multiple_of(64);
const BYTES: usize = GUARD_BYTES + STACK_BYTES + BELL + 64;

/// Owner of a processor's state.
pub struct Home {
    core: NonNull<Core>,
    _room: Arc<Room>,
}

/// The mapping, which lasts as long as somebody may ring the bell in it.
struct Room(NonNull<u8>);

// SAFETY: it is only an address here, of a mapping that it owns.
unsafe impl Send for Room {}
// SAFETY: as above.
unsafe impl Sync for Room {}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: mapped in `Home::new`; neither home nor bell is left.
        unsafe { libc::munmap(self.0.as_ptr().cast(), BYTES) };
    }
}

/// Words behind a processor's state that others see.
pub struct Bell {
    words: NonNull<[AtomicU32; 2]>,
    _room: Arc<Room>,
}

// SAFETY: the words are atomic, and last as long as the room that is held with it.
unsafe impl Send for Bell {}
// SAFETY: as above.
unsafe impl Sync for Bell {}

impl Bell {
    fn new(room: Arc<Room>) -> Self {
        // SAFETY: inside the mapping, and the state ends before it.
        let words = unsafe { room.0.add(GUARD_BYTES + STACK_BYTES + BELL).cast() };
        Self { words, _room: room }
    }

    fn words(&self) -> &[AtomicU32; 2] {
        // SAFETY: aligned, zero at first, nothing else's, and there as long as we are.
        unsafe { self.words.as_ref() }
    }

    /// What it was rung for.
    #[inline]
    #[must_use]
    pub fn word(&self) -> &AtomicU32 {
        &self.words()[0]
    }

    /// The thread that runs the processor's generated code, or 0.
    #[inline]
    #[must_use]
    pub fn thread(&self) -> &AtomicU32 {
        &self.words()[1]
    }
}

// SAFETY: `Home` owns its `Core`, which is `Send` itself.
unsafe impl Send for Home {}

impl Home {
    /// A processor after reset, with a stack below it.
    ///
    /// # Errors
    /// If the computer gives no memory.
    pub fn new(mem: Arc<Memory>, clock: Clock, apic_id: u32) -> io::Result<Home> {
        let room = Arc::new(Room(map(BYTES)?));
        let map = room.0;
        // SAFETY: the guard page below the stack is our own, and is made inaccessible; the place
        // for the state is inside, fresh, and aligned (STACK_BYTES is a multiple of its alignment).
        let vacant = unsafe {
            libc::mprotect(map.as_ptr().cast(), GUARD_BYTES, libc::PROT_NONE);
            Vacant::new(map.add(GUARD_BYTES + STACK_BYTES).cast::<Core>().as_ptr())
        };
        let core = NonNull::from(Core::build(vacant, mem, clock, apic_id, Bell::new(room.clone()))?);
        Ok(Home { core, _room: room })
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
        // SAFETY: built in `new`, dropped once, before its room.
        unsafe { ptr::drop_in_place(self.core.as_ptr()) };
    }
}
