"""Where the file systems of a disk may lie: all of it, or its partitions.

Source: UEFI Specification, "GUID Partition Table (GPT) Disk Layout" and "Legacy Master Boot Record
(MBR)"; extended partitions as every operating system makes them, each a chain of MBRs.
Invariants: a disk may be hostile: what is read has a bound, and what lies outside it is left out.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from understudy.backends.medium import Medium

SECTOR: Final = 512
MOST: Final = 128  # partitions
MBR_ENTRY: Final = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
MBR_AT, SIGNATURE_AT, SIGNATURE = 446, 510, b"\x55\xaa"
EXTENDED, PROTECTIVE = (0x05, 0x0F, 0x85), 0xEE
GPT_HEADER: Final = struct.Struct("<8s64xQII")  # signature, … first entry's sector, entries, bytes


class Extent(NamedTuple):
    """A piece of a disk."""

    start: int  # bytes
    length: int
    number: int  # of the partition, from 1 on; 0: the whole disk


def extents(disk: Medium) -> list[Extent]:
    """The whole disk, and then its partitions in their order."""
    whole = Extent(0, disk.size, 0)
    found = [
        Extent(first * SECTOR, count * SECTOR, number)
        for number, first, count in _partitions(disk)
        if count and (first + count) * SECTOR <= disk.size
    ]
    return [whole, *found[:MOST]]


def _partitions(disk: Medium) -> Iterator[tuple[int, int, int]]:
    """(number, first sector, sectors)."""
    entries = _mbr(disk, 0)
    if any(kind == PROTECTIVE for kind, _, _ in entries):
        yield from _gpt(disk)
        return
    for number, (kind, first, count) in enumerate(entries, 1):
        if kind in EXTENDED:
            yield from _logical(disk, first)
        elif kind:
            yield number, first, count


def _mbr(disk: Medium, sector: int) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries; none if there is no table."""
    if (sector + 1) * SECTOR > disk.size:
        return []
    data = disk.read(sector * SECTOR, SECTOR)
    if data[SIGNATURE_AT:] != SIGNATURE:
        return []
    rows = [MBR_ENTRY.unpack_from(data, MBR_AT + 16 * n) for n in range(4)]
    if any(status & 0x7F for status, _, _, _ in rows):
        return []  # the boot sector of a file system
    return [(kind, first, count) for _, kind, first, count in rows]


def _logical(disk: Medium, base: int) -> Iterator[tuple[int, int, int]]:
    """The partitions in an extended one."""
    at = base
    for number in range(5, 5 + MOST):
        entries = _mbr(disk, at)
        if not entries:
            return
        (kind, first, count), (next_kind, next_first, _) = entries[:2]
        if kind:
            yield number, at + first, count
        if next_kind not in EXTENDED:
            return
        at = base + next_first


def _gpt(disk: Medium) -> Iterator[tuple[int, int, int]]:
    if disk.size < 2 * SECTOR:
        return
    signature, table, count, size = GPT_HEADER.unpack_from(disk.read(SECTOR, SECTOR))
    if signature != b"EFI PART" or not 128 <= size <= SECTOR or size % 8:
        return
    for number in range(1, min(count, MOST) + 1):
        at = table * SECTOR + (number - 1) * size
        if at + 48 > disk.size:
            return
        entry = disk.read(at, 48)
        first, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]) and first <= last:
            yield number, first, last - first + 1
