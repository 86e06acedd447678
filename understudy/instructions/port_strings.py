"""INS and OUTS: port accesses whose other operand is memory.

Source: SDM 2A, "INS/INSB/INSW/INSD" and SDM 2B, "OUTS/OUTSB/OUTSW/OUTSD".

A device that moves bytes in runs is on no ISA bus: a run, at most what a page holds, is one cycle.

Invariants: a page fault leaves RSI, RDI and RCX as after the last element that was done, and of the
element that faults no port is read or written; an exit moves at most `BURST` elements, so that
events can come in between, or `LONG_BURST` bytes in runs.
"""

from collections.abc import Callable
from typing import Final

from understudy.arch.address import PAGE
from understudy.instructions.operands import MASKS, advance
from understudy.instructions.strings import BURST, DF, RCX, RDI, RSI, Places, goes_by_elements
from understudy.instructions.surroundings import Surroundings, load

LONG_BURST: Final = 0x1_0000
CYCLE_NS: Final = 1000  # a bus cycle of a PC: what an access to a device waits for


def string(
    around: Surroundings, port: int, size: int, gva: int, address_bits: int, *,
    is_in: bool, repeats: bool,
) -> bool:  # fmt: skip
    """A burst of an INS or OUTS; `gva` is its first element's.  False if more are left to do.

    GuestFault if an element may not be accessed; those before it are done.
    """
    guest, bus, places = around.guest, around.bus, Places(around)
    register, mask = RDI if is_in else RSI, MASKS[address_bits >> 3]
    step = -size if guest.rflags & DF else size
    left = guest.gpr(RCX) & mask if repeats else 1
    first = guest.gpr(register) & mask
    base = gva - first  # of the segment; offsets come round at the address size
    runs = bus.string_port(port)
    is_slow = goes_by_elements(guest)
    if runs is not None and step == 1 and not is_slow:
        read, write = runs
        reader = read if is_in else None
        return _runs(around, places, reader, write, base, mask, left, repeats)
    count, done = min(left, 1 if is_slow else BURST), 0
    try:
        while done < count:
            at = base + (first + done * step & mask) & MASKS[8]
            found = places.find(at, size, write=is_in)
            if is_in:
                places.store(found, bus.port_read(port, size).to_bytes(size, "little"))
            else:
                bus.port_write(port, size, int.from_bytes(places.load(found), "little"))
            done += 1
    finally:
        around.spend(done * CYCLE_NS)
        advance(guest, register, done * step, mask)
        if repeats:
            advance(guest, RCX, -done, mask)
    return done == left


def _runs(
    around: Surroundings, places: Places, read: Callable[[int], bytes] | None,
    write: Callable[[bytes], None], base: int, mask: int, left: int, repeats: bool,
) -> bool:  # fmt: skip
    """The same for an INSB (with `read`) or OUTSB, upwards, at a device that moves runs."""
    guest, register = around.guest, RSI if read is None else RDI
    first = guest.gpr(register) & mask
    count, done, cycles = min(left, LONG_BURST), 0, 0
    try:
        while done < count:
            offset = first + done & mask
            at = base + offset & MASKS[8]
            size = min(count - done, PAGE - at % PAGE, mask + 1 - offset)
            found = places.find(at, size, write=read is not None)
            ((gpa, _),) = found
            if around.memory.hpa(gpa) is None:
                size = 1  # of a device's registers, one by one
            if read is None:
                write(load(around, gpa, size))
            else:
                places.store([(gpa, size)], read(size))
            done += size
            cycles += 1
    finally:
        around.spend(cycles * CYCLE_NS)
        advance(guest, register, done, mask)
        if repeats:
            advance(guest, RCX, -done, mask)
    return done == left
