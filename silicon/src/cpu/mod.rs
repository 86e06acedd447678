//! The processor: its state, the plain interpreter of its instructions, and event delivery.
//!
//! Reading order: [`state`] (what a processor is), [`trap`] (why an instruction did not
//! complete), [`step`] (one instruction), then one file per group of instructions, and
//! [`event`] (interrupts and exceptions through the IDT).

pub mod event;
pub mod state;
pub mod step;
pub mod trap;
