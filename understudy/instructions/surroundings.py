"""What an instruction that is carried out here can reach: its guest, memory, ports, and time.

A virtual processor is one; this room lies below it and knows only what is listed here.

Invariants: what is at a gpa is either RAM, in `memory`, or a device's, reached by `mmio_read` and
`mmio_write`; `memory.hpa` tells which.  No device is asked for an element before what is written
of it can be.
"""

from collections.abc import Callable
from typing import Protocol

from understudy.guest import Guest
from understudy.paging.guest_walk import PhysicalMemory, Translation


class Bus(Protocol):
    """Ports, and who answers there."""

    def port_read(self, port: int, size: int) -> int: ...
    def port_write(self, port: int, size: int, value: int) -> None: ...
    def string_port(
        self, port: int
    ) -> tuple[Callable[[int], bytes], Callable[[bytes], None]] | None: ...


class Tables(Protocol):
    """Who makes the guest's page tables real."""

    @property
    def eptp(self) -> int: ...
    def cr3_write(self) -> None:
        """The guest has loaded CR3."""

    def store(self, gpa: int, size: int, value: int) -> None:
        """Carry out the guest's write to a traced table, inside one page."""


class Traps(Protocol):
    """Events that wait for the guest."""

    def note_trap(self) -> None:
        """The debug exception that waits goes in with RF set, however often its delivery exits."""


class Ram(PhysicalMemory, Protocol):
    """Guest-physical memory, of which one can ask beforehand."""

    def expect_write(self, gpa: int) -> None:
        """A page is going to be written: OutOfFrames now, not when devices were asked already."""


class Surroundings(Protocol):
    """What a vCPU has, as far as instructions need it."""

    @property
    def guest(self) -> Guest: ...
    @property
    def memory(self) -> Ram: ...
    @property
    def bus(self) -> Bus: ...
    @property
    def view(self) -> Tables: ...
    @property
    def events(self) -> Traps: ...
    def translation(self) -> Translation:
        """What the guest's linear addresses mean now."""

    def mmio_read(self, gpa: int, size: int) -> int: ...
    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...
    def spend(self, ticks: int, /) -> None:
        """Virtual time for what no retired instruction counts."""

    def retire(self) -> None:
        """An instruction was carried out that does not exit under every paging technique."""


def load(around: Surroundings, gpa: int, size: int) -> bytes:
    """Bytes of guest-physical memory inside one page, RAM or device."""
    if around.memory.hpa(gpa) is not None:
        return around.memory.read(gpa, size)
    parts = [around.mmio_read(at, n).to_bytes(n, "little") for at, n in chunks(gpa, size)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def store(around: Surroundings, gpa: int, data: bytes) -> None:
    """Write bytes to guest-physical memory inside one page, RAM or device."""
    if around.memory.hpa(gpa) is not None:
        around.memory.write(gpa, data)
        return
    for at, n in chunks(gpa, len(data)):
        around.mmio_write(at, n, int.from_bytes(data[at - gpa : at - gpa + n], "little"))


def chunks(gpa: int, size: int) -> list[tuple[int, int]]:
    """The accesses of 1, 2, 4 or 8 bytes as which these bytes cross a device's bus.

    One, if it is as wide as an operand is; else pieces that are aligned (three bytes at the end of
    a page are one and two).
    """
    if size in (1, 2, 4, 8):
        return [(gpa, size)]
    out = []
    while size:
        part = 8
        while part > size or gpa & part - 1:
            part >>= 1
        out.append((gpa, part))
        gpa, size = gpa + part, size - part
    return out
