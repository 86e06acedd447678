"""Accesses of instructions to devices in memory.

Source: SDM 2, the instructions' own pages; SDM 3A, "Memory Types".

Invariants: what cannot be carried out here has changed nothing, no device was asked, and it is
left to the processor (`footprint`); a page fault on the way leaves the guest's state as if the
instruction had not begun (string instructions: as after the last whole element).
"""

from typing import Final

from understudy.arch.address import PAGE
from understudy.instructions.interpreter import plan_at
from understudy.instructions.port_strings import CYCLE_NS
from understudy.instructions.strings import burst, end_burst
from understudy.instructions.surroundings import Surroundings

WIDEST: Final = 8  # bytes of an access to a device


def access(around: Surroundings, gpa: int) -> bool:
    """Carry out the instruction at RIP, which accesses a device at `gpa`.  False: not done.

    GuestFault: the instruction faults.
    """
    guest = around.guest
    plan = plan_at(guest)
    if plan is None:
        return False
    length, size, action, address, string = plan
    if string is not None:
        if burst(around, string, CYCLE_NS):
            guest.skip(length)
        else:
            end_burst(around)
        return True
    offset = gpa & PAGE - 1
    if size > WIDEST:
        return False
    if offset + size > PAGE or (not offset and address(guest) & PAGE - 1):
        return False  # it begins in the page before, or ends in the one after
    action(guest, gpa, around.mmio_read, around.mmio_write)
    around.spend(CYCLE_NS)
    guest.skip(length)
    return True
