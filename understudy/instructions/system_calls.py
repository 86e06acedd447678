"""Software interrupts, fast system calls, and the base of GS that goes with them.

Source: SDM 2, "INT n/INTO/INT3/INT1", "SYSCALL", "SYSRET", "SWAPGS"; SDM 3A, "Fast System Calls in
64-Bit Mode".

Invariant: what would fault is NotHere and has changed nothing.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.address import is_canonical
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER, Msr
from understudy.arch.segment import Segment, SegmentName
from understudy.guest import Event, Kind
from understudy.instructions.access import Load, Store
from understudy.instructions.arithmetic import OF
from understudy.instructions.delivery import deliver
from understudy.instructions.operands import LOW32, MASKS
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_loads import SS
from understudy.instructions.stack import Flow

RF, FIXED = RFLAGS.RF.mask, 2
RCX, R11 = 1, 11
GS: Final = int(SegmentName.GS)
CODE64, CODE32, DATA = 0xA09B, 0xC09B, 0xC093  # rights of flat segments, without their DPL
FROM_R11: Final = 0x3C_7FD7
"""What of R11 SYSRET takes into RFLAGS."""


def _interrupt(instruction: iced.Instruction) -> Flow:
    """INT n, INT3 and INTO."""
    mnemonic, length = instruction.mnemonic, instruction.len
    event = {
        Mnemonic.INT3: Event(Vector.BP, Kind.SOFTWARE_EXCEPTION, None, length),
        Mnemonic.INTO: Event(Vector.OF, Kind.SOFTWARE_EXCEPTION, None, length),
    }.get(mnemonic) or Event(instruction.immediate8, Kind.SOFTWARE_INTERRUPT, None, length)
    is_conditional = mnemonic == Mnemonic.INTO

    def interrupt(r: Program, at: int, load: Load, store: Store) -> None:
        if is_conditional and not r.rflags & OF:
            r.rip = r.rip + length & LOW32
            return
        if r.exits_on(event.vector, event.kind):
            raise NotHere
        deliver(r, event, load, store, resume=False)

    return interrupt


def _enter(r: Program, code: Segment, stack: Segment, rip: int, cpl: int) -> None:
    dpl = cpl << 5
    r.load_segment(SS, stack._replace(rights=stack.rights | dpl))
    r.enter_code(code._replace(rights=code.rights | dpl), rip, cpl)


def _flat(selector: int, rights: int) -> Segment:
    return Segment(selector & 0xFFFF, 0, LOW32, rights)


def _syscall(instruction: iced.Instruction) -> Flow:
    length = instruction.len

    def syscall(r: Program, at: int, load: Load, store: Store) -> None:
        if not r.guest.control().efer & EFER.SCE.mask:
            raise NotHere
        first, to = r.msr(Msr.IA32_STAR) >> 32 & 0xFFFF, r.msr(Msr.IA32_LSTAR)
        mask = r.msr(Msr.IA32_FMASK)
        r.set_gpr(RCX, r.rip + length & MASKS[8])
        r.set_gpr(R11, r.rflags & ~RF)
        r.rflags = r.rflags & ~(mask | RF) | FIXED
        _enter(r, _flat(first & 0xFFFC, CODE64), _flat(first + 8, DATA), to, 0)

    return syscall


def _sysret(instruction: iced.Instruction) -> Flow:
    to_64 = instruction.mnemonic == Mnemonic.SYSRETQ

    def sysret(r: Program, at: int, load: Load, store: Store) -> None:
        rip = r.gpr(RCX)
        if r.cpl or not r.guest.control().efer & EFER.SCE.mask:
            raise NotHere
        if to_64 and not is_canonical(rip):
            raise NotHere
        first = r.msr(Msr.IA32_STAR) >> 48
        r.rflags = r.gpr(R11) & FROM_R11 | FIXED
        stack = _flat(first + 8 | 3, DATA)
        if to_64:
            _enter(r, _flat(first + 16 | 3, CODE64), stack, rip, 3)
        else:
            _enter(r, _flat(first | 3, CODE32), stack, rip & LOW32, 3)

    return sysret


def _swapgs(instruction: iced.Instruction) -> Flow:
    def swapgs(r: Program, at: int, load: Load, store: Store) -> None:
        if r.cpl:
            raise NotHere
        old = r.guest.segment(GS)
        r.load_segment(GS, old._replace(base=r.msr(Msr.IA32_KERNEL_GS_BASE)))
        r.set_msr(Msr.IA32_KERNEL_GS_BASE, old.base)

    return swapgs


TRANSFERS: Final[dict[int, Callable[[iced.Instruction], Flow]]] = {
    Mnemonic.INT: _interrupt, Mnemonic.INT3: _interrupt, Mnemonic.INTO: _interrupt,
    Mnemonic.SYSCALL: _syscall, Mnemonic.SYSRET: _sysret, Mnemonic.SYSRETQ: _sysret,
}  # fmt: skip


def transfer(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out what goes elsewhere, RIP included.  None: it is of another group."""
    make = TRANSFERS.get(instruction.mnemonic)
    is_here = instruction.mnemonic not in (Mnemonic.SYSCALL, Mnemonic.SYSRET) or bits == 64
    return make(instruction) if make is not None and is_here else None


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """The same for what goes straight on."""
    return _swapgs(instruction) if instruction.mnemonic == Mnemonic.SWAPGS else None
