"""Tables of the hypervisor's own in the guest's terms: what a snapshot keeps of them.

An entry that maps a page names a host frame, which another host will not have: kept is the guest
frame behind it.  An entry that names a table is kept by what the table stands for, which the
technique knows.

Source: ours.  Invariants: what is kept names no host frame; what is made from it names frames of
the guest's p2m only, whatever the text says, and allows writes only where the p2m does.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.machine.p2m import P2m
from understudy.paging.guest_walk import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    KEY,
    LARGE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
)

ENTRY: Final = struct.Struct("<HQ")
FLAGS: Final = PRESENT | WRITABLE | USER | ACCESSED | DIRTY | LARGE | NO_EXECUTE | KEY
BLOCK: Final = 512  # frames of a 2-MByte page

Entry = tuple[int, int]
"""Which entry of its table, and the entry."""


def packed(entries: Iterable[Entry], gfns: "Gfns") -> str:
    """Entries that map pages, as text."""
    out = b""
    for index, entry in entries:
        gfn = gfns.of(entry & ADDRESS)
        out += ENTRY.pack(index, entry & ~ADDRESS | gfn << PAGE_SHIFT)
    return out.hex()


def unpacked(text: str, p2m: P2m) -> Iterator[tuple[int, int, int]]:
    """(index, guest frame, flags) of each entry.  ValueError if one cannot be.

    An entry whose frame is not there any more is left out: the next access makes it again.
    """
    raw = bytes.fromhex(text)
    if len(raw) % ENTRY.size:
        raise ValueError(f"snapshot: entries of {len(raw)} bytes, expected {ENTRY.size} for each")
    for index, entry in ENTRY.iter_unpack(raw):
        flags, gfn = entry & ~ADDRESS, (entry & ADDRESS) >> PAGE_SHIFT
        if index >= BLOCK or flags & ~FLAGS or not flags & PRESENT:
            raise ValueError(f"snapshot: entry {entry:#x} at {index} is none of a table of ours")
        if p2m.lookup(gfn) is None:
            continue
        if p2m.is_protected(gfn):
            flags &= ~WRITABLE
        yield index, gfn, flags


class Gfns:
    """Which guest frame lies in which host frame: a p2m, the other way round."""

    def __init__(self, p2m: P2m) -> None:
        self._extents = sorted((extent.pfn, extent.frames, extent.gfn) for extent in p2m)
        self._last = (0, 0, 0)

    def of(self, hpa: int) -> int:
        """The guest frame at this hpa, which is the guest's."""
        pfn = hpa >> PAGE_SHIFT
        first, frames, gfn = self._last
        if not first <= pfn < first + frames:
            self._last = first, frames, gfn = next(
                e for e in self._extents if e[0] <= pfn < e[0] + e[1]
            )
        return gfn + pfn - first
