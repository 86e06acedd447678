"""Interrupt lines, and the bus that finds the device behind a port or a physical address.

Source: the ISA bus, where a wide access to byte-wide devices becomes one access a byte, and an
access that nobody claims reads all ones.

Invariants: at most one device owns a (port, size) or an address; the bus never raises for what a
guest does; a byte-wide register access costs one dictionary look-up and the device's method.
"""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

PortRead = Callable[[int, int], int]
PortWrite = Callable[[int, int, int], None]
MmioRead = Callable[[int, int], int]
MmioWrite = Callable[[int, int, int], None]

ONES = {n: (1 << 8 * n) - 1 for n in range(1, 9)}
PORT_SIZES = (1, 2, 4)


class Line:
    """An interrupt wire.  The callback is called when its level changes, and only then."""

    __slots__ = ("callback", "level")

    def __init__(self, callback: Callable[[bool], None]) -> None:
        self.callback = callback
        self.level = False

    def set(self, level: bool) -> None:
        """Give the wire this level."""
        if level is not self.level:
            self.level = level
            self.callback(level)

    def raise_(self) -> None:
        """Assert."""
        self.set(True)

    def lower(self) -> None:
        """Release."""
        self.set(False)

    def pulse(self) -> None:
        """A rising edge, whatever the level was; low afterwards."""
        self.set(False)
        self.set(True)
        self.set(False)


class SharedLine:
    """A wire that several devices can pull: asserted while any of them does.

    It has no state of its own, so a snapshot of the devices' lines restores it.
    """

    def __init__(self, callback: Callable[[bool], None]) -> None:
        self.callback = callback
        self.inputs: list[Line] = []

    def input(self) -> Line:
        """One more device's end of the wire."""
        line = Line(self._change)
        self.inputs.append(line)
        return line

    def _change(self, level: bool) -> None:
        asserted = sum(line.level for line in self.inputs)
        if asserted == level:  # the first to rise, or the last to fall
            self.callback(level)


class Attachable(Protocol):
    """What the bus needs to know of a device."""

    name: str
    ports: tuple[range, ...]
    mmio: tuple[range, ...]
    port_width: int

    def read(self, port: int, size: int) -> int: ...
    def write(self, port: int, value: int, size: int) -> None: ...
    def mmio_read(self, gpa: int, size: int) -> int: ...
    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...


Window = tuple[int, int, MmioRead, MmioWrite]


class Bus:
    """Ports and physical addresses, and who answers there."""

    def __init__(self) -> None:
        self._reads: dict[int, PortRead] = {}  # by port << 4 | size
        self._writes: dict[int, PortWrite] = {}
        self._pages: dict[int, list[Window]] = {}  # by gpa >> 12
        self.unclaimed: Counter[tuple[str, int]] = Counter()

    # --- who is where ---

    def attach(self, device: Attachable) -> None:
        """Claim all that the device says it answers to.  ValueError if any of it is taken."""
        for ports in device.ports:
            self.claim_ports(ports, device.read, device.write, device.port_width)
        for window in device.mmio:
            self.claim_mmio(window, device.mmio_read, device.mmio_write)

    def claim_ports(self, ports: range, read: PortRead, write: PortWrite, width: int = 1) -> None:
        """Answer at these ports, accesses of up to `width` bytes in one piece."""
        if taken := [p for p in ports if p << 4 | 1 in self._reads]:
            raise ValueError(f"port {taken[0]:#x} is claimed twice; every port has one device")
        for port in ports:
            for size in PORT_SIZES:
                if size <= width and port + size <= ports.stop:
                    self._reads[port << 4 | size] = read
                    self._writes[port << 4 | size] = write

    def release_ports(self, ports: range) -> None:
        """Nobody answers at these ports any more."""
        for port in ports:
            for size in PORT_SIZES:
                self._reads.pop(port << 4 | size, None)
                self._writes.pop(port << 4 | size, None)

    def claim_mmio(self, window: range, read: MmioRead, write: MmioWrite) -> None:
        """Answer at these physical addresses."""
        for page in _pages(window):
            for start, stop, _, _ in self._pages.get(page, ()):
                if start < window.stop and window.start < stop:
                    raise ValueError(
                        f"gpa {window.start:#x}-{window.stop - 1:#x} overlaps "
                        f"{start:#x}-{stop - 1:#x}; every address has one device"
                    )
        for page in _pages(window):
            self._pages.setdefault(page, []).append((window.start, window.stop, read, write))

    def release_mmio(self, window: range) -> None:
        """Nobody answers at these addresses any more."""
        for page in _pages(window):
            left = [w for w in self._pages.get(page, ()) if w[0] != window.start]
            if left:
                self._pages[page] = left
            else:
                self._pages.pop(page, None)

    # --- accesses ---

    def port_read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        read = self._reads.get(port << 4 | size)
        if read is not None:
            return read(port, size)
        if size == 1:
            self.unclaimed["port", port] += 1
            return 0xFF
        value = 0
        for i in range(size):
            value |= self.port_read(port + i & 0xFFFF, 1) << 8 * i
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        write = self._writes.get(port << 4 | size)
        if write is not None:
            write(port, value & ONES[size], size)
        elif size == 1:
            self.unclaimed["port", port] += 1
        else:
            for i in range(size):
                self.port_write(port + i & 0xFFFF, 1, value >> 8 * i)

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of 1 to 8 bytes."""
        for start, stop, read, _ in self._pages.get(gpa >> 12, ()):
            if start <= gpa and gpa + size <= stop:
                return read(gpa, size)
        if not self._is_split(gpa, size):
            self.unclaimed["mmio", gpa >> 12] += 1
            return ONES[size]
        value = 0
        for i in range(size):
            value |= self.mmio_read(gpa + i, 1) << 8 * i
        return value

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1 to 8 bytes."""
        for start, stop, _, write in self._pages.get(gpa >> 12, ()):
            if start <= gpa and gpa + size <= stop:
                write(gpa, size, value & ONES[size])
                return
        if not self._is_split(gpa, size):
            self.unclaimed["mmio", gpa >> 12] += 1
            return
        for i in range(size):
            self.mmio_write(gpa + i, 1, value >> 8 * i)

    def _is_split(self, gpa: int, size: int) -> bool:
        """Whether some window holds a part of the access, though none holds all of it."""
        ends = (gpa >> 12, gpa + size - 1 >> 12)
        return size > 1 and any(
            start < gpa + size and gpa < stop
            for page in ends
            for start, stop, _, _ in self._pages.get(page, ())
        )


def _pages(window: range) -> range:
    return range(window.start >> 12, (window.stop - 1 >> 12) + 1)
