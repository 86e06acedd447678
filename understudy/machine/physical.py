"""Physical memory as a device reaches it: direct memory access.

Source: PCI Local Bus Specification 3.0, "Bus Commands": a bus master names a physical address and
moves bytes; it sees no registers of a processor and no page tables.

A board hands each requester its own `PhysicalMemory`, so an IOMMU can stand between the two.

Invariant: an access that cannot be done raises IndexError (`DmaError`, or the memory's own kind)
and has changed nothing before the first byte that is not there.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Final, Protocol

BYTES: Final = itemgetter(1)  # of a run


class PhysicalMemory(Protocol):
    """Memory by physical address.  IndexError where there is none."""

    def read(self, gpa: int, length: int, /) -> bytes: ...
    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None: ...

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it has to be fetched before it can be accessed."""
        return False

    def make_room(self, length: int) -> None:
        """So many bytes are about to be accessed; see `GuestMemory.make_room`."""
        return

    def expect(self, runs: Sequence[tuple[int, int]], most: int, /, *, write: bool) -> None:
        """These runs are going to be read, or written; see `GuestMemory.expect`."""
        return

    def gather(self, runs: Sequence[tuple[int, int]], /) -> bytes:
        """What stands in several runs (gpa, bytes), one after the other."""
        return b"".join([self.read(gpa, size) for gpa, size in runs])

    def scatter(
        self, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview, /
    ) -> int:
        """Write to several runs, until data or runs end; how many bytes that were."""
        at, count = 0, len(data)
        for gpa, size in runs:
            if at >= count:
                break
            part = data[at : at + size] if at or size < count else data
            self.write(gpa, part)
            at += len(part)
        return at


class DmaError(IndexError):
    """The requester may not, or cannot, reach this address."""


class NoMemory(PhysicalMemory):
    """What a device reaches that has no path to memory."""

    def read(self, gpa: int, length: int, /) -> bytes:
        """Always refused."""
        raise DmaError(f"gpa {gpa:#x} ({length} bytes): this requester has no path to memory")

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        """Always refused."""
        raise DmaError(f"gpa {gpa:#x} ({len(data)} bytes): this requester has no path to memory")
