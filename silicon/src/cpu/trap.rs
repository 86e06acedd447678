//! Why an instruction did not complete.

use crate::arch::exception::Exception;
use crate::arch::exit::Exit;

/// What stops an instruction.  The architectural state is as before it, except where the manual
/// says otherwise (a repeated string instruction keeps its progress).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trap {
    /// An exception to deliver.
    Exception(Exception),
    /// A VM exit (non-root operation only): not yet performed, see `vmx::exit`.
    Exit(Box<Exit>),
    /// Control leaves `run` (bare mode: port or memory-mapped I/O, HLT, shutdown).
    Stop(Box<Exit>),
    /// A repeated string instruction gives way after part of its work; RIP still names it.
    Again,
}

/// The result of (part of) an instruction.
pub type Exec<T> = Result<T, Trap>;

impl From<Exception> for Trap {
    fn from(e: Exception) -> Self {
        Trap::Exception(e)
    }
}

/// `#GP(code)`.
#[must_use]
pub fn gp(code: u32) -> Trap {
    Trap::Exception(Exception::coded(crate::arch::exception::vector::GP, code))
}

/// `#UD`.
#[must_use]
pub fn ud() -> Trap {
    Trap::Exception(Exception::plain(crate::arch::exception::vector::UD))
}

/// A VM exit.
#[must_use]
pub fn vm_exit(exit: Exit) -> Trap {
    Trap::Exit(Box::new(exit))
}
