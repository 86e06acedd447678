//! `Shared`: the machine behind a `Processor` and behind its `LocalApic`, until it is closed.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::bus::Agent;
use crate::mem;
use crate::processor::Processor as Machine;

/// What one hears in a process that was forked from the one where the machine is.
pub const ELSEWHERE: &str =
    "this VM is in the process that made it: a fork does not take it along; make another one here";

/// The machine, which one thread at a time has, as long as it is open.
pub struct Shared {
    process: u32,
    state: Mutex<State>,
    agent: Weak<Agent>,
}

enum State {
    Open(Machine),
    /// In these words.
    Closed(&'static str),
}

/// Why the machine cannot be had.
#[derive(Clone, Copy)]
pub enum Refusal {
    /// Somebody else has it.
    Busy,
    /// It is closed.
    Closed(&'static str),
}

impl From<Refusal> for PyErr {
    fn from(why: Refusal) -> Self {
        PyRuntimeError::new_err(match why {
            Refusal::Busy => "the processor is already running (in another thread): kick it first",
            Refusal::Closed(words) => words,
        })
    }
}

/// An open machine in the hands of this thread.
pub struct Held<'a>(MutexGuard<'a, State>);

impl Held<'_> {
    /// Give back everything that the machine has; `words` are what any later use hears.
    pub fn close(mut self, words: &'static str) {
        *self.0 = State::Closed(words);
    }
}

impl Deref for Held<'_> {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        match &*self.0 {
            State::Open(machine) => machine,
            State::Closed(_) => unreachable!("a closed machine is not handed out"),
        }
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Machine {
        match &mut *self.0 {
            State::Open(machine) => machine,
            State::Closed(_) => unreachable!("a closed machine is not handed out"),
        }
    }
}

impl Shared {
    /// A machine, open.
    pub fn new(machine: Machine) -> Self {
        let agent = Arc::downgrade(&machine.core.agent);
        Self { process: mem::process(), state: Mutex::new(State::Open(machine)), agent }
    }

    /// The processor on the bus, for other threads; nothing if it is closed.
    pub fn agent(&self) -> Option<Arc<Agent>> {
        self.agent.upgrade()
    }

    /// The machine, for one who does not wait.
    pub fn lock(&self) -> Result<Held<'_>, Refusal> {
        if self.process != mem::process() {
            return Err(Refusal::Closed(ELSEWHERE));
        }
        let state = match self.state.try_lock() {
            Ok(state) => state,
            // A panic is a defect of ours, but no reason to hide the state from who looks for it.
            Err(TryLockError::Poisoned(p)) => p.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Refusal::Busy),
        };
        match *state {
            State::Open(_) => Ok(Held(state)),
            State::Closed(words) => Err(Refusal::Closed(words)),
        }
    }

    /// The machine, or nothing if it is closed.
    pub fn lock_if_open(&self) -> Result<Option<Held<'_>>, Refusal> {
        match self.lock() {
            Ok(held) => Ok(Some(held)),
            Err(Refusal::Closed(_)) => Ok(None),
            Err(busy @ Refusal::Busy) => Err(busy),
        }
    }
}
