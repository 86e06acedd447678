"""CS and SS as an IRET inside level 0 would load them again.

Source: SDM 2, "IRET/IRETD/IRETQ - Interrupt Return"; SDM 3A, "Segment Descriptors".
"""

from typing import Final, NamedTuple

from understudy.arch.address import PAGE
from understudy.arch.segment import SegmentName
from understudy.execution.bt.cache import Cache
from understudy.execution.bt.layout import (
    CS,
    CS_AT,
    MINUS_CODE,
    MINUS_CS,
    MINUS_SS,
    MINUS_STACK,
    NOTHING,
    SS,
    SS_AT,
)
from understudy.execution.deprivileged import descriptors
from understudy.execution.deprivileged.descriptors import NotHere
from understudy.execution.deprivileged.live import Live
from understudy.execution.emulate.linear import Refused
from understudy.paging.guest_walk import GuestFault

DESCRIPTOR: Final = 8
NULL: Final = descriptors.null_stack(0)


class Loaded(NamedTuple):
    """A descriptor that a segment register was loaded from."""

    at: int  # gva; 0: nowhere, the selector is null
    raw: int


NONE: Final = Loaded(0, 0)
NEVER: Final = Loaded(0, 1)
"""What is found there is never this."""


def show(guest: Live, cache: Cache, *, returns: bool) -> None:
    """Put both into the window; `returns`: whether IRET may execute there at all."""
    for n, as_read, minus, at, minus_raw in (
        (SegmentName.CS, CS, MINUS_CS, CS_AT, MINUS_CODE),
        (SegmentName.SS, SS, MINUS_SS, SS_AT, MINUS_STACK),
    ):
        selector = guest.segment(n).selector
        loaded = loaded_from(guest, n) if returns else NEVER
        cache.set_datum(as_read, selector)
        cache.set_datum(minus, -selector & cache.layout.mask)
        cache.set_datum(at, loaded.at or cache.layout.base + NOTHING)
        raw = (-word & cache.layout.mask for word in cache.words(loaded.raw))
        for offset, word in zip(range(0, DESCRIPTOR, cache.layout.word), raw, strict=True):
            cache.set_datum(minus_raw + offset, word)


def loaded_from(guest: Live, n: int) -> Loaded:
    """The descriptor in the guest's table, if it still is what the register has; else `NEVER`.

    Where SMAP is on it must not be the programs': what the processor reads by itself, it keeps it
    from whatever RFLAGS.AC says.
    """
    segment = guest.segment(n)
    if segment == NULL:
        return NONE
    try:
        at = descriptors.table_entry(guest, segment.selector)
        memory = guest.kernel_memory()
        found = memory.translation.find(memory.ram, at, mark=False)
        if at % PAGE > PAGE - DESCRIPTOR or not segment.selector & ~3:
            return NEVER
        raw = int.from_bytes(memory.ram.read(found.gpa, DESCRIPTOR), "little")
    except (NotHere, GuestFault, Refused):
        return NEVER
    return Loaded(at, raw) if descriptors.unpack(segment.selector, raw) == segment else NEVER
