"""Port accesses: every one is for a device model.

Source: SDM 1, "Input/Output"; SDM 2, "IN", "OUT", "INS", "OUTS".
Invariant: nothing that a guest does raises here.
"""

from understudy.instructions import port_strings
from understudy.instructions.port_strings import CYCLE_NS
from understudy.instructions.strings import end_burst
from understudy.paging.guest_walk import GuestFault
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Verdict

RAX = 0


def read(vcpu: Vcpu, port: int, size: int, length: int) -> Verdict:
    """IN of 1, 2 or 4 bytes to AL, AX or EAX."""
    value = vcpu.port_read(port, size)
    if size < 4:
        kept = (1 << 8 * size) - 1
        value = vcpu.read_gpr(RAX) & ~kept | value & kept
    vcpu.write_gpr(RAX, value)
    vcpu.time.debt += CYCLE_NS
    vcpu.skip(length)
    return RESUME


def write(vcpu: Vcpu, port: int, size: int, length: int) -> Verdict:
    """OUT of 1, 2 or 4 bytes from AL, AX or EAX."""
    vcpu.port_write(port, size, vcpu.read_gpr(RAX) & (1 << 8 * size) - 1)
    vcpu.time.debt += CYCLE_NS
    vcpu.skip(length)
    return RESUME


def string(
    vcpu: Vcpu, port: int, size: int, gva: int, address_bits: int, length: int,
    *, is_in: bool, repeats: bool,
) -> Verdict:  # fmt: skip
    """INS or OUTS: a burst of it; `gva` is the memory operand's."""
    try:
        is_over = port_strings.string(
            vcpu, port, size, gva, address_bits, is_in=is_in, repeats=repeats
        )
    except GuestFault as fault:
        return vcpu.guest_fault(fault)
    if is_over:
        vcpu.skip(length)
    else:
        end_burst(vcpu)
    return RESUME
