//! Address translation: one walker, formats as data, a TLB.
//!
//! [`crate::cpu::state::Core::translate`] is the way of every access of guest software; [`walk`]
//! has the walk itself; [`access`] the reads and writes through it.

pub mod access;
pub mod caches;
pub mod format;
pub mod page_log;
pub mod special;
pub mod tlb;
pub mod translate;
pub mod walk;
pub mod window;
