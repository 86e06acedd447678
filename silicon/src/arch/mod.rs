//! The manual as types: names and bit positions, no behaviour.

pub mod bits;
pub mod exception;
pub mod exit;
pub mod msr;
pub mod segment;
pub mod vmcs;
