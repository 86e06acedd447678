//! Addresses: which space a number belongs to.
//!
//! The processor's inner loops carry linear addresses as plain `u64`; where two spaces meet
//! (a walk, a VMCS, the bindings) the newtypes keep them apart.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

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

/// A multiplicative hash: the keys are addresses and not chosen by an adversary to any gain
/// beyond slowing their own guest.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u16(&mut self, v: u16) {
        self.write_u64(u64::from(v));
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// A map keyed by addresses.
pub type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;
