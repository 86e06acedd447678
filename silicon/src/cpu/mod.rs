//! The processor: its state, the plain interpreter of its instructions, and event delivery.
//!
//! Reading order: [`state`] (what a processor is), [`trap`] (why an instruction did not
//! complete), [`step`] (one instruction), then one file per group of instructions, and
//! [`event`] (interrupts and exceptions through the IDT).

pub mod arith;
pub mod avx;
#[cfg(test)]
mod avx_tests;
pub mod bits;
pub mod control;
pub mod countdown;
pub mod cr;
pub mod debug;
pub mod decode;
mod descriptors;
pub mod event;
#[cfg(test)]
mod event_tests;
pub mod far;
#[cfg(test)]
mod far_tests;
mod flag_control;
pub mod flags;
pub mod frame;
pub mod fxstate;
mod gate;
#[cfg(test)]
mod hostile_tests;
mod io;
mod iret;
mod keys;
pub mod logic;
pub mod mov;
pub mod msr;
pub mod operand;
pub mod pmu;
pub mod pointers;
pub mod random;
pub mod ring0;
pub mod segment;
pub mod shift;
pub mod stack;
pub mod state;
pub mod step;
#[cfg(test)]
mod step_tests;
pub mod string;
pub(crate) mod syscall;
pub mod system;
#[cfg(test)]
mod system_tests;
#[cfg(test)]
mod table_tests;
pub mod task;
#[cfg(test)]
pub(crate) mod testbed;
pub mod trap;
pub mod undefined;
pub mod upper;
pub mod vector;
#[cfg(test)]
mod vector_tests;
pub mod xsave;
#[cfg(test)]
mod xsave_tests;
