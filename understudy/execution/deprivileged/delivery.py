"""Events delivered through the guest's own IDT, by the hypervisor.

Source: SDM 3A, "Interrupt and Exception Handling"; SDM 2A, "INT n/INTO/INT3/INT1 - Call to
Interrupt Procedure".

Invariants: nothing has changed when an event is not delivered here; the frame is pushed with the
rights of the level at which the handler runs.
"""

from typing import Final

from understudy.arch.address import PAGE, is_canonical
from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.execution.deprivileged import descriptors
from understudy.execution.deprivileged.descriptors import BIG, CODE, CONFORMING, LONG, NotHere
from understudy.execution.deprivileged.live import Live
from understudy.execution.emulate.linear import Linear
from understudy.guest import RSP, Event, Kind
from understudy.instructions.operands import LOW32, MASK64
from understudy.paging.guest_walk import GuestFault

INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF
PRESENT: Final = 1 << 7
CLEARED: Final = int(RFLAGS(TF=1, NT=1, RF=1, VM=1))
IF, RF = RFLAGS.IF.mask, RFLAGS.RF.mask
PE: Final = CR0.PE.mask
TR_BASE, TR_LIMIT = int(Vmcs.GUEST_TR_BASE), int(Vmcs.GUEST_TR_LIMIT)
TR_RIGHTS: Final = int(Vmcs.GUEST_TR_ACCESS_RIGHTS)
TSS32: Final = 0x8  # of a TSS's type: none of 16 bits
RSP0, IST1, ESP0, SS0 = 4, 0x24, 4, 8  # in a TSS


def deliver(guest: Live, event: Event) -> bool:
    """Have the guest go on in its handler.  False: by VMX."""
    try:
        if event.kind is Kind.NMI or not guest.read(Vmcs.GUEST_CR0) & PE:
            return False
        if guest.is_long_mode():
            _deliver64(guest, event)
        else:
            _deliver32(guest, event)
    except (GuestFault, NotHere):
        return False
    guest.end_shadow()
    return True


def _checked(guest: Live, event: Event, rights: int) -> bool:
    """Whether it is an interrupt gate, else a trap gate."""
    kind = rights & 0x1F
    if not rights & PRESENT or kind not in (INTERRUPT_GATE, TRAP_GATE):
        raise NotHere
    is_software = event.kind in (Kind.SOFTWARE_INTERRUPT, Kind.SOFTWARE_EXCEPTION)
    if is_software and rights >> 5 & 3 < guest.cpl():
        raise NotHere
    return kind == INTERRUPT_GATE


def _target(guest: Live, selector: int) -> tuple[Segment, int]:
    """The handler's code segment and its level."""
    segment = descriptors.descriptor(guest, selector)
    level = segment.rights >> 5 & 3
    if segment.rights & (CODE | CONFORMING) != CODE or level > guest.cpl():
        raise NotHere
    return segment._replace(selector=selector & ~3 | level), level


def _pushed(guest: Live, event: Event) -> int:
    """RFLAGS as the frame has them: an instruction that raises an event is done, and so is RF."""
    return guest.rflags & ~RF if event.kind.is_software else guest.rflags


def _go(guest: Live, code: Segment, rip: int, *, masks: bool) -> None:
    guest.set_live_segment(SegmentName.CS, code)
    guest.rip = rip
    guest.rflags = guest.rflags & ~(CLEARED | (IF if masks else 0))


def _store_frame(memory: Linear, at: int, words: list[int], width: int) -> None:
    """From above, as it is pushed: what cannot be written there leaves no mark below."""
    size = width * len(words)
    if at % PAGE + size <= PAGE:
        frame = b"".join(word.to_bytes(width, "little") for word in words)
        memory.store(at, size, int.from_bytes(frame, "little"))
        return
    for n, word in reversed(list(enumerate(words))):
        memory.store(at + n * width & (MASK64 if width == 8 else LOW32), width, word)


def _deliver64(guest: Live, event: Event) -> None:
    memory, table = guest.kernel_memory(), guest.idtr()
    if event.vector * 16 + 15 > table.limit:
        raise NotHere
    gate = memory.load(table.base + event.vector * 16, 16)
    masks = _checked(guest, event, gate >> 40 & 0xFF)
    rip = gate & 0xFFFF | gate >> 32 & 0xFFFF_0000 | gate >> 32 & LOW32 << 32
    code, level = _target(guest, gate >> 16 & 0xFFFF)
    if code.rights & (LONG | BIG) != LONG or not is_canonical(rip) or level:
        raise NotHere
    old, ist = guest.cpl(), gate >> 32 & 7
    if ist or old != level:
        at = IST1 + 8 * (ist - 1) if ist else RSP0
        if at + 7 > guest.read(TR_LIMIT):
            raise NotHere
        rsp = memory.load(guest.read(TR_BASE) + at, 8)
    else:
        rsp = guest.gpr(RSP)
    words = [
        guest.rip + event.length, guest.segment(SegmentName.CS).selector, _pushed(guest, event),
        guest.gpr(RSP), guest.segment(SegmentName.SS).selector,
    ]  # fmt: skip
    if event.error is not None:
        words.insert(0, event.error)
    rsp = (rsp & ~0xF) - 8 * len(words) & MASK64
    if not is_canonical(rsp):
        raise NotHere
    code = descriptors.marked(guest, code)
    _store_frame(memory, rsp, [word & MASK64 for word in words], 8)
    if old != level:
        guest.set_live_segment(SegmentName.SS, descriptors.null_stack(level))
    guest.set_gpr(RSP, rsp)
    _go(guest, code, rip, masks=masks)


def _deliver32(guest: Live, event: Event) -> None:
    memory, table = guest.kernel_memory(), guest.idtr()
    if event.vector * 8 + 7 > table.limit:
        raise NotHere
    gate = memory.load(table.base + event.vector * 8, 8)
    masks = _checked(guest, event, gate >> 40 & 0xFF)
    eip = gate & 0xFFFF | gate >> 32 & 0xFFFF_0000
    code, level = _target(guest, gate >> 16 & 0xFFFF)
    if eip > code.limit or level:
        raise NotHere
    old, stack = guest.cpl(), guest.segment(SegmentName.SS)
    words = [
        guest.rip + event.length & LOW32, guest.segment(SegmentName.CS).selector,
        _pushed(guest, event),
    ]  # fmt: skip
    esp = guest.gpr(RSP) & LOW32
    if old != level:
        words += [esp, stack.selector]
        base = guest.read(TR_BASE)
        if not guest.read(TR_RIGHTS) & TSS32 or guest.read(TR_LIMIT) < SS0 + 3:
            raise NotHere
        esp = memory.load(base + ESP0, 4)
        stack = descriptors.stack(guest, memory.load(base + SS0, 2), level)
    if event.error is not None:
        words.insert(0, event.error)
    esp -= 4 * len(words)
    is_flat = stack.limit == LOW32 and stack.rights & BIG and not stack.rights & (CODE | 4)
    if esp < 0 or not is_flat:
        raise NotHere
    code, stack = descriptors.marked(guest, code), descriptors.marked(guest, stack)
    _store_frame(memory, stack.base + esp & LOW32, [word & LOW32 for word in words], 4)
    if old != level:
        guest.set_live_segment(SegmentName.SS, stack)
    guest.set_gpr(RSP, esp)
    _go(guest, code, eip, masks=masks)
