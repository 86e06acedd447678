"""The first mebibyte of a PC: where base memory ends, and what lies above it.

What: the guest-physical addresses that the memory map, the firmware tables and the loaders share.
Source: the IBM PC AT's technical reference; ACPI Specification, "System Address Map Interfaces".
Invariants: `EXTENDED_BIOS_DATA` <= the start of `LEGACY_HOLE`; both are whole kibibytes.
"""

from typing import Final

LEGACY_HOLE: Final = (0xA_0000, 0x10_0000)  # video memory and option ROMs: no RAM for a guest
EXTENDED_BIOS_DATA: Final = 0x9_FC00  # up to the hole; where base memory ends for a guest
