"""What a paravirtual kernel calls its hypervisor for, one function a call.

Source: ours (`interface`).  Invariant: a call that is refused has changed nothing, but for the
changes of page tables that stand before the refused one in its list.
"""

import struct
from collections.abc import Callable
from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.arch.msr import Msr
from understudy.execution.pv.domain import Domain
from understudy.execution.pv.interface import (
    MOST_FRAMES,
    MOST_TEXT,
    TIMER_VECTOR,
    Call,
    Error,
)
from understudy.paging.guest_walk import GuestFault
from understudy.paging.pv import Refused
from understudy.silicon import Exit
from understudy.vcpu.activity import Activity
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop, Verdict

RAX, RCX, RDX, RBX = range(4)
LOW32: Final = 0xFFFF_FFFF
EOI, SVR, LVT_LINT0, LVT_TIMER = 0xB0, 0xF0, 0x350, 0x320  # of the local APIC
ENABLED, MASKED, DEADLINE_MODE = 0x1FF, 1 << 16, 2 << 17
COM1, LINE_STATUS, DATA_READY = 0x3F8, 0x3FD, 1
PM1A_CONTROL, SLEEP = 0x604, 0x3400
LONGEST_NS: Final = 1 << 40

Given = tuple[int, int, int]
"""The three arguments."""


def answer(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """Do what was called for; the result goes to AX."""
    guest = vcpu.guest
    assert isinstance(guest, Domain)
    vcpu.retire()
    gpr, is_64 = guest.read_gpr, guest.is_code_64
    call = CALLS.get(gpr(RAX) & LOW32)
    name = call.__name__ if call is not None else "unknown"
    guest.calls[name] += 1
    given = gpr(RBX), gpr(RCX), gpr(RDX)
    if not is_64:
        given = given[0] & LOW32, given[1] & LOW32, given[2] & LOW32
    try:
        result = Error.UNKNOWN if call is None else call(vcpu, guest, given)
    except Refused as problem:
        guest.refuse(name, str(problem))
        result = Error.INVALID
    except GuestFault as problem:
        guest.refuse(name, str(problem))
        result = Error.FAULT
    if result is not None:
        guest.write_gpr(RAX, result & (0xFFFF_FFFF_FFFF_FFFF if is_64 else LOW32))
    return RESUME


def start(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Events go there; this page is shared."""
    entry, gpa, features = given
    pfn = guest.view.paging.machine_frames.pfn(gpa >> PAGE_SHIFT)
    if pfn is None:
        raise Refused(f"gpa {gpa:#x} is no memory")
    guest.start(entry, pfn, features)
    now = vcpu.clock.now()
    for register, value in ((SVR, ENABLED), (LVT_LINT0, MASKED),
                            (LVT_TIMER, DEADLINE_MODE | TIMER_VECTOR)):  # fmt: skip
        vcpu.apic.write(register, value, now)
    return 0


def return_from_event(vcpu: Vcpu, guest: Domain, given: Given) -> int | None:
    """Go on where an event came, or wherever the frame says."""
    guest.return_from_event()
    vcpu.look()
    return None


def update(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Changes of page tables, in their order."""
    guest.change_tables(given[0], given[1])
    return given[1]


def frames(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """The host frames behind guest frames; ~0 where there is none."""
    at, first, count = given
    if not 0 <= count <= MOST_FRAMES:
        raise Refused(f"{count} frames at once")
    numbers = [guest.view.paging.machine_frames.pfn(gfn) for gfn in range(first, first + count)]
    raw = struct.pack(f"<{count}Q", *(~0 & (1 << 64) - 1 if n is None else n for n in numbers))
    guest.write_kernel(at, raw)
    return count


def set_if(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Interrupts on or off; whether they were on."""
    was_on = guest.interrupt_flag()
    guest.set_interrupt_flag(bool(given[0]))
    return int(was_on)


def look(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Nothing: what waits comes on the way back."""
    return 0


def set_stack(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Where events from programs begin."""
    guest.kernel_stack = given[0]
    return 0


def set_tls(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """The thread pointer of programs."""
    guest.set_tls(given[0])
    return 0


def set_fpu(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Whether the next use of the FPU is an event."""
    guest.set_task_switched(bool(given[0]))
    return 0


def set_watch(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Breakpoint 0."""
    guest.set_watch(given[0], given[1])
    return 0


def time(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """ns since the start: DX has the upper half."""
    now = vcpu.clock.now()
    guest.write_gpr(RDX, now >> 32 & LOW32)
    return now & LOW32


def timer(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """The last event of the timer is done with; the next comes in so many ns."""
    now = vcpu.clock.now()
    vcpu.apic.write(EOI, 0, now)
    vcpu.apic.wrmsr(Msr.IA32_TSC_DEADLINE, now + min(given[0], LONGEST_NS), now)
    vcpu.look()
    return 0


def write(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """Text to the console, whose backend is the first serial port."""
    at, count, _ = given
    if not 0 <= count <= MOST_TEXT:
        raise Refused(f"{count} bytes of text at once")
    for byte in guest.read_kernel(at, count):
        vcpu.port_write(COM1, 1, byte)
    return count


def read(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """A byte from it."""
    if not vcpu.port_read(LINE_STATUS, 1) & DATA_READY:
        return -1
    return vcpu.port_read(COM1, 1)


def wait(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """For an event."""
    guest.set_interrupt_flag(True)
    vcpu.state.activity = Activity.HLT
    vcpu.clock.hurry()
    vcpu.look()
    return 0


def off(vcpu: Vcpu, guest: Domain, given: Given) -> int:
    """The end: as a PC's ACPI registers have it."""
    vcpu.port_write(PM1A_CONTROL, 2, SLEEP)
    return 0


CALLS: Final[dict[int, Callable[[Vcpu, Domain, Given], int | None]]] = {
    Call.START: start, Call.RETURN: return_from_event, Call.UPDATE: update, Call.FRAMES: frames,
    Call.SET_IF: set_if, Call.LOOK: look, Call.SET_STACK: set_stack, Call.SET_TLS: set_tls,
    Call.SET_FPU: set_fpu, Call.SET_WATCH: set_watch, Call.TIME: time, Call.TIMER: timer,
    Call.WRITE: write, Call.READ: read, Call.WAIT: wait, Call.OFF: off,
}  # fmt: skip
