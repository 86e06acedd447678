"""System calls and returns from them, and SWAPGS, which goes with them.

Source: SDM 2B, "SYSCALL", "SYSRET", "SYSENTER", "SYSEXIT", "SWAPGS".
"""

from typing import Final

import iced_x86 as iced

from understudy.arch.address import is_canonical
from understudy.arch.cr import RFLAGS
from understudy.arch.msr import EFER, Msr
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.execution.deprivileged.descriptors import NotHere
from understudy.execution.deprivileged.live import Live
from understudy.guest import RSP
from understudy.instructions.operands import LOW32

RCX, RDX, R11 = 1, 2, 11
CODE64, CODE32, DATA = 0xA09B, 0xC09B, 0xC093
OF_SYSRET: Final = 0x3C_7FD7
CLEARED: Final = int(RFLAGS(VM=1, IF=1, RF=1))
RF: Final = RFLAGS.RF.mask
GS_BASE: Final = int(Vmcs.GUEST_GS_BASE)


def _enter(guest: Live, cs: int, ss: int, code: int, level: int, rip: int, flags: int) -> None:
    flat = level << 5
    guest.set_live_segment(SegmentName.SS, Segment(ss & 0xFFFF, 0, LOW32, DATA | flat))
    guest.set_live_segment(SegmentName.CS, Segment(cs & 0xFFFF, 0, LOW32, code | flat))
    guest.rip = rip
    guest.rflags = flags | 2
    guest.tick()
    guest.note_skip()


def syscall(guest: Live, instruction: iced.Instruction) -> None:
    """SYSCALL."""
    if not guest.is_code64() or not guest.control().efer & EFER.SCE.mask:
        raise NotHere
    rdmsr, flags = guest.processor.rdmsr, guest.rflags
    star = rdmsr(Msr.IA32_STAR) >> 32 & 0xFFFF
    guest.set_gpr(RCX, guest.rip + instruction.len)
    guest.set_gpr(R11, flags & ~RF)
    flags &= ~(rdmsr(Msr.IA32_FMASK) | RF)
    _enter(guest, star & ~3, star + 8, CODE64, 0, rdmsr(Msr.IA32_LSTAR), flags)


def sysretq(guest: Live, instruction: iced.Instruction) -> None:
    """SYSRET to 64-bit code.  Programs are refused by a fault that is not the processor's here."""
    if guest.cpl():
        raise NotHere
    rip, flags = guest.gpr(RCX), guest.gpr(R11) & OF_SYSRET
    if not guest.control().efer & EFER.SCE.mask or not is_canonical(rip):
        raise NotHere
    if guest.shows_single_step(flags):
        raise NotHere
    star = guest.processor.rdmsr(Msr.IA32_STAR) >> 48
    _enter(guest, star + 16 | 3, star + 8 | 3, CODE64, 3, rip, flags)


def sysenter(guest: Live, instruction: iced.Instruction) -> None:
    """SYSENTER."""
    cs = guest.read(Vmcs.GUEST_SYSENTER_CS) & 0xFFFC
    if not cs:
        raise NotHere
    rip, rsp = guest.read(Vmcs.GUEST_SYSENTER_EIP), guest.read(Vmcs.GUEST_SYSENTER_ESP)
    code = CODE64 if guest.is_long_mode() else CODE32
    if code == CODE32:
        rip, rsp = rip & LOW32, rsp & LOW32
    guest.set_gpr(RSP, rsp)
    _enter(guest, cs, cs + 8, code, 0, rip, guest.rflags & ~CLEARED)


def sysexit(guest: Live, instruction: iced.Instruction) -> None:
    """To 32-bit code."""
    first = guest.read(Vmcs.GUEST_SYSENTER_CS) & 0xFFFC
    if not first:
        raise NotHere
    rip, rsp = guest.gpr(RDX) & LOW32, guest.gpr(RCX) & LOW32
    guest.set_gpr(RSP, rsp)
    _enter(guest, first + 16 | 3, first + 24 | 3, CODE32, 3, rip, guest.rflags)


def swapgs(guest: Live, instruction: iced.Instruction) -> None:
    """SWAPGS."""
    if not guest.is_code64():
        raise NotHere
    processor = guest.processor
    inner = processor.rdmsr(Msr.IA32_KERNEL_GS_BASE)
    processor.wrmsr(Msr.IA32_KERNEL_GS_BASE, guest.read(GS_BASE))
    guest.write(GS_BASE, inner)
    guest.tick()
    guest.skip(instruction.len)
