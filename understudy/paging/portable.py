"""Tables of the hypervisor's own in the guest's terms: what a snapshot keeps of them.

An entry that maps a page names a host frame, which another host will not have: kept is the guest
frame that it stands for.  (Several may have one host frame: which it is, the reverse map knows.)
An entry that names a table is kept by what the table stands for, which the technique knows.

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
from understudy.paging.reverse_map import BLOCK, ReverseMap

ENTRY: Final = struct.Struct("<HQ")
FLAGS: Final = PRESENT | WRITABLE | USER | ACCESSED | DIRTY | LARGE | NO_EXECUTE | KEY

Entry = tuple[int, int]
"""Which entry of its table, and the entry."""


def packed(table: int, entries: Iterable[Entry], reverse: ReverseMap) -> str:
    """Entries of the table at this hpa that map pages, as text."""
    out = b""
    for index, entry in entries:
        gfn = reverse.mapped_at(table + 8 * index)
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
