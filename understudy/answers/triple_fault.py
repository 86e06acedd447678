"""A triple fault: an accident, or the way in which a kernel resets a PC?

Source: SDM 3A, "Interrupt 8 - Double Fault Exception (#DF)": a third fault shuts the processor
down, and a PC's chipset answers that with a reset.  Kernels use it (`reboot=t` of Linux, the last
resort of the BSDs): they load an empty IDT and execute INT3.

Invariant: decided from what the processor shows; nothing is remembered.
"""

from typing import Final

from understudy.arch.segment import SegmentName
from understudy.guest import Guest
from understudy.verdict import Stop, StopKind

GATE_BYTES: Final = 8
"""The smallest gate, of the IDT in 32-bit mode; an IDT shorter than this holds none."""

RAISING: Final = (b"\xcc", b"\xcd", b"\xf1")
"""INT3, INT n, INT1.  Not UD2, with which compilers mark what cannot happen."""


def holds_no_gate(idt_limit: int) -> bool:
    """Whether the IDT was made so short that no exception can be delivered."""
    return idt_limit + 1 < GATE_BYTES


def raises(code: bytes) -> bool:
    """Whether the instruction at CS:RIP was there to raise an exception."""
    return code.startswith(RAISING)


def meant(stop: Stop, guest: Guest, policy: str) -> Stop:
    """What ended the run: a triple fault is a reset by policy, or if the guest means it so."""
    if stop.kind is not StopKind.TRIPLE_FAULT or policy == "stop":
        return stop
    at = guest.segment_base(SegmentName.CS) + guest.rip
    if policy == "reset" or (holds_no_gate(guest.idtr().limit) and raises(guest.code_at(at, 2))):
        return Stop(StopKind.RESET, "by a triple fault")
    return stop
