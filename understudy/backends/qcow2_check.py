"""Whether the tables of a qcow2 image are sound, found out before it is written.

Source: QEMU's docs/interop/qcow2.txt.  A library that writes trusts them: one that says that a
cluster is free which is not loses data, and worse has happened.

Invariants: every table lies in the file and is aligned; every cluster that is in use is counted;
the work is that of reading the tables once, whose lengths have bounds.
"""

import os
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from understudy.backends.locked import ImageError

HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
ORDER_AT: Final = 96  # of refcount_order, in version 3; 4 before
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00  # in an entry of a table
PACKED: Final = 1 << 62  # a compressed cluster
LARGEST_TABLES: Final = 32 << 20  # bytes; QEMU's bounds for the L1 table, and for the counts'
CODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}  # of counts, by refcount_order


class _Image:
    """The file as its tables see it."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd, self.end = path, fd, os.lseek(fd, 0, os.SEEK_END)
        header = os.pread(fd, 104, 0).ljust(104, b"\0")
        (_, version, _, _, self.bits, self.size, _, self.l1_size, self.l1_at, self.counts_at,
         self.counts_clusters, _, _) = HEADER.unpack_from(header)  # fmt: skip
        self.order = struct.unpack_from(">I", header, ORDER_AT)[0] if version == 3 else 4
        self.cluster = 1 << self.bits

    def damaged(self, what: str) -> ImageError:
        """The refusal."""
        path = self.path
        return ImageError(f"{path} is damaged ({what}): `qemu-img check -r all {path}` may mend it")

    def table(self, at: int, length: int, what: str, code: str = "Q") -> "array[int]":
        """Numbers of a table."""
        if at % self.cluster or not 0 < at <= at + length <= self.end:
            raise self.damaged(f"{what} at {at:#x}")
        numbers = array(code, os.pread(self.fd, length, at))
        if sys.byteorder == "little":
            numbers.byteswap()
        return numbers

    def clusters(self, at: int, length: int) -> range:
        """The numbers of the clusters of a piece of the file."""
        return range(at >> self.bits, (at + length - 1 >> self.bits) + 1)


def check(path: Path, fd: int) -> None:
    """ImageError if the image is not sound.  Its header has been looked at before."""
    image = _Image(path, fd)
    if not 9 <= image.bits <= 21:
        raise image.damaged(f"clusters of 2^{image.bits} bytes")
    if image.order not in CODES:
        raise ImageError(
            f"{path} counts its clusters in 2^{image.order} bits, expected 8 to 64 bits: "
            "`qemu-img convert -O qcow2` makes an image that can be written"
        )
    covered = image.l1_size << 2 * image.bits - 3
    if 8 * image.l1_size > LARGEST_TABLES or covered < image.size:
        raise image.damaged(f"a first table of {image.l1_size} entries")
    if not 0 < image.counts_clusters << image.bits <= LARGEST_TABLES:
        raise image.damaged(f"a table of counts of {image.counts_clusters} clusters")
    counted = _counted(image)
    for cluster in _used(image):
        if cluster >= len(counted) or not counted[cluster]:
            raise image.damaged(f"cluster {cluster} is in use and not counted")


def _counted(image: _Image) -> bytearray:
    """For each cluster of the file, whether its count is not 0."""
    counted = bytearray((image.end >> image.bits) + 1)
    length = image.counts_clusters << image.bits
    each = image.cluster * 8 >> image.order  # counts in a block
    for number, block in enumerate(image.table(image.counts_at, length, "the table of counts")):
        if not block:
            continue
        counts = image.table(block, image.cluster, "a block of counts", CODES[image.order])
        first = number * each
        for n in range(min(each, len(counted) - first)):
            counted[first + n] = counts[n] != 0
    return counted


def _used(image: _Image) -> Iterator[int]:
    """The numbers of all clusters that are in use."""
    length = image.counts_clusters << image.bits
    yield 0
    yield from image.clusters(image.counts_at, length)
    for block in image.table(image.counts_at, length, "the table of counts"):
        if block:
            yield block >> image.bits
    if not image.l1_size:
        return
    yield from image.clusters(image.l1_at, 8 * image.l1_size)
    for entry in image.table(image.l1_at, 8 * image.l1_size, "the first table"):
        if at := entry & OFFSET:
            yield at >> image.bits
            yield from _data(image, image.table(at, image.cluster, "a second table"))


def _data(image: _Image, entries: Iterable[int]) -> Iterator[int]:
    for entry in entries:
        at = entry & OFFSET
        if at and not entry & PACKED:
            if at % image.cluster:
                raise image.damaged(f"a cluster at {at:#x}")
            yield at >> image.bits
