"""A machine: memory, processors, a board.  A VM has one; a physical machine is of the same shape.

Whoever loads, debugs or runs one takes a `Machine` and need not know of which kind it is.

Source: lecture, "Virtual machines": an efficient, isolated duplicate of the real machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.clock import Clock
from understudy.machine.bus import Bus
from understudy.machine.physical import PhysicalMemory


class Ram(PhysicalMemory, Protocol):
    """Physical memory of which one can ask where it lies."""

    @property
    def size(self) -> int:
        """Bytes of RAM."""

    def ranges(self) -> list[tuple[int, int]]:
        """Usable RAM as (physical address, bytes)."""


class Cpu(Protocol):
    """A processor as loaders and debuggers see it."""

    def registers(self) -> dict[str, int]:
        """All registers, by the names of `silicon.Processor.registers`."""

    def set_registers(self, values: dict[str, int], /) -> None:
        """Set them."""


class Board(Protocol):
    """What memory and processors sit on."""

    @property
    def clock(self) -> Clock: ...
    @property
    def bus(self) -> Bus: ...


@dataclass(frozen=True)
class Machine:
    """Memory, processors (the first one boots), and the board."""

    memory: Ram
    cpus: Sequence[Cpu]
    board: Board
