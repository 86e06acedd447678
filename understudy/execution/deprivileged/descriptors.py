"""Segment registers loaded from the guest's own descriptor tables.

Source: SDM 3A, "Segment Descriptors", "Privilege Level Checking When Accessing Data Segments".
Invariant: what is not plain raises NotHere, before anything has changed.
"""

from typing import Final

from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.execution.deprivileged.live import Live

PRESENT, LONG, BIG = 1 << 7, 1 << 13, 1 << 14  # of access rights
CODE, CONFORMING, READ_WRITE, PLAIN, ACCESSED = 0x8, 0x4, 0x2, 0x10, 0x1  # of a type
UNUSABLE: Final = 1 << 16
NULL: Final = 3
IN_LDT: Final = 4
FLAT: Final = 0xFFFF_FFFF
GDTR_BASE, GDTR_LIMIT = int(Vmcs.GUEST_GDTR_BASE), int(Vmcs.GUEST_GDTR_LIMIT)
LDTR_BASE, LDTR_LIMIT = int(Vmcs.GUEST_LDTR_BASE), int(Vmcs.GUEST_LDTR_LIMIT)
LDTR_RIGHTS: Final = int(Vmcs.GUEST_LDTR_ACCESS_RIGHTS)
LOADABLE: Final = (SegmentName.ES, SegmentName.DS, SegmentName.FS, SegmentName.GS)


class NotHere(Exception):
    """The processor has to execute this, by VMX."""


def table_entry(guest: Live, selector: int) -> int:
    """The linear address of a descriptor.  NotHere: beyond its table."""
    read, offset = guest.read, selector & ~7
    if selector & IN_LDT:
        base, limit = read(LDTR_BASE), read(LDTR_LIMIT)
        if read(LDTR_RIGHTS) & UNUSABLE:
            raise NotHere
    else:
        base, limit = read(GDTR_BASE), read(GDTR_LIMIT)
    if offset + 7 > limit:
        raise NotHere
    return base + offset


def unpack(selector: int, raw: int) -> Segment:
    """A descriptor as a segment register has it."""
    limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
    if raw >> 55 & 1:
        limit = limit << 12 | 0xFFF
    base = raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000
    return Segment(selector, base, limit, raw >> 40 & 0xF0FF)


def descriptor(guest: Live, selector: int) -> Segment:
    """The plain, present descriptor that a selector names."""
    at, memory = table_entry(guest, selector), guest.kernel_memory()
    segment = unpack(selector, memory.load(at, 8))
    if segment.rights & (PRESENT | PLAIN) != PRESENT | PLAIN:
        raise NotHere
    return segment


def marked(guest: Live, segment: Segment) -> Segment:
    """The same, which is going to be loaded: its descriptor's accessed bit is set."""
    rights = segment.rights
    if rights & (ACCESSED | UNUSABLE):
        return segment
    at = table_entry(guest, segment.selector)
    guest.kernel_memory().store(at + 5, 1, rights & 0xFF | ACCESSED)
    return segment._replace(rights=rights | ACCESSED)


def code(guest: Live, selector: int, level: int) -> Segment:
    """A nonconforming code segment of this level."""
    segment = descriptor(guest, selector & ~3 | level)
    rights = segment.rights
    if rights & (CODE | CONFORMING) != CODE or rights >> 5 & 3 != level:
        raise NotHere
    if rights & LONG and (rights & BIG or not guest.is_long_mode()):
        raise NotHere
    return segment


def stack(guest: Live, selector: int, level: int) -> Segment:
    """A stack segment of this level."""
    if selector & 3 != level:
        raise NotHere
    segment = descriptor(guest, selector)
    rights = segment.rights
    if rights & (CODE | READ_WRITE) != READ_WRITE or rights >> 5 & 3 != level:
        raise NotHere
    return segment


def null_stack(level: int) -> Segment:
    """What SS is in 64-bit mode after an event from an outer level."""
    return Segment(level, 0, 0, UNUSABLE | level << 5)


def data(guest: Live, selector: int) -> Segment:
    """What a load of DS, ES, FS or GS with this selector makes of the register."""
    if not selector & ~3:
        return Segment(selector, 0, 0, UNUSABLE)
    segment = descriptor(guest, selector)
    rights = segment.rights
    is_code = rights & CODE
    if is_code and not rights & READ_WRITE:
        raise NotHere
    level = max(guest.cpl(), selector & 3)
    if (not is_code or not rights & CONFORMING) and rights >> 5 & 3 < level:
        raise NotHere
    return segment


def leave_inner_data(guest: Live, level: int) -> None:
    """After a return to an outer level: segments of the inner ones are not reachable there.

    Their bases and limits stay; a null selector becomes zero.
    """
    for n in LOADABLE:
        segment = guest.segment(n)
        is_conforming = segment.rights & (CODE | CONFORMING) == CODE | CONFORMING
        if not segment.selector & ~NULL:
            if segment.selector:
                guest.set_live_segment(n, segment._replace(selector=0))
        elif segment.rights >> 5 & 3 < level and not is_conforming:
            guest.set_live_segment(n, segment._replace(selector=0, rights=UNUSABLE))
