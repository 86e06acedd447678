"""A VM at one moment, as a value: its configuration, the state of its parts, its memory.

    image = vm.snapshot()
    again = image.restore()

Layout as bytes: a magic number, the length of a JSON header, the header, then pieces of guest
memory (gpa, length, contents).  Everything is named as the guest names it: memory by gpa, tables
of the paging technique by gfn.  What the hypervisor derives (EPT, shadow tables, VMCS) is made
anew, so an image fits any host with room, and says nothing about any host's memory.

Invariants: a VM restored and gone on with gives the same console bytes, instructions and exits
as one that was never saved; bytes that are no image raise SnapshotError and nothing else.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from understudy.machine.frames import PAGE, PAGE_SHIFT
from understudy.machine.memory import GuestMemory

MAGIC: Final = b"understudy 2\n"
LENGTH: Final = struct.Struct("<QQ")
CHUNK: Final = 1 << 20
LONGEST_HEADER: Final = 1 << 30


class SnapshotError(ValueError):
    """Not a snapshot, or one that does not fit here."""


Piece = tuple[int, bytes]
"""Bytes of guest memory from a gpa on."""


@dataclass(frozen=True)
class Image:
    """What `VM.snapshot` gives."""

    state: dict[str, Any]  # plain values, by part
    pieces: tuple[Piece, ...]

    def to_bytes(self) -> bytes:
        """As bytes, for a file."""
        header = json.dumps(self.state).encode()
        compressor = zstandard.ZstdCompressor(level=1).compressobj()
        parts = [MAGIC, compressor.compress(LENGTH.pack(len(header), 0) + header)]
        for gpa, data in self.pieces:
            parts.append(compressor.compress(LENGTH.pack(gpa, len(data))))
            parts.append(compressor.compress(data))
        parts.append(compressor.flush())
        return b"".join(parts)

    @classmethod
    def of_bytes(cls, data: bytes) -> "Image":
        """What `to_bytes` made; SnapshotError for anything else."""
        stream = _Stream(data)
        return cls(stream.header(), tuple(stream.pieces()))


def touched(memory: GuestMemory) -> Iterator[Piece]:
    """The pieces of a VM's memory that are not holes."""
    host = memory.host.memory
    fd = os.dup(host.fd)
    try:
        for extent in memory.p2m:
            at, end = extent.pfn << PAGE_SHIFT, (extent.pfn + extent.frames) << PAGE_SHIFT
            ahead = (extent.gfn - extent.pfn) << PAGE_SHIFT
            while at < end:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:  # nothing but holes up to the end of the memory
                    break
                stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
                for piece in range(start, stop, CHUNK):
                    yield piece + ahead, host.read(piece, min(CHUNK, stop - piece))
                at = max(stop, start)
    finally:
        os.close(fd)


class _Stream:
    """Reads what `to_bytes` wrote; SnapshotError for anything else."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(MAGIC):
            raise SnapshotError(f"not a snapshot: expected it to begin with {MAGIC!r}")
        self._reader = zstandard.ZstdDecompressor().stream_reader(data[len(MAGIC) :])

    def _take(self, length: int) -> bytes:
        out = b""
        try:
            while len(out) < length and (part := self._reader.read(length - len(out))):
                out += part
        except zstandard.ZstdError as problem:
            raise SnapshotError(f"the snapshot is damaged: {problem}") from None
        return out

    def header(self) -> dict[str, Any]:
        raw = self._take(LENGTH.size)
        if len(raw) < LENGTH.size or LENGTH.unpack(raw)[0] > LONGEST_HEADER:
            raise SnapshotError("the snapshot is cut off before its header")
        try:
            header = json.loads(self._take(LENGTH.unpack(raw)[0]))
        except ValueError as problem:
            raise SnapshotError(f"the snapshot's header is no JSON: {problem}") from None
        if not isinstance(header, dict):
            raise SnapshotError("the snapshot's header is no object")
        return header

    def pieces(self) -> Iterator[Piece]:
        while raw := self._take(LENGTH.size):
            if len(raw) < LENGTH.size:
                raise SnapshotError("the snapshot is cut off between two pieces")
            gpa, length = LENGTH.unpack(raw)
            if gpa % PAGE or not 0 < length <= CHUNK:
                raise SnapshotError(f"the snapshot has a piece of {length} bytes at {gpa:#x}")
            piece = self._take(length)
            if len(piece) < length:
                raise SnapshotError("the snapshot is cut off in the middle of memory")
            yield gpa, piece
