"""A PCI bus with one toy function in slot 3, and what its wires saw."""

from understudy.clock import ManualClock
from understudy.devices.message import Message
from understudy.devices.pci import ECAM_BYTES, Pci
from understudy.devices.pci_function import Function
from understudy.devices.wires import Wires
from understudy.machine.bus import Bus, Line, Region, Space
from understudy.machine.physical import PhysicalMemory

ECAM = 0xE000_0000
MEMORY, IO, MASTER = 2, 1, 4  # in the command register


class Toy:
    """Registers that echo offsets, and keep what is written."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int, int]] = []

    def read(self, region: int, offset: int, size: int) -> int:
        return region << 4 | offset & 15

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        self.log.append((region, offset, value, size))


class Memory(PhysicalMemory):
    """64 KiB, written down by requester."""

    def __init__(self, requester: int, log: list[tuple[int, int, bytes]]) -> None:
        self.requester, self.log = requester, log

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        if gpa >= 0x10000:
            raise IndexError(gpa)
        self.log.append((self.requester, gpa, bytes(data)))


class Bench:
    """`add` puts what it likes on the function before it is plugged in."""

    def __init__(self, *, is_express: bool = False, high_window: range | None = None) -> None:
        self.bus, self.toy, self.resets = Bus(), Toy(), 0
        self.irqs: list[tuple[int, bool]] = []
        self.messages: list[Message] = []
        self.dma: list[tuple[int, int, bytes]] = []
        wires = Wires(
            ManualClock(),
            lines=tuple(Line(lambda level, n=n: self.irqs.append((n, level))) for n in range(4)),  # type: ignore[misc]
            deliver=self.messages.append,
            bus=self.bus,
            requester=lambda n: Memory(n, self.dma),
        )
        self.pci = Pci(wires, restart=self._reset, high_window=high_window)
        self.bus.claim(Region(Space.PORT, 0xCF8, 8, self.pci, 0, 4))
        self.bus.claim(Region(Space.MMIO, ECAM, ECAM_BYTES, self.pci, 1))
        self.function = Function(
            vendor=0x1AF4, device=0x1042, class_code=0x018000, is_express=is_express
        )
        self.add(self.function)
        self.pci.plug(self.function, 3, pin=1)

    def add(self, function: Function) -> None:
        function.add_bar(0, 0x1000, self.toy)
        function.add_bar(1, 64, self.toy, is_port=True)
        function.add_capability(0x09, bytes(14), bytes([0, 0xFF]))

    def _reset(self) -> None:
        self.resets += 1

    def get(self, device: int, offset: int, size: int = 4) -> int:
        self.bus.port_write(0xCF8, 4, 0x80000000 | device << 11 | offset & 0xFC)
        return self.bus.port_read(0xCFC + (offset & 3), size)

    def put(self, device: int, offset: int, value: int, size: int = 4) -> None:
        self.bus.port_write(0xCF8, 4, 0x80000000 | device << 11 | offset & 0xFC)
        self.bus.port_write(0xCFC + (offset & 3), size, value)
