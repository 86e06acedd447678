"""The registers that an instruction names, whoever keeps them.

A guest behind its port (`guest.py`) is one; a technique that interprets holds them nearer.
Source: SDM 1, "Basic Program Execution Registers".
"""

from collections.abc import Callable
from typing import Protocol


class Registers(Protocol):
    """General registers by number, RIP, RFLAGS, and the bases of segments."""

    rip: int
    rflags: int
    read_gpr: Callable[[int], int]
    write_gpr: Callable[[int, int], None]

    def gpr(self, n: int, /) -> int: ...
    def set_gpr(self, n: int, value: int, /) -> None: ...
    def segment_base(self, n: int, /) -> int: ...
