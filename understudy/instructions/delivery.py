"""Events on their way through the IDT, as a processor delivers them.

Source: SDM 3A, "Exception- or Interrupt-Handler Procedures", "64-Bit Mode Stack Frame", "Stack
Switching in IA-32e Mode"; SDM 3B, "Interrupt and Exception Handling" under "Real-Address Mode".

Invariants: a delivery that is done has passed every check; whatever does not (it would be another
exception), task gates and virtual-8086 mode are NotHere, and nothing has changed then but memory
below the stack that the handler would have got.
"""

from understudy.arch.cr import RFLAGS
from understudy.arch.segment import Segment
from understudy.guest import RSP, Event
from understudy.instructions.access import Load, Store
from understudy.instructions.far_transfer import CS, LONG_CODE, check_place
from understudy.instructions.operands import MASK64, MASKS
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_limits import place, reach
from understudy.instructions.segment_loads import MEMORY, SS, descriptor, marked
from understudy.instructions.stack import FLAT, SEGMENTED
from understudy.instructions.task_switch import (
    CODE_TYPE,
    CONFORMING,
    DEFAULT_BIG,
    PRESENT,
    READ_WRITE,
    TR,
    UNUSABLE,
)

IF, TF, AC, RF, VM, NT = (
    RFLAGS.IF.mask, RFLAGS.TF.mask, RFLAGS.AC.mask, RFLAGS.RF.mask, RFLAGS.VM.mask, RFLAGS.NT.mask,
)  # fmt: skip
INTERRUPT16, TRAP16, INTERRUPT32, TRAP32 = 6, 7, 14, 15
RSP_IN_TSS, IST_IN_TSS = 4, 28


def deliver(r: Program, event: Event, load: Load, store: Store, *, resume: bool) -> None:
    """Begin the event's handler.  `resume`: RF is set in the flags that it finds.

    RIP is the instruction's that was interrupted, or raised the event.
    """
    if r.rflags & VM or (r.rflags & AC and not r.is_real):
        raise NotHere
    if r.is_real:
        _real(r, event, load, store)
    else:
        r.become_supervisor()  # tables are read, and an inner stack is written, as one
        _through_gate(r, event, load, store, resume)


def _return_address(r: Program, event: Event) -> int:
    rip = r.rip + event.length
    return rip & (MASK64 if r.bits == 64 else MASKS[4] if r.bits == 32 else 0xFFFF)


def _real(r: Program, event: Event, load: Load, store: Store) -> None:
    base, limit = r.guest.idtr()
    if event.vector * 4 + 3 > limit:
        raise NotHere
    entry, code = load(base + event.vector * 4, 4), r.guest.segment(CS)
    ip, selector = entry & 0xFFFF, entry >> 16
    if ip > code.limit:
        raise NotHere
    sp = r.gpr(RSP)
    for value in (r.rflags, code.selector, _return_address(r, event)):
        sp -= 2
        store(SEGMENTED.place(r, sp, 2, True), 2, value & 0xFFFF)
    r.set_gpr(RSP, SEGMENTED.pointer(r, sp))
    r.rflags &= ~(IF | TF | AC | RF)
    r.enter_code(code._replace(selector=selector, base=selector << 4), ip, r.cpl)


def _through_gate(
    r: Program, event: Event, load: Load, store: Store, resume: bool
) -> None:  # fmt: skip
    is_long, size = r.is_long, 16 if r.is_long else 8
    base, limit = r.guest.idtr()
    at = event.vector * size
    if at + size - 1 > limit:
        raise NotHere
    gate = load(base + at, 8)
    rip = gate & 0xFFFF | gate >> 32 & 0xFFFF_0000
    if is_long:
        rip |= (load(base + at + 8, 8) & 0xFFFF_FFFF) << 32
    rights = gate >> 40 & 0xFF
    kind, dpl = rights & 0x1F, rights >> 5 & 3
    is_legal = kind in (INTERRUPT32, TRAP32) or (kind in (INTERRUPT16, TRAP16) and not is_long)
    if not is_legal or not rights & PRESENT or (event.kind.is_software and dpl < r.cpl):
        raise NotHere
    width = 8 if is_long else 4 if kind in (INTERRUPT32, TRAP32) else 2
    selector = gate >> 16 & 0xFFFF
    found, place_of_it = descriptor(r, selector, load)
    is_code = found.rights & (MEMORY | CODE_TYPE | PRESENT) == MEMORY | CODE_TYPE | PRESENT
    is_64 = found.rights & (LONG_CODE | DEFAULT_BIG) == LONG_CODE
    if not is_code or found.dpl > r.cpl or (is_long and not is_64):
        raise NotHere
    is_inner = not found.kind & CONFORMING and found.dpl < r.cpl
    cpl = found.dpl if is_inner else r.cpl
    if cpl == 3:
        raise NotHere  # a handler of the program's own, whose stack is no supervisor's
    code = Segment(selector & ~3 | cpl, *marked(found, place_of_it, store))
    if width == 2:
        rip &= 0xFFFF
    check_place(r, code, rip)
    flags = r.rflags & ~RF | (RF if resume or r.rflags & RF else 0)
    values = [flags, r.selector(CS), _return_address(r, event)]
    if is_inner or is_long:
        values = [r.selector(SS), r.gpr(RSP), *values]
    if event.error is not None:
        values.append(event.error)
    stack: Segment | None = None
    if is_long:
        if is_inner:
            stack = Segment(cpl, 0, 0, UNUSABLE | cpl << 5)
        sp = _push_long(r, gate, cpl, is_inner, values, load, store)
    elif is_inner:
        stack, sp = _push_inner(r, cpl, width, values, load, store)
    else:
        sp = r.gpr(RSP)
        for value in values:
            sp -= width
            store(SEGMENTED.place(r, sp, width, True), width, value & MASKS[width])
        sp = SEGMENTED.pointer(r, sp)
    if stack is not None:
        r.load_segment(SS, stack)
    r.set_gpr(RSP, sp)
    cleared = TF | VM | RF | NT | (IF if kind in (INTERRUPT16, INTERRUPT32) else 0)
    r.rflags &= ~cleared
    r.enter_code(code, rip, cpl)


def _push_long(
    r: Program, gate: int, cpl: int, is_inner: bool, values: list[int], load: Load, store: Store
) -> int:
    """The frame in IA-32e mode, aligned to 16 bytes; the stack pointer then."""
    ist, sp = gate >> 32 & 7, r.gpr(RSP)
    if ist or is_inner:
        _, base, limit, _ = r.guest.segment(TR)
        at = IST_IN_TSS + 8 * ist if ist else RSP_IN_TSS + 8 * cpl
        if at + 7 > limit:
            raise NotHere
        sp = load(base + at, 8)
    sp &= ~0xF
    for value in values:
        sp = sp - 8 & MASK64
        store(FLAT.place(r, sp, 8, True), 8, value)
    return sp


def _push_inner(
    r: Program, cpl: int, width: int, values: list[int], load: Load, store: Store
) -> tuple[Segment, int]:
    """The frame on the inner stack that the TSS names; its segment, and the stack pointer then."""
    _, base, limit, rights = r.guest.segment(TR)
    is_32 = rights & 8
    at, size = (8 * cpl + 4, 4) if is_32 else (4 * cpl + 2, 2)
    if at + size + 1 > limit:
        raise NotHere
    sp, selector = load(base + at, size), load(base + at + size, 2)
    found, place_of_it = descriptor(r, selector, load)
    is_writable = found.kind & (MEMORY | CODE_TYPE | READ_WRITE) == MEMORY | READ_WRITE
    fits = selector & 3 == found.dpl == cpl and bool(found.rights & PRESENT)
    if not is_writable or not fits:
        raise NotHere
    stack = Segment(selector, *marked(found, place_of_it, store))
    there, mask = reach(stack, False), MASKS[4] if stack.rights & DEFAULT_BIG else 0xFFFF
    for value in values:
        sp = sp - width & mask
        store(place(there, sp, width, True), width, value & MASKS[width])
    return stack, sp if mask != 0xFFFF else r.gpr(RSP) & ~mask | sp
