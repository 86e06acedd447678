"""What a paravirtual kernel and its hypervisor have agreed on.

A call is INT 82h at the kernel's level: its number in AX, arguments in BX, CX, DX; the result comes
in AX (and DX), an error as a negative number.  guests/teaching/pv/hypervisor.h says the same in C,
and a test compares.  Source: ours; the ideas are Xen's (P. Barham et al., SOSP 2003).
"""

from enum import IntEnum
from typing import Final

CALL_VECTOR: Final = 0x82
SYSTEM_CALL_VECTOR: Final = 0x80  # which programs may raise
TIMER_VECTOR: Final = 0x20  # of the event that the timer is

MOST_UPDATES: Final = 2048
"""Changes of page tables in one call: 8 MBytes of addresses."""
MOST_FRAMES: Final = 4096
MOST_TEXT: Final = 4096


class Call(IntEnum):
    """Their numbers."""

    START = 0  # entry for events, gpa of the shared page, features in use
    RETURN = 1  # from an event: its frame lies on the stack; to a program: with what is queued
    UPDATE = 2  # changes of page tables: address of the list, how many
    FRAMES = 3  # which host frames are behind guest frames: buffer, first, how many
    SET_IF = 4  # without VIRTUAL_IF: interrupts on or off
    LOOK = 5  # interrupts are on again, and one waits
    SET_STACK = 6  # where events from programs begin
    SET_TLS = 7  # the thread pointer of programs
    SET_FPU = 8  # whether its next use is an event
    SET_WATCH = 9  # address, and what of DR7 goes with it
    TIME = 10  # ns since the start, in DX:AX
    TIMER = 11  # an event in so many ns; the last one is done with
    WRITE = 12  # text to the console: address, bytes
    READ = 13  # a byte from it; -1: there is none
    WAIT = 14  # for an event, with interrupts on
    OFF = 15  # end of the machine


class Change(IntEnum):
    """Kinds of changes of page tables, in the low bits of an item's first word."""

    ENTRY = 0  # hpa of an entry; its new value
    INVALIDATE = 1  # drop what the processor knows of the page at this linear address
    PIN = 2  # hpa of a root: check it, keep it
    UNPIN = 3
    LOAD = 4  # hpa of a root: translate by it


class Feature(IntEnum):
    """Bits of START's third argument."""

    VIRTUAL_IF = 1


class Error(IntEnum):
    """Results of calls that are none."""

    INVALID = -22
    FAULT = -14
    UNKNOWN = -38


class Shared(IntEnum):
    """Offsets in the page that both write."""

    IF_ON = 0  # 32 bits: whether interrupts are on (VIRTUAL_IF)
    PENDING = 4  # 32 bits: bit 0: an event waits
    FAULT = 8  # CR2 of the last page fault
    TSC_OFFSET = 16  # ns since the start = TSC + this
    CHANGED = 24  # 32 bits: which of the rest is to be looked at, by bits of `State`
    FPU_OFF = 28  # 32 bits
    STACK = 32
    TLS = 40
    WATCH = 48  # DR0
    WATCHING = 56  # DR7
    DEBUG = 64  # DR6 of the last debug exception
    QUEUE = 72  # address of changes of page tables that go with the next return to a program
    QUEUED = 80  # how many


class State(IntEnum):
    """What of a program's state has changed."""

    STACK = 1
    TLS = 2
    FPU = 4
    WATCH = 8


KERNEL_CS, KERNEL_SS, USER_CS, USER_SS, TLS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x2B
"""Selectors as the guest sees them: of flat segments, but for TLS in 32-bit programs."""
