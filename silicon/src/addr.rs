//! Addresses: which space a number belongs to.
//!
//! The processor's inner loops carry linear addresses as plain `u64`; where two spaces meet
//! (a walk, a VMCS, the bindings) the newtypes keep them apart.

/// A guest-physical address: what a guest believes is physical.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Gpa(pub u64);

/// A host-physical address: an offset into [`crate::mem::Memory`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Hpa(pub u64);

/// Bytes in a frame.
pub const FRAME_BYTES: u64 = 4096;
/// The bits of an address inside its 4-KByte page.
pub const PAGE_OFFSET: u64 = FRAME_BYTES - 1;
/// Physical addresses have this many bits (CPUID 80000008H).
pub const MAXPHYADDR: u32 = 46;
/// The bits a physical address may have.
pub const PHYS_MASK: u64 = (1 << MAXPHYADDR) - 1;
