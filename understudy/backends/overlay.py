"""An overlay: what is written stays beside the disk below it, which is never changed.

Source: ours; copy-on-write by clusters, as in every image format that has backing files.
Invariants: what was written is found again, all else is read from below; the room taken is that of
the clusters written, in a temporary file that nobody else can open.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import zstandard

from understudy.backends.medium import Medium, check_range, write_zeros
from understudy.state import U64, restore

CLUSTER: Final = 4096
LONGEST: Final = 256  # clusters that a snapshot keeps in one piece


class Overlay:
    """A disk over another, which it owns."""

    is_read_only = False

    def __init__(self, below: Medium) -> None:
        self.below, self.size = below, below.size
        self.fd, path = tempfile.mkstemp(prefix="understudy-overlay-")
        Path(path).unlink()
        self._release = weakref.finalize(self, os.close, self.fd)
        self.written: set[int] = set()  # clusters

    def read(self, offset: int, length: int) -> bytes:
        """From here what was written, from below the rest."""
        check_range(self, offset, length)
        parts = []
        for start, count, is_here in self._runs(offset, length):
            parts.append(self._own(start, count) if is_here else self.below.read(start, count))
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Kept here; clusters that are written in part are copied first."""
        check_range(self, offset, len(data))
        if not data:
            return
        end = offset + len(data)
        first, last = offset // CLUSTER, (end - 1) // CLUSTER
        for cluster in {first, last} - self.written:
            start = cluster * CLUSTER
            stop = min(start + CLUSTER, self.size)
            if start < offset or end < stop:
                self._put(start, self.below.read(start, stop - start))
        self._put(offset, data)
        self.written.update(range(first, last + 1))

    def flush(self) -> None:
        """Nothing of it is to outlive the VM."""

    def discard(self, offset: int, length: int) -> None:
        """What is there may stay."""
        check_range(self, offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Zeros, written."""
        check_range(self, offset, length)
        write_zeros(self, offset, length)

    def save(self) -> dict[str, Any]:
        """What was written: offset, bytes, and these bytes packed."""
        pack = zstandard.ZstdCompressor(level=1).compress
        pieces = []
        for start, count in self._pieces():
            pieces.append([start, count, pack(self._own(start, count)).hex()])
        return {"below": self.below.save(), "written": pieces}

    def load(self, saved: Any) -> None:
        """Have that written, and nothing else."""
        if not isinstance(saved, dict) or saved.keys() != {"below", "written"}:
            raise ValueError("snapshot: a disk's overlay has been saved as something else")
        self.below.load(saved["below"])
        pieces = restore(list[tuple[U64, U64, bytes]], saved["written"], "overlay.written")
        os.ftruncate(self.fd, 0)
        self.written.clear()
        unpack = zstandard.ZstdDecompressor()
        for start, count, packed in pieces:
            if start % CLUSTER or not 0 < count <= LONGEST * CLUSTER:
                raise ValueError(f"snapshot: an overlay has {count} bytes at {start}")
            try:
                data = unpack.decompress(packed, max_output_size=count)
            except zstandard.ZstdError as error:
                raise ValueError(f"snapshot: an overlay is damaged: {error}") from None
            if len(data) != count or (count % CLUSTER and start + count != self.size):
                raise ValueError(f"snapshot: an overlay has {len(data)} bytes at {start}")
            self.write(start, data)

    def close(self) -> None:
        """Forget what was written."""
        self._release()
        self.below.close()

    # --- clusters ---

    def _own(self, start: int, count: int) -> bytes:
        data = os.pread(self.fd, count, start)
        return data + bytes(count - len(data))

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range in pieces that lie here, or below: (offset, bytes, whether here)."""
        end = offset + length
        while offset < end:
            cluster = offset // CLUSTER
            is_here = cluster in self.written
            start = offset
            while offset < end and (cluster in self.written) == is_here:
                cluster += 1
                offset = min(cluster * CLUSTER, end)
            yield start, offset - start, is_here

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """All that was written, in pieces: (offset, bytes)."""
        start = end = -1
        for cluster in sorted(self.written):
            if cluster != end or end - start >= LONGEST:
                if end > start:
                    yield self._piece(start, end)
                start = cluster
            end = cluster + 1
        if end > start:
            yield self._piece(start, end)

    def _piece(self, start: int, end: int) -> tuple[int, int]:
        return start * CLUSTER, min(end * CLUSTER, self.size) - start * CLUSTER
