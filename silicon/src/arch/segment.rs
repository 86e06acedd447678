//! Segment registers as the processor holds them: the visible selector and the hidden part.

/// A segment register.  `attr` is in the VMX access-rights format
/// (SDM 3C, "Guest Register State"): type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15,
/// unusable 16.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// The linear address where the segment begins.
    pub base: u64,
    /// The last valid offset (already scaled by G).
    pub limit: u32,
    /// Access rights.
    pub attr: u32,
    /// The visible selector.
    pub selector: u16,
}

/// Access-rights bits.
pub mod attr {
    #![allow(missing_docs)]
    pub const TYPE: u32 = 0xF;
    pub const ACCESSED: u32 = 1;
    /// Data: writable.  Code: readable.
    pub const RW: u32 = 1 << 1;
    /// Data: expand-down.  Code: conforming.
    pub const EC: u32 = 1 << 2;
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

impl Segment {
    /// The descriptor's privilege level.
    #[must_use]
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// The selector's requested privilege level.
    #[must_use]
    pub fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
    /// Whether the register holds nothing that may be used.
    #[must_use]
    pub fn is_unusable(&self) -> bool {
        self.attr & attr::UNUSABLE != 0
    }
    /// Whether any of the given access-rights bits is set.
    #[must_use]
    pub fn has(&self, bits: u32) -> bool {
        self.attr & bits != 0
    }
}

/// Indices of the segment registers, in the instruction encoding's order.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRegister {
    /// Linear address.
    pub base: u64,
    /// Last valid byte.
    pub limit: u16,
}
