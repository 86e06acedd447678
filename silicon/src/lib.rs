//! The machine under understudy: every *fact* of the hardware, and no decision.
//!
//! "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual; volumes and
//! section titles are cited, numbers move between editions.

pub mod addr;
pub mod apic;
pub mod arch;
pub mod bus;
pub mod code;
#[cfg(test)]
mod code_tests;
pub mod cpu;
pub mod dbt;
pub mod engine;
pub mod features;
pub mod mem;
pub mod mmu;
pub mod processor;
#[cfg(feature = "python")]
mod py;
pub mod snapshot;
pub mod vmx;
