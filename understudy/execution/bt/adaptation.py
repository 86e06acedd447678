"""Adaptation: an instruction that keeps trapping on the guest's page tables is called out.

Idea: an instruction that writes memory is innocent until proven guilty, and copied; a write to a
traced table faults.  One that has faulted so `TRAPS` times is translated anew, to a callout that
carries its write out, and faults no more.  When it has written more often where no copy of it would
have faulted than to such tables, by `INNOCENT`, it is copied again, and takes twice as many traps.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
"Adaptive Binary Translation".
Invariant: what is not carried out here to its end has changed nothing.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NamedTuple

import iced_x86 as iced

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.execution.deprivileged.descriptors import FLAT, NotHere
from understudy.execution.deprivileged.live import Live
from understudy.instructions.access import Action
from understudy.instructions.interpreter import plan
from understudy.instructions.operands import SEGMENTS, Read
from understudy.instructions.segment_limits import is_written, reach
from understudy.instructions.table_write import WIDEST

TRAPS: Final = 8
"""Trace faults that prove an instruction guilty, the first time."""
INNOCENT: Final = 8
"""Writes elsewhere, beyond those to traced tables, that prove it innocent again."""
MOST: Final = 64
"""Traps, however often it was innocent; writes elsewhere, however often it was guilty."""
SITES_KEPT: Final = 1 << 12
"""Instructions that are known to have trapped; half of them may be called out."""
NEVER: Final = 1 << 62


@dataclass(slots=True)
class Site:
    """An instruction that has trapped."""

    allowed: int
    traps: int = 0  # since it is copied
    left: int = INNOCENT  # writes elsewhere until it is innocent


class Sites:
    """Those of a vCPU, by their addresses in the guest."""

    def __init__(self) -> None:
        self.first = TRAPS  # of an instruction that has never been called out
        self.called_out: set[int] = set()
        self._sites: OrderedDict[int, Site] = OrderedDict()  # the one that trapped last comes last

    def trapped(self, rip: int) -> bool:
        """A trace fault, by a copy.  Whether it is to be called out from now on."""
        site = self._sites.setdefault(rip, Site(self.first))
        self._sites.move_to_end(rip)
        if len(self._sites) > SITES_KEPT:
            del self._sites[next(at for at in self._sites if at not in self.called_out)]
        site.traps += 1
        if site.traps < site.allowed or 2 * len(self.called_out) >= SITES_KEPT:
            return False
        self.called_out.add(rip)
        return True

    def wrote(self, rip: int, is_guilty: bool) -> bool:
        """It was called out.  Whether it is to be copied again."""
        site = self._sites[rip]
        site.left = min(site.left + 1, MOST) if is_guilty else site.left - 1
        return not site.left and self._acquit(rip, min(2 * site.allowed, MOST))

    def refuse(self, rip: int) -> None:
        """It cannot be called out: it is copied for ever."""
        self._acquit(rip, NEVER)

    def _acquit(self, rip: int, allowed: int) -> bool:
        self.called_out.remove(rip)
        self._sites[rip] = Site(allowed)
        return True


class Store(NamedTuple):
    """How to carry out an instruction that writes memory."""

    length: int
    size: int  # bytes of its memory operand
    action: Action
    address: Read  # the linear address of that
    segment: int | None  # whose limit is to be looked at


def store_of(instruction: iced.Instruction, bits: int) -> Store | None:
    """None: it takes more than that."""
    found = plan(instruction, bits)
    if found is None or found.string is not None or not is_written(instruction):
        return None
    length, size, action, address, _ = found
    if not 0 < size <= WIDEST:
        return None
    segment = None if bits == 64 else int(SEGMENTS[instruction.memory_segment])
    return Store(length, size, action, address, segment)


def carry_out(guest: Live, store: Store) -> bool:
    """The instruction at RIP, of a kernel.  Whether a copy of it would have trapped.

    NotHere, GuestFault: it is for the processor.
    """
    length, size, action, address, segment = store
    if segment is not None:
        its = reach(guest.segment(segment), False)
        if its.first or its.last != FLAT or not its.may_write:
            raise NotHere
    gva, memory = address(guest), guest.memory()
    if gva % PAGE + size > PAGE:
        raise NotHere
    gpa, ram = memory.translation.find(memory.ram, gva, write=True).gpa, memory.ram
    ram.here(gpa)
    is_guilty = not guest.view.paging.may_write(gpa >> PAGE_SHIFT)
    action(
        guest, gpa, lambda at, size: int.from_bytes(ram.read(at, size), "little"), guest.view.store
    )
    guest.tick()
    guest.skip(length)
    return is_guilty
