"""Where the translation cache lies in the guest's linear addresses, and what is where in it.

One window of 12 MBytes: the hypervisor's data, the table of indirect targets in two
halves, and translated code.  Code and table may only be read, and executed, by the guest's kernel;
its programs reach nothing of it.

The table is looked up by the low 16 bits of a target.  The first half has what makes the target
zero if it is added, the second half where its translation is.  So no flags are needed to compare.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86
Virtualization"; docs/decisions/0079-where-translations-lie.md.
"""

from typing import Final, NamedTuple

PAGE_TABLES: Final = 6
WINDOW: Final = PAGE_TABLES << 21
"""Bytes of linear addresses."""
TAGS: Final = 0x8_0000
TARGETS: Final = 0x10_0000
CODE: Final = 0x18_0000
CODE_BYTES: Final = WINDOW - CODE
ENTRIES: Final = 1 << 16
LARGEST: Final = 2048
"""Bytes that the translation of a unit has at most."""
# In the page of data:
FIRST, SECOND, TARGET, EXTRA = 0x00, 0x08, 0x10, 0x18
"""Two registers, saved; where an indirect branch goes; less than zero by what has been executed
beyond the guest's instructions since it went on (of 64 bits, whatever the code's size)."""
IOPL, CS, SS = 0x20, 0x28, 0x30
"""What RFLAGS.IOPL adds to flags; selectors as the guest has them."""
STACK, OWN_FLAGS, NEW_FLAGS, NEW_IF = 0x38, 0x40, 0x48, 0x50
"""RSP and RFLAGS, saved; RFLAGS that POPF or IRET loads, and `IF` by those."""
NOTHING: Final = 0x58
"""Zero, always."""
MINUS_CS, CS_AT, MINUS_CODE = 0x60, 0x68, 0x70
MINUS_SS, SS_AT, MINUS_STACK = 0x78, 0x80, 0x88
"""For IRET: minus the selector; where its descriptor is; minus that."""
IF: Final = 0x1000
"""What the guest's RFLAGS.IF adds to flags in which it is set: zero, or `OFF`."""
OPENING: Final = 0x2000
"""The same word once more, in a page that is read-only while an interrupt waits: to be written by
what sets IF.  `OFF` times eight lies between."""
OFF: Final = -0x200


class Layout(NamedTuple):
    """A window, and for code of which size."""

    base: int
    bits: int  # 32 or 64

    @property
    def word(self) -> int:
        """Bytes of a register."""
        return self.bits // 8

    @property
    def mask(self) -> int:
        """All bits of an address."""
        return (1 << self.bits) - 1

    def has(self, pc: int) -> bool:
        """Whether translated code can be there."""
        return self.base != 0 and self.base + CODE <= pc < self.base + WINDOW
