//! The fast engine.

pub mod home;
pub mod native;

use std::io;

use crate::cpu::state::Core;
use crate::processor::Engine;

/// The engine for a processor.
///
/// # Errors
/// If the computer gives no executable memory.
pub fn engine(_core: &mut Core) -> io::Result<Box<dyn Engine>> {
    Ok(Box::new(crate::processor::Reference))
}
