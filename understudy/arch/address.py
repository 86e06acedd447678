"""Addresses: how wide a physical one is on this machine, how long a page: said nowhere else in
Python.

Source: SDM 3A, "Paging", where it is called MAXPHYADDR; CPUID leaf 80000008H shows it.
Invariant: it is the machine's (`silicon/src/addr.rs`); a test compares them.
"""

from typing import Final

MAXPHYADDR: Final = 46
PHYSICAL: Final = (1 << MAXPHYADDR) - 1  # the bits of a physical address
FRAME: Final = PHYSICAL & ~0xFFF  # of those, the bits that name a frame
TOP: Final = MAXPHYADDR - 1  # the highest bit, where a field that holds an address ends
PAGE_SHIFT: Final = 12
PAGE: Final = 1 << PAGE_SHIFT  # bytes of the smallest page, and of a frame


def is_canonical(gva: int, bits: int = 48) -> bool:
    """Whether the bits of a linear address from `bits` - 1 up are all alike."""
    above = gva >> bits - 1
    return above in (0, (1 << 65 - bits) - 1)
