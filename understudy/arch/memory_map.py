"""Where a PC has its RAM, and what the first mebibyte holds beside it.

What: the guest-physical addresses that memory, firmware tables and loaders share.
Source: the IBM PC AT's technical reference; ACPI Specification, "System Address Map Interfaces".
Invariants: `EXTENDED_BIOS_DATA` <= the start of `LEGACY_HOLE`; both are whole kibibytes.
"""

from typing import Final

LEGACY_HOLE: Final = (0xA_0000, 0x10_0000)  # video memory and option ROMs: no RAM for a guest
EXTENDED_BIOS_DATA: Final = 0x9_FC00  # up to the hole; where base memory ends for a guest
LOW_END: Final = 0xC000_0000  # RAM below the devices ends here
HIGH_START: Final = 0x1_0000_0000  # and goes on here


def usable(size: int) -> list[tuple[int, int]]:
    """Where a PC with so many bytes of RAM has what a guest may use, as (gpa, bytes)."""
    low = min(size, LOW_END)
    resume = LEGACY_HOLE[1]
    parts = [(0, min(low, EXTENDED_BIOS_DATA))]
    if low > resume:
        parts.append((resume, low - resume))
    if size > low:
        parts.append((HIGH_START, size - low))
    return parts
