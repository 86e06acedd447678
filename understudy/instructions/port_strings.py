"""INS and OUTS: port accesses whose other operand is memory.

Source: SDM 2A, "INS/INSB/INSW/INSD" and SDM 2B, "OUTS/OUTSB/OUTSW/OUTSD".

Invariants: a page fault leaves RSI, RDI and RCX as after the last element that was done, and of the
element that faults no port is read or written; an exit moves at most `BURST` elements, so that
events can come in between.
"""

from typing import Final

from understudy.instructions.operands import MASKS, advance
from understudy.instructions.strings import BURST, DF, RCX, RDI, RSI, Places, goes_by_elements
from understudy.instructions.surroundings import Surroundings

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
    most = 1 if goes_by_elements(guest) else BURST
    count, done = min(left, most), 0
    first = guest.gpr(register) & mask
    base = gva - first  # of the segment; offsets come round at the address size
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
