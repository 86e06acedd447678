"""What a disk device reads and writes: bytes by offset.

Source: ours.
Invariants: an access lies inside `size`, or is refused with ValueError; an OSError means that it
was not, or not wholly, done; after `flush` all that was written before outlives the computer's
power.
"""

import errno
from typing import Any, Protocol

ZEROS = bytes(1 << 20)


class Medium(Protocol):
    """A disk's content."""

    size: int  # bytes
    is_read_only: bool

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes | memoryview) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None:
        """What is there is of no use any more; reading it gives what was there, or zeros."""

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Write zeros; `may_unmap`: the room for them may be given back."""

    def save(self) -> dict[str, Any]:
        """What a snapshot must keep, as plain values."""

    def load(self, saved: Any) -> None:
        """Become what was saved, or find out that it is the same still; else ValueError."""

    def close(self) -> None: ...


class Zeros:
    """A disk that nobody has written, and nobody can."""

    is_read_only = True

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Zeros."""
        check_range(self, offset, length)
        return bytes(length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Refused."""
        raise read_only()

    def flush(self) -> None:
        """There is nothing to do."""

    def discard(self, offset: int, length: int) -> None:
        """Refused."""
        raise read_only()

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Refused."""
        raise read_only()

    def save(self) -> dict[str, Any]:
        """Its size says all."""
        return {"size": self.size}

    def load(self, saved: Any) -> None:
        """Only what is the same."""
        if saved != self.save():
            raise ValueError(f"snapshot: a disk of {self.size} bytes was another one then")

    def close(self) -> None:
        """There is nothing to give back."""


def check_range(medium: Medium, offset: int, length: int) -> None:
    """ValueError if it is not inside."""
    if not 0 <= offset <= offset + length <= medium.size:
        raise ValueError(f"{length} bytes at {offset} of a disk of {medium.size}")


def read_only() -> OSError:
    """What a write to a disk that cannot be written raises."""
    return OSError(errno.EROFS, "the disk is read-only")


def write_zeros(medium: Medium, offset: int, length: int) -> None:
    """Zeros, piece by piece."""
    while length:
        part = min(length, len(ZEROS))
        medium.write(offset, memoryview(ZEROS)[:part])
        offset, length = offset + part, length - part
