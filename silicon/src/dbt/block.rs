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
    /// Bytes of guest code in the first page.
    pub bytes: u32,
    /// The second page, if the last instruction reaches into it.
    pub second: Option<u64>,
    /// Instructions.
    pub count: u8,
    /// Host address for transfers.
    pub main: u64,
    /// Host address for indirect transfers (checks the target first).
    pub landing: u64,
    /// Host address of the piece that looks the block's address up again.
    pub again: u64,
    /// Its code was overwritten.
    pub is_dead: bool,
}

impl Block {
    /// Whether it was made of any of `len` bytes at `hpa`.
    #[must_use]
    pub fn overlaps(&self, hpa: u64, len: u64) -> bool {
        let meets = |from: u64, bytes: u64| from < hpa + len && hpa < from + bytes;
        meets(self.key.hpa, u64::from(self.bytes)) || self.second.is_some_and(|s| meets(s, 14))
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
    /// The mode that the target must be for.
    pub mode: u32,
    /// Guest address of the target.
    pub target: u64,
    /// Host address of the jump's displacement.
    pub place: u64,
    /// Host address of the code-page number to compare, if the target is in another page.
    pub page_place: Option<u64>,
}

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
