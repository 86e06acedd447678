"""A guest's registers while it is interpreted: near, as `instructions.registers.Program` asks.

Source: SDM 1, "Basic Program Execution Registers".

Invariant: what segments say is what the guest's say now: `begin` forgets what was known of them.
"""

from collections.abc import Callable

from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.segment import Segment, SegmentName
from understudy.guest import RSP, Guest
from understudy.instructions.operands import LOW32, MASK64
from understudy.instructions.segment_limits import DEFAULT_BIG, Reach, place, reach

PE, VM = CR0.PE.mask, RFLAGS.VM.mask


class Reaches(dict[int, Reach]):
    """What segments reach, by their numbers; asked for when it is needed."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self.guest, self.is_real = guest, False

    def __missing__(self, n: int) -> Reach:
        found = self[n] = reach(self.guest.segment(n), self.is_real)
        return found


class Held:
    """General registers, RIP and RFLAGS; what else is asked for is in the guest."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.values = guest, [0] * 16
        self.rip, self.rflags, self.cpl = 0, 2, 0
        self.code_limit, self.stack_mask = MASK64, MASK64
        self.read_gpr: Callable[[int], int] = self.values.__getitem__
        self.write_gpr: Callable[[int, int], None] = self.values.__setitem__
        self.gpr, self.set_gpr = self.read_gpr, self.write_gpr
        self.segment_base = guest.segment_base
        self.reaches = Reaches(guest)
        self.blocking = 0  # by STI (1) or MOV SS (2): the next instruction comes before interrupts
        self.is_attended = False  # after this one somebody has to look

    def begin(self, values: tuple[int, ...], bits: int, cr0: int) -> None:
        """Take over what the guest has."""
        guest = self.guest
        self.values[:] = values
        self.values[RSP] = guest.gpr(RSP)
        self.rip, self.rflags, self.cpl = guest.rip, guest.rflags, guest.cpl()
        self.is_attended = False
        if bits == 64:
            self.stack_mask = MASK64
        else:
            reaches = self.reaches
            reaches.clear()
            reaches.is_real = not cr0 & PE or bool(self.rflags & VM)
            is_big = guest.segment(SegmentName.SS).rights & DEFAULT_BIG
            self.stack_mask = LOW32 if is_big else 0xFFFF

    def place(self, n: int, offset: int, size: int, write: bool) -> int:
        """A linear address, as `Program` says."""
        return place(self.reaches[n], offset, size, write)

    def selector(self, n: int) -> int:
        """Of a segment register."""
        return self.guest.segment(n).selector

    def shadow(self, *, by_stack: bool = False) -> None:
        """As `Program` says."""
        self.blocking, self.is_attended = 2 if by_stack else 1, True

    def look_up(self) -> None:
        """As `Program` says."""
        self.is_attended = True

    def load_segment(self, n: int, segment: Segment) -> None:
        """As `Program` says."""
        self.guest.set_segment(n, segment)
        self.reaches.pop(n, None)
        self.is_attended = True
