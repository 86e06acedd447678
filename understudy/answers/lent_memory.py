"""An instruction on a device that nobody emulates: the processor executes it, on lent memory.

For the length of one instruction a page of RAM lies where the guest's tables find the device.
What the instruction reads of the device is put there first, read over the bus once; what it has
written is taken from there afterwards, if it completed.  All else is the processor's: registers,
flags, x87 and SSE state, far transfers, and every fault, with its own address and error code.

So no instruction is "not emulated", and an operand that begins in RAM and ends in a device is an
access of each.

Source: SDM 3A, "Memory Types" (what a device sees); SDM 3C, "Monitor Trap Flag".

Invariants: the page is gone before anything else of the guest runs; if a translation that the
instruction needs is refused, no device is read or written.
"""

from types import TracebackType
from typing import Final, NamedTuple

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.instructions.footprint import NotDecoded, Touch, faults_first, footprint
from understudy.instructions.operands import pieces
from understudy.instructions.port_strings import CYCLE_NS
from understudy.instructions.surroundings import load, store
from understudy.paging.guest_walk import GuestFault
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.one_instruction import execute_one
from understudy.verdict import RESUME, Stop, Verdict

OFFSET: Final = PAGE - 1


class Loan:
    """Pages of RAM in the place of devices' pages."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.hpas: dict[int, int] = {}  # by gfn

    def __enter__(self) -> "Loan":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.end()

    def lend(self, gpa: int, data: bytes) -> None:
        """Put these bytes, inside one page, where the device is."""
        memory, gfn = self.vcpu.memory, gpa >> PAGE_SHIFT
        hpa = self.hpas.get(gfn)
        if hpa is None:
            hpa = self.hpas[gfn] = memory.spare.frame()
            memory.p2m.map(gfn, hpa >> PAGE_SHIFT, 1)
        memory.host.memory.write(hpa + (gpa & OFFSET), data)

    def written(self, gpa: int, size: int) -> bytes:
        """What is there now."""
        hpa = self.hpas[gpa >> PAGE_SHIFT]
        return self.vcpu.memory.host.memory.read(hpa + (gpa & OFFSET), size)

    def end(self) -> None:
        """The devices are back."""
        memory = self.vcpu.memory
        while self.hpas:
            gfn, hpa = self.hpas.popitem()
            memory.p2m.unmap(gfn, 1)
            memory.spare.release(hpa >> PAGE_SHIFT)


class Part(NamedTuple):
    """Bytes of an access inside one page.  `gpa`: None if the guest's tables refuse it."""

    gpa: int | None
    size: int
    touch: Touch


def execute(vcpu: Vcpu, gpa: int) -> Verdict | Stop:
    """The instruction at RIP, of which the device at `gpa` was the first that it met."""
    if vcpu.is_stepping:
        return vcpu.error(f"gpa {gpa:#x}: the instruction touches a device that it does not name")
    guest = vcpu.guest
    try:
        parts = _parts(vcpu, footprint(guest, guest.fxsave))
    except NotDecoded as problem:
        return vcpu.error(f"gpa {gpa:#x}: {problem}")
    will_fault = faults_first(guest) or any(part.gpa is None for part in parts)
    devices = [(at, n, touch) for at, n, touch in parts
               if at is not None and vcpu.memory.hpa(at) is None]  # fmt: skip
    contents = [(at, load(vcpu, at, n) if touch.reads and not will_fault else bytes(n))
                for at, n, touch in devices]  # fmt: skip
    before = guest.retired
    with Loan(vcpu) as loan:
        loan.lend(gpa, b"")
        for at, data in contents:
            loan.lend(at, data)
        if (stop := execute_one(vcpu)) is not None:
            return stop
        is_done = guest.retired != before
        results = [(at, loan.written(at, n)) for at, n, touch in devices if touch.writes]
    vcpu.spend(CYCLE_NS)
    for at, data in results if is_done else ():
        store(vcpu, at, data)
    return RESUME


def _parts(vcpu: Vcpu, touches: list[Touch]) -> list[Part]:
    translation, parts = vcpu.translation(), []
    for touch in touches:
        for gva, n in pieces(touch.gva, touch.size):
            try:
                gpa = translation.gpa(vcpu.memory, gva, write=touch.writes, mark=False)
            except GuestFault:
                parts.append(Part(None, n, touch))
            else:
                if touch.writes:
                    vcpu.memory.expect_write(gpa)
                parts.append(Part(gpa, n, touch))
    return parts
