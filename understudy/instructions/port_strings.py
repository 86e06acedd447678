"""INS and OUTS: port accesses whose other operand is memory.

Source: SDM 2A, "INS/INSB/INSW/INSD" and SDM 2B, "OUTS/OUTSB/OUTSW/OUTSD"; SDM 3C, "Information
for VM Exits Due to Instruction Execution".

Invariants: a page fault leaves RSI, RDI and RCX as after the last element that was done; an exit
moves at most `BURST` elements, so that events can come in between.
"""

from typing import TYPE_CHECKING, Final

from understudy.arch.vmcs import IoAccess
from understudy.paging.guest_walk import GuestFault

if TYPE_CHECKING:
    from understudy.vcpu.loop import Vcpu

BURST: Final = 1024
CYCLE_NS: Final = 1000  # a bus cycle of a PC: what an access to a device waits for
DF: Final = 1 << 10
RCX, RSI, RDI = 1, 6, 7


def string(vcpu: "Vcpu", access: IoAccess, gva: int, address_bits: int, length: int) -> None:
    """Carry out (a burst of) an INS or OUTS, whose memory operand begins at `gva`."""
    size, register = access.SIZE + 1, RDI if access.IN else RSI
    mask = (1 << address_bits) - 1
    step = -size if vcpu.guest.rflags & DF else size
    left = vcpu.gpr(RCX) & mask if access.REP else 1
    count = min(left, BURST)
    done = 0
    try:
        for done in range(count):
            _element(vcpu, access, gva + done * step, size)
        done = count
    except GuestFault as fault:
        vcpu.guest_fault(fault)
    vcpu.spend(done * CYCLE_NS)
    advance(vcpu, register, done * step, mask)
    if access.REP:
        advance(vcpu, RCX, -done, mask)
    if done == left:
        vcpu.skip(length)


def _element(vcpu: "Vcpu", access: IoAccess, gva: int, size: int) -> None:
    gva &= (1 << 64) - 1
    translation = vcpu.translation()
    pages = [
        (translation.gpa(vcpu.memory, at, write=access.IN), part)
        for at, part in pieces(gva, size)
    ]  # fmt: skip
    if access.IN:
        data = vcpu.bus.port_read(access.PORT, size).to_bytes(size, "little")
        for gpa, part in pages:
            store(vcpu, gpa, data[:part])
            data = data[part:]
    else:
        data = b"".join(load(vcpu, gpa, part) for gpa, part in pages)
        vcpu.bus.port_write(access.PORT, size, int.from_bytes(data, "little"))


def pieces(gva: int, size: int) -> list[tuple[int, int]]:
    """[gva, gva+size) cut at the page boundary."""
    first = min(size, 0x1000 - (gva & 0xFFF))
    return [(gva, first)] + ([(gva + first, size - first)] if first < size else [])


def load(vcpu: "Vcpu", gpa: int, size: int) -> bytes:
    """Bytes of guest-physical memory, RAM or device."""
    if vcpu.memory.hpa(gpa) is not None:
        return vcpu.memory.read(gpa, size)
    value: int = vcpu.mmio_read(gpa, size)
    return value.to_bytes(size, "little")


def store(vcpu: "Vcpu", gpa: int, data: bytes) -> None:
    """Write bytes to guest-physical memory, RAM or device."""
    if vcpu.memory.hpa(gpa) is not None:
        vcpu.memory.write(gpa, data)
    else:
        vcpu.mmio_write(gpa, len(data), int.from_bytes(data, "little"))


def advance(vcpu: "Vcpu", register: int, by: int, mask: int) -> None:
    """Add to a register as an instruction with this address size does."""
    old = vcpu.gpr(register)
    new = old + by & mask
    if mask == 0xFFFF:
        new |= old & ~mask
    vcpu.set_gpr(register, new)
