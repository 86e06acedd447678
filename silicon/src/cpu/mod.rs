//! The processor: its state, the plain interpreter of its instructions, and event delivery.
//!
//! Reading order: [`state`] (what a processor is), [`trap`] (why an instruction did not
//! complete), [`step`] (one instruction), then one file per group of instructions, and
//! [`event`] (interrupts and exceptions through the IDT).

pub mod arith;
pub mod bits;
pub mod control;
pub mod cr;
pub mod decode;
pub mod event;
#[cfg(test)]
mod event_tests;
pub mod far;
#[cfg(test)]
mod far_tests;
pub mod flags;
pub mod frame;
mod gate;
mod iret;
pub mod logic;
pub mod mov;
pub mod operand;
pub mod segment;
pub mod shift;
pub mod stack;
pub mod state;
pub mod step;
#[cfg(test)]
mod step_tests;
pub mod string;
pub mod system;
pub mod task;
#[cfg(test)]
mod testbed;
pub mod trap;
pub mod vector;
