//! The processor: its state, the plain interpreter of its instructions, and event delivery.
//!
//! Reading order: [`state`] (what a processor is), [`trap`] (why an instruction did not
//! complete), [`step`] (one instruction), then one file per group of instructions, and
//! [`event`] (interrupts and exceptions through the IDT).

pub mod cr;
pub mod event;
#[cfg(test)]
mod event_tests;
pub mod frame;
mod gate;
pub mod segment;
pub mod state;
pub mod step;
pub mod task;
#[cfg(test)]
mod testbed;
pub mod trap;
