"""An image as bytes, and back: a snapshot's file.

Layout: a magic number; the length of the header and its hash; the header, compressed JSON; then the
pieces of guest memory one after the other, as they are.  The header has the state, by part, and of
each piece its gpa, its length and its hash.

A snapshot is a hostile file: every number is typed and bounded, and everything is compared with its
hash, before anything is made of it.

Source: ours; the hash is xxHash's XXH3 (against damage; it is no signature).
Invariant: bytes that are no snapshot raise SnapshotError and nothing else.
"""

import json
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import xxhash
import zstandard

from understudy import plain_file
from understudy.arch.address import PAGE

MAGIC: Final = b"understudy 4\n\0\0\0"
HEAD: Final = struct.Struct("<QQQ")  # bytes of the header, compressed and not; its hash
LONGEST_HEADER: Final = 1 << 28
MOST_PIECES: Final = 1 << 22
MASK64: Final = (1 << 64) - 1


class SnapshotError(ValueError):
    """Not a snapshot, or one that does not fit here."""


def pack(state: dict[str, Any], pieces: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """The parts of the file, in order, as buffers.  SnapshotError if nobody could read them."""
    kept = list(pieces)
    index = [[gpa, len(data), xxhash.xxh3_64_intdigest(data)] for gpa, data in kept]
    header = json.dumps({"state": state, "pieces": index}).encode()
    if len(header) > LONGEST_HEADER:
        raise SnapshotError(
            f"a snapshot with {len(header) >> 20} MiB of state, expected {LONGEST_HEADER >> 20} at "
            "most: was much written to a disk's overlay?"
        )
    packed = zstandard.ZstdCompressor(level=1).compress(header)
    yield MAGIC + HEAD.pack(len(packed), len(header), xxhash.xxh3_64_intdigest(packed))
    yield packed
    for _, data in kept:
        yield data


def unpack(data: memoryview) -> tuple[dict[str, Any], list[tuple[int, memoryview]]]:
    """The state and the pieces.  SnapshotError says what is wrong."""
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise SnapshotError(f"not a snapshot: expected it to begin with {MAGIC!r}")
    at = len(MAGIC) + HEAD.size
    if len(data) < at:
        raise SnapshotError("the snapshot is cut off before its header")
    packed, length, digest = HEAD.unpack(data[len(MAGIC) : at])
    if max(packed, length) > LONGEST_HEADER or at + packed > len(data):
        raise SnapshotError("the snapshot is cut off in its header")
    header = _header(data[at : at + packed], length, digest)
    return header["state"], list(_pieces(header["pieces"], data[at + packed :]))


def _header(packed: memoryview, length: int, digest: int) -> dict[str, Any]:
    if xxhash.xxh3_64_intdigest(packed) != digest:
        raise SnapshotError("the snapshot is damaged: its header is not what was written")
    try:
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=length)
        header = json.loads(raw)
    except (zstandard.ZstdError, ValueError, RecursionError, MemoryError) as problem:
        raise SnapshotError(f"the snapshot's header cannot be read: {problem}") from None
    if not isinstance(header, dict) or set(header) != {"state", "pieces"}:
        raise SnapshotError("the snapshot's header lacks its state or its pieces")
    state, pieces = header["state"], header["pieces"]
    if not isinstance(state, dict) or not isinstance(pieces, list) or len(pieces) > MOST_PIECES:
        raise SnapshotError("the snapshot's header has no state, or no list of pieces")
    return header


def _pieces(index: list[Any], data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    for row in index:
        if not isinstance(row, list) or [type(n) for n in row] != [int, int, int]:
            raise SnapshotError(f"the snapshot's index has {row!r:.60}, expected three numbers")
        gpa, length, digest = row
        if (
            gpa % PAGE
            or length % PAGE
            or not 0 < length <= len(data) - at
            or not 0 <= gpa <= MASK64
        ):
            raise SnapshotError(f"the snapshot is cut off, or has no piece of {length} at {gpa:#x}")
        piece = data[at : at + length]
        if xxhash.xxh3_64_intdigest(piece) != digest:
            raise SnapshotError(f"the snapshot is damaged: the memory at {gpa:#x} has changed")
        yield gpa, piece
        at += length
    if at != len(data):
        raise SnapshotError(f"the snapshot is followed by {len(data) - at} bytes more")


def mapped(path: Path) -> memoryview:
    """A file's bytes, read when they are needed; unmapped when nobody has a piece any more."""
    with plain_file.opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def write(path: Path, parts: Iterable[Any]) -> int:
    """Write a file that is there whole or not at all, and that others cannot read; its bytes."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            length = sum(file.write(part) for part in parts)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return length
