"""A virtio driver for the tests: memory, a PCI bus with one device, and the steps of a real driver.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Device Initialization".
"""

import copy
from typing import Any

from tests.unit.devices.virtio.rings import DEVICE_AREA, DRIVER_AREA, PackedRing, Ring, SplitRing
from understudy.clock import ManualClock
from understudy.devices.board import Board
from understudy.devices.message import Message
from understudy.devices.virtio.function import NOTIFY
from understudy.devices.virtio.pci import VirtioPci
from understudy.machine.physical import PhysicalMemory

RAM = 1 << 20
ECAM, SLOT = 0xE000_0000, 1
BAR, MSIX = 0xC000_0000, 0xC000_4000
QUEUES, BUFFERS = 0x1000, 0x1_8000  # where the driver has its queues, 4 KiB each, and its buffers
VERSION_1, PACKED = 1 << 32, 1 << 34


class Memory(PhysicalMemory):
    """RAM from 0 on; every access to anything else is an IndexError."""

    def __init__(self) -> None:
        self.ram = bytearray(RAM)

    def read(self, gpa: int, length: int, /) -> bytes:
        if not 0 <= gpa <= gpa + length <= RAM:
            raise IndexError(gpa)
        return bytes(self.ram[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        if not 0 <= gpa <= gpa + len(data) <= RAM:
            raise IndexError(gpa)
        self.ram[gpa : gpa + len(data)] = data


class Driver:
    """Finds the device, sets it up and hands it buffers."""

    def __init__(self, part: str, ns: int = 0, **options: Any) -> None:
        self.memory, self.clock = Memory(), ManualClock(ns)
        self.messages: list[Message] = []
        self.irqs: list[tuple[int, bool]] = []
        self.board = Board(
            self.clock,
            self.memory,
            [("pci", {"at": (0xCF8, ECAM), "irq": range(4)}), (part, options)],
            deliver=self.messages.append,
            interrupt=lambda irq, level: self.irqs.append((irq, level)),
        )
        self.device = self.board.part(part, VirtioPci)
        self.rings: list[Ring] = []
        self.set_config(4, 6, 2)  # answers in memory, is bus master

    # --- registers ---

    def config(self, offset: int, size: int = 4) -> int:
        return self.board.bus.mmio_read(ECAM + (SLOT << 15) + offset, size)

    def set_config(self, offset: int, value: int, size: int = 4) -> None:
        self.board.bus.mmio_write(ECAM + (SLOT << 15) + offset, size, value)

    def get(self, offset: int, size: int = 4) -> int:
        return self.board.bus.mmio_read(BAR + offset, size)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        self.board.bus.mmio_write(BAR + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(0x14, 1)

    @property
    def offered(self) -> int:
        value = 0
        for half in range(2):
            self.put(0, half)
            value |= self.get(4) << 32 * half
        return value

    # --- set-up ---

    def accept(self, features: int) -> int:
        """The status after the features were negotiated."""
        self.put(0x14, 0, 1)
        self.put(0x14, 1, 1)
        self.put(0x14, 3, 1)
        for half in range(2):
            self.put(8, half)
            self.put(0xC, features >> 32 * half & 0xFFFF_FFFF)
        self.put(0x14, 11, 1)
        return self.status

    def start(self, features: int = VERSION_1, size: int = 8, *, msix: bool = True) -> None:
        """All that a driver does until buffers may flow."""
        assert self.accept(features) == 11
        self.features = features
        if msix:
            for n in range(self.get(0x12, 2) + 1):
                self.board.bus.mmio_write(MSIX + 16 * n, 8, 0xFEE0_0000)
                self.board.bus.mmio_write(MSIX + 16 * n + 8, 8, 0x40 + n)
            self.set_config(self.capability(0x11) + 2, 0x8000, 2)
            self.put(0x10, 0, 2)
        self.rings = []
        for n in range(self.get(0x12, 2)):
            self.put(0x16, n, 2)
            self.put(0x18, size, 2)
            if msix:
                self.put(0x1A, n + 1, 2)
            at = QUEUES + 0x1000 * n
            for register, offset in ((0x20, 0), (0x28, DRIVER_AREA), (0x30, DEVICE_AREA)):
                self.put(register, at + offset, 8)
            self.memory.write(at, bytes(0x1000))
            self.put(0x1C, 1, 2)
            kind = PackedRing if features & PACKED else SplitRing
            self.rings.append(kind(self.memory, at, size))
        self.size = size
        self.put(0x14, 15, 1)
        assert self.status == 15

    def capability(self, id_: int, nth: int = 0) -> int:
        at = self.config(0x34, 1)
        while at:
            if self.config(at, 1) == id_:
                if nth == 0:
                    return at
                nth -= 1
            at = self.config(at + 1, 1)
        raise LookupError(id_)

    # --- buffers ---

    def describe(self, n: int, index: int, gpa: int, length: int, flags: int, nxt: int = 0) -> None:
        self.rings[n].describe(index, gpa, length, flags, nxt)

    def offer(self, n: int, head: int) -> None:
        """Make a chain available, without a kick."""
        self.rings[n].offer(head)

    def kick(self, n: int = 0) -> None:
        self.put(NOTIFY + 4 * n, n, 2)

    def request(self, n: int, out: bytes, room: int, *, gpa: int = BUFFERS) -> bytes:
        """One request of two descriptors; what the device wrote."""
        self.memory.write(gpa, out + b"\xee" * room)
        if out:
            self.describe(n, 0, gpa, len(out), 1 if room else 0, 1)
        if room:
            self.describe(n, 1 if out else 0, gpa + len(out), room, 2)
        self.offer(n, 0)
        self.kick(n)
        self.clock.hurry()  # it halts until it has its answer
        done = self.finished(n)
        assert [head for head, _ in done] == [0]
        return self.memory.read(gpa + len(out), done[0][1])

    def finished(self, n: int) -> list[tuple[int, int]]:
        """(head, bytes written) of what came back since the last time."""
        return self.rings[n].finished()

    def rings_in(self, memory: Memory) -> list[Ring]:
        """What it knows of its rings, for a copy of the memory."""
        return copy.deepcopy(self.rings, {id(self.memory): memory})
