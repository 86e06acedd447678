"""Segment registers and table registers, as values.

Source: SDM 3A, "Segment Registers", "Memory-Management Registers".
"""

from enum import IntEnum
from typing import NamedTuple


class SegmentName(IntEnum):
    """Segment registers, in the order in which instructions number them; then LDTR and TR."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5
    LDTR = 6
    TR = 7


class Segment(NamedTuple):
    """A segment register.  `rights`: SDM 3C, table "Format of Access Rights"."""

    selector: int
    base: int
    limit: int
    rights: int


class TableRegister(NamedTuple):
    """GDTR or IDTR."""

    base: int
    limit: int
