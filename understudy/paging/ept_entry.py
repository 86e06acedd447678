"""The entries of the EPT: what the p2m asks of one, of 512 at once, and what is wrong with one.

Source: SDM 3C, "EPT Translation Mechanism" and "EPT Misconfigurations".
"""

from typing import Final

from understudy.arch.address import FRAME, PHYSICAL
from understudy.arch.paging_entry import EptPage
from understudy.arch.paging_formats import LARGE, READ_WRITE_EXECUTE
from understudy.machine.words import (
    BYTES,
    ONES,
    PRESENT,
    PROTECTED,
    Words,
    nonzero,
    number_of,
    where,
)

WRITE_BACK: Final = 6
MEMORY_TYPES: Final = (0, 1, 4, 5, 6)  # uncacheable, combining, through, protected, back
RWX: Final = READ_WRITE_EXECUTE
RX: Final = int(EptPage(X=1, R=1))
AD: Final = int(EptPage(A=1, D=1))
PLACE: Final = FRAME | LARGE
_TYPE: Final = int(EptPage(MEMTYPE=WRITE_BACK))
_READABLE: Final = RX | _TYPE
_ADDRESSES: Final = FRAME * ONES


def is_table(entry: int, level: int) -> bool:
    """Whether the entry names a table of the next level."""
    return bool(entry & RWX) and level > 1 and not entry & LARGE


def allows_less(old: int, new: int) -> bool:
    """Whether a processor that keeps `old` could do what `new` refuses, or reach elsewhere."""
    return bool(old & RWX) and bool((old ^ new) & PLACE or old & ~new & RWX)


def leaf(word: int, level: int) -> int | None:
    """The entry that maps a row of frames as one page; None if they are not aligned to one."""
    if not word & PRESENT:
        return 0
    if level == 1:
        return word & FRAME | _TYPE | (RX if word & PROTECTED else RWX)
    if word >> 12 & (1 << 9 * (level - 1)) - 1:
        return None
    return word & FRAME | _TYPE | LARGE | (RX if word & PROTECTED else RWX)


def leaves(words: Words) -> int:
    """The 512 entries of a table of the last level, as one integer (see `words`)."""
    number = number_of(words)
    present = number & ONES  # the flag PRESENT is bit 0
    writable = present & ~where(number, PROTECTED)
    addresses = number & _ADDRESSES & (present << 64) - present
    return addresses | present * _READABLE | writable << 1


def with_accessed(entries: int, flags: int) -> bytes:
    """512 entries as a table; those that are present get these accessed and dirty flags."""
    if flags:
        entries |= where(entries, RWX) * flags
    return entries.to_bytes(BYTES, "little")


def update(old: int, new: int) -> tuple[int, bool]:
    """512 entries instead of others.

    What to write (the flags of what stays in place are kept), and whether any allows less.
    """
    moved = nonzero((old ^ new) & _ADDRESSES)
    is_less = bool(old & ~new & RWX * ONES) or bool(moved & where(old, RWX))
    kept = old & (ONES & ~moved) * AD
    return new | kept & where(new, RWX) * AD, is_less


def misconfigurations(entry: int, level: int) -> list[str]:
    """What in an entry the processor calls a misconfiguration, in words; empty if nothing."""
    fields = EptPage(entry)
    if not entry & RWX:
        return []
    found = []
    if fields.W and not fields.R:
        found.append("W is 1 and R is 0")
    if is_table(entry, level):
        if entry & 0x78:
            found.append("bits 6:3 of an entry that names a table are reserved")
    elif fields.MEMTYPE not in MEMORY_TYPES:
        found.append(f"MEMTYPE {fields.MEMTYPE} is reserved")
    if level == 4 and entry & LARGE:
        found.append("bit 7 of a PML4 entry is reserved")
    if not is_table(entry, level) and (entry & FRAME) >> 12 & (1 << 9 * (level - 1)) - 1:
        found.append("address bits inside the page are reserved")
    if entry & ~PHYSICAL & (1 << 52) - 1:
        found.append("address bits above MAXPHYADDR are reserved")
    return found


def described(entry: int, level: int) -> str:
    """An entry with its fields, for people."""
    fields = EptPage(entry)
    what = "a table" if is_table(entry, level) else f"a page of {4 << 9 * (level - 1)} KBytes"
    return (
        f"{entry:#x} ({what} at hpa {entry & FRAME:#x}: R={int(fields.R)} W={int(fields.W)} "
        f"X={int(fields.X)} MEMTYPE={fields.MEMTYPE} PS={int(fields.PS)} A={int(fields.A)} "
        f"D={int(fields.D)})"
    )
