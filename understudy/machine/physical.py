"""Physical memory as a device reaches it: direct memory access.

Source: PCI Local Bus Specification 3.0, "Bus Commands": a bus master names a physical address and
moves bytes; it sees no registers of a processor and no page tables.

A board hands each requester its own `PhysicalMemory`, so an IOMMU can stand between the two.

Invariant: an access that cannot be done raises IndexError (`DmaError`, or the memory's own kind)
and has changed nothing before the first byte that is not there.
"""

from typing import Protocol


class PhysicalMemory(Protocol):
    """Memory by physical address.  IndexError where there is none."""

    def read(self, gpa: int, length: int, /) -> bytes: ...
    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None: ...


class DmaError(IndexError):
    """The requester may not, or cannot, reach this address."""


class NoMemory:
    """What a device reaches that has no path to memory."""

    def read(self, gpa: int, length: int, /) -> bytes:
        """Always refused."""
        raise DmaError(f"gpa {gpa:#x} ({length} bytes): this requester has no path to memory")

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        """Always refused."""
        raise DmaError(f"gpa {gpa:#x} ({len(data)} bytes): this requester has no path to memory")
