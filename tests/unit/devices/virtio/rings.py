"""The driver's side of a virtqueue, of each kind: what it writes for the device, and reads again.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues" and "Packed Virtqueues".
"""

import struct
from typing import Protocol

NEXT = 1
AVAIL, USED = 1 << 7, 1 << 15
DRIVER_AREA, DEVICE_AREA = 0x400, 0x800  # from the descriptor area on


class Memory(Protocol):
    """RAM."""

    def read(self, gpa: int, length: int, /) -> bytes: ...

    def write(self, gpa: int, data: bytes, /) -> None: ...


class SplitRing:
    """A split ring at `at`."""

    def __init__(self, memory: Memory, at: int, size: int) -> None:
        self.memory, self.at, self.size = memory, at, size
        self.available = self.used = 0

    def describe(self, index: int, gpa: int, length: int, flags: int, following: int) -> None:
        row = struct.pack("<QIHH", gpa, length, flags, following)
        self.memory.write(self.at + 16 * index, row)

    def offer(self, head: int) -> None:
        ring = self.at + DRIVER_AREA
        at = ring + 4 + 2 * (self.available % self.size)
        self.memory.write(at, head.to_bytes(2, "little"))
        self.available = self.available + 1 & 0xFFFF
        self.memory.write(ring + 2, self.available.to_bytes(2, "little"))

    def finished(self) -> list[tuple[int, int]]:
        ring = self.at + DEVICE_AREA
        index = int.from_bytes(self.memory.read(ring + 2, 2), "little")
        found = []
        while self.used != index:
            at = ring + 4 + 8 * (self.used % self.size)
            found.append(struct.unpack("<II", self.memory.read(at, 8)))
            self.used = self.used + 1 & 0xFFFF
        return found


class PackedRing:
    """A packed ring at `at`.  Chains are described by index, as for a split one; it names a chain
    by its head's."""

    def __init__(self, memory: Memory, at: int, size: int) -> None:
        self.memory, self.at, self.size = memory, at, size
        self.available = self.used = 0  # entries, the laps counted
        self.rows: dict[int, tuple[int, int, int, int]] = {}
        self.taken: dict[int, int] = {}  # entries that a buffer takes, by its head

    def describe(self, index: int, gpa: int, length: int, flags: int, following: int) -> None:
        self.rows[index] = gpa, length, flags, following

    def offer(self, head: int) -> None:
        chain = [self.rows.get(head, (0, 0, 0, 0))]
        while chain[-1][2] & NEXT and len(chain) < self.size:
            chain.append(self.rows.get(chain[-1][3], (0, 0, 0, 0)))
        for n in reversed(range(len(chain))):  # the first is what makes it available
            gpa, length, flags, _ = chain[n]
            lap, place = divmod(self.available + n, self.size)
            flags = flags & ~(AVAIL | USED) | (USED if lap % 2 else AVAIL)
            self.write(place, gpa, length, head, flags)
        self.taken[head] = len(chain)
        self.available += len(chain)

    def write(self, place: int, gpa: int, length: int, name: int, flags: int) -> None:
        """A descriptor of the ring, as it is."""
        row = struct.pack("<QIHH", gpa, length, name, flags)
        self.memory.write(self.at + 16 * place, row)

    def finished(self) -> list[tuple[int, int]]:
        found = []
        while True:
            lap, place = divmod(self.used, self.size)
            row = self.memory.read(self.at + 16 * place + 8, 8)
            written, name, flags = struct.unpack("<IHH", row)
            wanted = 0 if lap % 2 else AVAIL | USED
            if flags & (AVAIL | USED) != wanted or self.used == self.available:
                return found
            found.append((name, written))
            self.used += self.taken[name]


Ring = SplitRing | PackedRing
