//! Translated blocks, the places inside them where execution may leave, and how they are found.

use super::flags::Whereabouts;

/// What, beside its address, decides how code is translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Guest address of the first instruction.
    pub rip: u64,
    /// Its host-physical address.
    pub hpa: u64,
    /// [`super::mode_key`].
    pub mode: u32,
}

/// A translated block.
#[derive(Clone, Debug)]
pub struct Block {
    /// What it is a translation of.
    pub key: Key,
    /// The second page, if the last instruction reaches into it, or [`NO_PAGE`].
    pub second: u64,
    /// Host address for transfers.
    pub main: u64,
    /// Bytes from the host address for indirect transfers (checks the target first) to `main`.
    pub head: u8,
    /// Bytes from `main` to the piece that looks the block's address up again.
    pub tail: u32,
    /// Bytes of guest code in the first page.
    pub bytes: u16,
    /// Instructions.
    pub count: u8,
    /// One more than the number of what is needed to move it ([`super::moved`]), or 0.
    pub origin: u32,
    /// Its code was overwritten.
    pub is_dead: bool,
}

/// There is no second page.
pub const NO_PAGE: u64 = u64::MAX;

impl Block {
    /// Host address for indirect transfers.
    #[must_use]
    pub fn landing(&self) -> u64 {
        self.main - u64::from(self.head)
    }

    /// Host address of the piece that looks the block's address up again.
    #[must_use]
    pub fn again(&self) -> u64 {
        self.main + u64::from(self.tail)
    }

    /// The second page.
    #[must_use]
    pub fn second(&self) -> Option<u64> {
        (self.second != NO_PAGE).then_some(self.second)
    }

    /// Whether it was made of any of `len` bytes at `hpa`.
    #[must_use]
    pub fn overlaps(&self, hpa: u64, len: u64) -> bool {
        let meets = |from: u64, bytes: u64| from < hpa + len && hpa < from + bytes;
        meets(self.key.hpa, u64::from(self.bytes)) || self.second().is_some_and(|s| meets(s, 14))
    }
}

/// A place in generated code from which an instruction may have to be interpreted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Site {
    /// Where generated code goes on after the instruction.
    pub next: u64,
    /// Guest address of the instruction.
    pub rip: u64,
    /// Guest address of the following one.
    pub next_rip: u64,
    /// The block's number.
    pub block: u32,
    /// Instructions of the block that have not retired yet, this one included.
    pub remaining: u8,
    /// The x87/SSE state must be exchanged with the computer's registers.
    pub is_vector: bool,
    /// Where the flags are.
    pub flags: Whereabouts,
    /// A group's check failed: nothing is interpreted, the block goes on without groups.
    pub is_group: bool,
    /// The instruction reaches into the following page.
    pub is_crossing: bool,
    /// One more than the number of the prepared instruction, or 0.
    pub prepared: u32,
    /// One more than the number of the report of x87 instructions before it, or 0.
    pub x87: u32,
}

/// A direct transfer to another block.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Guest address of the target.
    pub target: u64,
    /// Host address of the jump's displacement.
    pub place: u64,
    /// The mode that the target must be for.
    pub mode: u32,
    /// The displacement before a link is made: the way out.
    pub out: i32,
    /// The target is in another page: the number of a code page is compared before the jump.
    pub is_far: bool,
    /// The region of the block that it is linked to.
    pub to: u8,
    /// The regions that have it on their list ([`super::Dbt::make_link`]), one bit each.
    pub noted: u8,
}

/// From the number of the code page that is compared to the displacement of the jump behind.
pub const PAGE_TO_PLACE: u64 = 11;

/// An indirect transfer, as far as it must be undone when its target is not canonical.
#[derive(Clone, Copy, Debug)]
pub struct Indirect {
    /// Guest address of the instruction.
    pub rip: u64,
    /// What it added to RSP.
    pub popped: i32,
    /// It is in the interrupt shadow of STI.
    pub is_shadowed: bool,
}
