"""Writes to write-protected page tables, carried out in the guest's stead.

Source: SDM 2, the instructions' own pages; Adams and Agesen, "A Comparison of Software and Hardware
Techniques for x86 Virtualization", for trace faults.

Invariants: what cannot be carried out here changes nothing and is left to the processor, one step
at a time; the tables change only through `Paging.store` and `GuestMemory`, and tracers hear of it.
"""

from typing import Final

from understudy.arch.address import PAGE
from understudy.instructions.access import Load
from understudy.instructions.interpreter import plan_at
from understudy.instructions.strings import (
    DF,
    MOVS,
    RAX,
    RCX,
    RDI,
    RSI,
    STOS,
    TF,
    StringPlan,
    burst,
    end_burst,
)
from understudy.instructions.surroundings import Surroundings
from understudy.machine.p2m import GuestMemoryError

WIDEST: Final = 8  # bytes of an operand


def write_table(around: Surroundings, gva: int, gpa: int) -> bool:
    """Carry out the instruction at RIP, which writes to a table at `gpa`.  False: not done.

    `gva`: where the access faulted.  GuestFault: the instruction faults.
    """
    guest = around.guest
    plan = plan_at(guest)
    if plan is None:
        return False
    length, size, action, address, string = plan
    if string is not None:
        return _string(around, string, length)
    if (gpa & PAGE - 1) + size > PAGE or size > WIDEST:
        return False
    if not gva & PAGE - 1 and address(guest) & PAGE - 1:
        return False  # it begins in the page before
    action(guest, gpa, _load_from(around), around.view.store)
    around.retire()
    guest.skip(length)
    return True


def _load_from(around: Surroundings) -> Load:
    read = around.memory.read
    return lambda gpa, size: int.from_bytes(read(gpa, size), "little")


def _string(around: Surroundings, plan: StringPlan, length: int) -> bool:
    if plan.family not in (STOS, MOVS):
        return False
    try:
        is_over = _run(around, plan)
        if is_over is None:
            is_over = burst(around, plan, 0)
    except GuestMemoryError:
        return False
    if is_over:
        around.retire()
        around.guest.skip(length)
    else:
        end_burst(around)
    return True


def _run(around: Surroundings, plan: StringPlan) -> bool | None:
    """REP STOS or MOVS up to the end of a page, or of the run, at once.

    Returns whether the instruction is done; None: it takes going one by one.
    """
    guest, size, mask, is_move = around.guest, plan.size, plan.mask, plan.family is MOVS
    if mask == 0xFFFF or not plan.repeats or guest.rflags & (DF | TF):
        return None
    if any(base is not None and base(guest) for base in (plan.source, plan.target)):
        return None
    target, source, left = (guest.gpr(n) & mask for n in (RDI, RSI, RCX))
    room = PAGE - (target & PAGE - 1)
    if is_move:
        room = min(room, PAGE - (source & PAGE - 1))
        if abs(target - source) < PAGE:
            return None  # what is written may be what is read next
    count = min(left, room // size)
    if not count:
        return None
    translation, memory = around.translation(), around.memory
    gpa = translation.gpa(memory, target, write=True)
    if is_move:
        data = memory.read(translation.gpa(memory, source), count * size)
    else:
        data = (guest.gpr(RAX) & (1 << 8 * size) - 1).to_bytes(size, "little") * count
    memory.write(gpa, data)
    guest.set_gpr(RDI, target + count * size & mask)
    guest.set_gpr(RCX, left - count)
    if is_move:
        guest.set_gpr(RSI, source + count * size & mask)
    return count == left
