"""Interrupt lines, and the bus that finds the device behind a port or a physical address.

Source: the ISA bus, where a wide access to byte-wide devices becomes one access a byte, and an
access that nobody claims reads all ones.

A device says which `Span`s of registers it has; a board puts each somewhere, which makes it a
`Region`; the bus tells the owner the region's number and an offset, never an address.

Invariants: at most one region lies at a (port, size) or an address; the bus never raises for what
a guest does, and holds no more memory however much a guest does; a register access costs one
dictionary look-up and the device's method.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from understudy.state import restore

Read = Callable[[int, int, int], int]
Write = Callable[[int, int, int, int], None]

ONES = {n: (1 << 8 * n) - 1 for n in range(1, 9)}
PORT_SIZES = (1, 2, 4)
PORTS: Final = 0x1_0000
STRAYS_KEPT: Final = 1024  # places whose unclaimed accesses are counted one by one
ELSEWHERE: Final = ("elsewhere", 0)  # the sum over all others
PAGES_KEPT: Final = 4096  # pages whose regions are kept at hand


class Line:
    """An interrupt wire.  The callback is called when its level changes, and only then."""

    __slots__ = ("callback", "level")

    def __init__(self, callback: Callable[[bool], None] = lambda level: None) -> None:
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


# --- What lies where ---


class Space(StrEnum):
    """The two spaces that a processor addresses."""

    PORT = "port"
    MMIO = "mmio"


class Owner(Protocol):
    """Who answers.  The region is the owner's own number for it, the offset is inside it."""

    def read(self, region: int, offset: int, size: int) -> int: ...
    def write(self, region: int, offset: int, value: int, size: int) -> None: ...


@runtime_checkable
class StringOwner(Owner, Protocol):
    """One that gives and takes what string instructions move, byte after byte, in runs."""

    def read_string(self, region: int, offset: int, count: int) -> bytes: ...
    def write_string(self, region: int, offset: int, data: bytes) -> None: ...


StringPort = tuple[Callable[[int], bytes], Callable[[bytes], None]]
"""What reads and what writes bytes in runs."""


@dataclass(frozen=True, slots=True)
class Span:
    """Registers that lie together, wherever a board puts them."""

    space: Space
    length: int
    width: int  # the widest access that is taken in one piece; MMIO takes up to 8 bytes


def ports(length: int, width: int = 1) -> Span:
    """So many ports; wider accesses come as one a byte."""
    return Span(Space.PORT, length, width)


def mmio(length: int) -> Span:
    """So many bytes of physical addresses; loads and stores of 1 to 8 bytes come whole."""
    return Span(Space.MMIO, length, 8)


@dataclass(frozen=True, slots=True)
class Region:
    """A span that has its place."""

    space: Space
    base: int
    length: int
    owner: Owner
    number: int = 0
    width: int = 8

    @property
    def end(self) -> int:
        """The first port or address after it."""
        return self.base + self.length

    def __str__(self) -> str:
        return f"{self.space} {self.base:#x}-{self.end - 1:#x}"


Window = tuple[int, int, Read, Write, int]


class Bus:
    """Ports and physical addresses, and who answers there."""

    def __init__(self) -> None:
        # By port << 4 | size.  A tuple, not functools.partial: CPython calls a Python method
        # from Python faster than through C.
        self._reads: dict[int, tuple[Read, int, int]] = {}
        self._writes: dict[int, tuple[Write, int, int, int]] = {}
        self._strings: dict[int, StringPort] = {}
        self._mmio: list[Region] = []
        self._pages: dict[int, tuple[Window, ...]] = {}  # by gpa >> 12, from _mmio as needed
        self._strays: dict[tuple[str, int], int] = {}

    # --- who is where ---

    def claim(self, region: Region) -> None:
        """Let its owner answer there.  ValueError if any of it is taken or does not exist."""
        if region.space is Space.PORT:
            self._claim_ports(region)
            return
        for other in self._mmio:
            if other.base < region.end and region.base < other.end:
                raise ValueError(f"{region} overlaps {other}; every address has one device")
        self._mmio.append(region)
        self._pages.clear()

    def _claim_ports(self, region: Region) -> None:
        base, end = region.base, region.end
        if not 0 <= base < end <= PORTS:
            raise ValueError(f"{region} lies outside the {PORTS} ports")
        if taken := [p for p in range(base, end) if p << 4 | 1 in self._reads]:
            raise ValueError(f"port {taken[0]:#x} is claimed twice; every port has one device")
        read, write, number = region.owner.read, region.owner.write, region.number
        if isinstance(region.owner, StringOwner):
            for port in range(base, end):
                place = number, port - base
                self._strings[port] = (
                    partial(region.owner.read_string, *place),
                    partial(region.owner.write_string, *place),
                )
        for port in range(base, end):
            for size in PORT_SIZES:
                if size <= region.width and port + size <= end:
                    self._reads[port << 4 | size] = read, number, port - base
                    self._writes[port << 4 | size] = write, number, port - base, ONES[size]

    def release(self, region: Region) -> None:
        """Nobody answers there any more."""
        if region.space is Space.MMIO:
            self._mmio.remove(region)
            self._pages.clear()
            return
        for port in range(region.base, region.end):
            self._strings.pop(port, None)
            for size in PORT_SIZES:
                self._reads.pop(port << 4 | size, None)
                self._writes.pop(port << 4 | size, None)

    @property
    def unclaimed(self) -> Counter[tuple[str, int]]:
        """How often nobody answered, by ("port", port) or ("mmio", page)."""
        return Counter(self._strays)

    def save(self) -> dict[str, Any]:
        """What was counted, as plain values."""
        return {"unclaimed": [[kind, where, n] for (kind, where), n in self._strays.items()]}

    def load(self, saved: dict[str, Any]) -> None:
        """Count on from what was saved.  ValueError if it does not fit."""
        rows = restore(list[tuple[str, int, int]], saved["unclaimed"], "bus.unclaimed")
        self._strays = {(kind, where): n for kind, where, n in rows[: STRAYS_KEPT + 1]}

    def _stray(self, key: tuple[str, int]) -> None:
        """Count an access at a new place; after many places, those that come are counted as one."""
        if len(self._strays) >= STRAYS_KEPT:
            key = ELSEWHERE
        self._strays[key] = self._strays.get(key, 0) + 1

    # --- accesses ---

    def port_read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        found = self._reads.get(port << 4 | size)
        if found is not None:
            read, region, offset = found
            return read(region, offset, size)
        if size == 1:
            try:
                self._strays["port", port] += 1
            except KeyError:
                self._stray(("port", port))
            return 0xFF
        value = 0
        for i in range(size):
            value |= self.port_read(port + i & 0xFFFF, 1) << 8 * i
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        found = self._writes.get(port << 4 | size)
        if found is not None:
            write, region, offset, mask = found
            write(region, offset, value & mask, size)
        elif size == 1:
            try:
                self._strays["port", port] += 1
            except KeyError:
                self._stray(("port", port))
        else:
            for i in range(size):
                self.port_write(port + i & 0xFFFF, 1, value >> 8 * i)

    def string_port(self, port: int) -> StringPort | None:
        """What gives the bytes of an INSB in runs there, and takes an OUTSB's; else None."""
        return self._strings.get(port)

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of 1 to 8 bytes."""
        windows = self._pages.get(gpa >> 12)
        if windows is None:
            windows = self._page(gpa >> 12)
        for start, stop, read, _, region in windows:
            if start <= gpa and gpa + size <= stop:
                return read(region, gpa - start, size)
        if not self._is_split(gpa, size):
            try:
                self._strays["mmio", gpa >> 12] += 1
            except KeyError:
                self._stray(("mmio", gpa >> 12))
            return ONES[size]
        value = 0
        for i in range(size):
            value |= self.mmio_read(gpa + i, 1) << 8 * i
        return value

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1 to 8 bytes."""
        windows = self._pages.get(gpa >> 12)
        if windows is None:
            windows = self._page(gpa >> 12)
        for start, stop, _, write, region in windows:
            if start <= gpa and gpa + size <= stop:
                write(region, gpa - start, value & ONES[size], size)
                return
        if not self._is_split(gpa, size):
            try:
                self._strays["mmio", gpa >> 12] += 1
            except KeyError:
                self._stray(("mmio", gpa >> 12))
            return
        for i in range(size):
            self.mmio_write(gpa + i, 1, value >> 8 * i)

    def _page(self, page: int) -> tuple[Window, ...]:
        """The regions that touch a page, found among all and kept for the next access."""
        start, stop = page << 12, page + 1 << 12
        windows = tuple(
            (r.base, r.end, r.owner.read, r.owner.write, r.number)
            for r in self._mmio
            if r.base < stop and start < r.end
        )
        if len(self._pages) >= PAGES_KEPT:
            self._pages.clear()
        self._pages[page] = windows
        return windows

    def _is_split(self, gpa: int, size: int) -> bool:
        """Whether some region holds a part of the access, though none holds all of it."""
        first, last, stop_at = gpa >> 12, gpa + size - 1 >> 12, gpa + size
        windows = self._pages[first]  # its caller has just looked there
        if last != first:
            windows += self._pages.get(last) or self._page(last)
        if not windows or size == 1:
            return False
        return any(start < stop_at and gpa < stop for start, stop, *_ in windows)
