"""The registers that an instruction names, whoever keeps them.

A guest behind its port (`guest.py`) is one; a technique that interprets holds them nearer, and is
asked for more: what a segment lets a program reach.
Source: SDM 1, "Basic Program Execution Registers".
"""

from collections.abc import Callable
from typing import Protocol

from understudy.arch.segment import Segment
from understudy.guest import Guest, Kind


class Registers(Protocol):
    """General registers by number, RIP, RFLAGS, and the bases of segments."""

    rip: int
    rflags: int
    read_gpr: Callable[[int], int]
    write_gpr: Callable[[int, int], None]

    def gpr(self, n: int, /) -> int: ...
    def set_gpr(self, n: int, value: int, /) -> None: ...
    def segment_base(self, n: int, /) -> int: ...


class NotHere(Exception):
    """Not carried out here: the processor has to execute this instruction."""


class Program(Registers, Protocol):
    """What a program's instructions see that reach memory by linear addresses.

    Nothing has changed when `place` or an access refuses, so an instruction asks for all its places
    first.
    """

    bits: int  # of the code: 16, 32 or 64
    is_real: bool  # real-address mode
    is_long: bool  # IA-32e mode, compatibility mode too
    code_limit: int  # the last offset of code; of 64-bit code none
    stack_mask: int  # what of RSP is the stack pointer
    cpl: int

    @property
    def guest(self) -> Guest:
        """Whose registers they are: segments, tables, control registers."""

    def selector(self, n: int, /) -> int:
        """Of a segment register, by its number."""

    def place(self, n: int, offset: int, size: int, write: bool, /) -> int:
        """The linear address of so many bytes at an offset in a segment.  Not for 64-bit code.

        NotHere: the segment does not let them be accessed.
        """

    def shadow(self, *, by_stack: bool = False) -> None:
        """The next instruction comes before any interrupt (STI; MOV SS and POP SS: `by_stack`)."""

    def look_up(self) -> None:
        """After this instruction somebody has to look whether an event can be delivered."""

    def load_segment(self, n: int, segment: Segment, /) -> None:
        """Set a segment register, its hidden part too."""

    def enter_code(self, code: Segment, rip: int, cpl: int, /) -> None:
        """Go on there; the stack segment says the level, and has been loaded if that changes."""

    def become_supervisor(self) -> None:
        """What is accessed until the end of this instruction is as the processor accesses it."""

    def blocks_nmis(self) -> bool:
        """An IRET has to end that."""

    def exits_on(self, vector: int, kind: Kind, /) -> bool:
        """Whether such an event is the hypervisor's."""

    def msr(self, index: int, /) -> int:
        """One that the processor keeps for the guest."""

    def set_msr(self, index: int, value: int, /) -> None:
        """Set one."""

    def invalidate(self, gva: int, /) -> None:
        """Forget how this address translates.  NotHere: that is the hypervisor's."""

    def probe(self, at: int, size: int, /) -> None:
        """GuestFault if these bytes may not be written; they are not."""

    def time_stamp(self, *, with_processor: bool) -> int:
        """The TSC as the program sees it.  `with_processor`: RDTSCP asks.

        NotHere: it may not read it, or its reading is the hypervisor's.
        """

    def pause(self) -> None:
        """A loop waits.  NotHere: that is the hypervisor's."""
