"""What a processor is doing, and what for: executing or waiting, and when it shall come back.

Source: SDM 3C, "Guest Non-Register State", activity state, whose numbers these are, but for that of
`WAIT_FOR_PAGE`, of which no guest knows; "shutdown" ends a VM, so no vCPU is ever in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from understudy.silicon import Exit


class Activity(IntEnum):
    """A vCPU's activity; 0 means that it executes."""

    ACTIVE = 0
    HLT = 1  # until an interrupt, an NMI or INIT
    WAIT_FOR_SIPI = 3  # until a start-up message
    WAIT_FOR_PAGE = 4  # until what the host has written out is read in

    @classmethod
    def first(cls, is_bootstrap: bool) -> "Activity":
        """After power-on all processors but the first wait for it to start them."""
        return cls.ACTIVE if is_bootstrap else cls.WAIT_FOR_SIPI


class Entry(Protocol):
    """A way into the guest: its `Guest` itself, or a door before it."""

    @property
    def is_in(self) -> bool:
        """It may be inside: who wants something of it has to kick it."""

    def run(self, budget: int) -> Exit:
        """As `Guest.run`."""

    @property
    def retired(self) -> int:
        """As `Guest.retired`, or as of when it went in."""

    @property
    def resume(self) -> Callable[[int], Exit]:
        """As `Guest.resume`."""


@dataclass
class Goal:
    """When `Vcpu.run` shall come back, if the guest does not end before."""

    end: int | None = None  # instructions retired
    until: Callable[[], bool] | None = None


@dataclass
class VcpuState:
    """What a snapshot keeps of a vCPU, beside what its parts keep."""

    activity: Activity = Activity.ACTIVE
    attention: bool = True  # the run loop must look around before it enters
    armed: int = 0  # the deadline that the guest's timer holds
    carried_out: int = 0  # instructions that only exit because of the paging technique
