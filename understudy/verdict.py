"""What comes of an exit: the guest goes on, or the run stops, and why."""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final


class Verdict(Enum):
    """What an exit, or a look around, leads to, if not a stop."""

    RESUME = 0
    ASLEEP = 1  # this processor has nothing to do until something comes
    OVER = 2  # its turn is over
    YIELDS = 3  # it waits in a loop, perhaps for one that does not run


RESUME: Final = Verdict.RESUME
ASLEEP: Final = Verdict.ASLEEP
OVER: Final = Verdict.OVER
YIELDS: Final = Verdict.YIELDS


class StopKind(StrEnum):
    """Why a run came back."""

    POWEROFF = "poweroff"  # the guest switched itself off
    RESET = "reset"  # it asked for a reset
    TRIPLE_FAULT = "triple-fault"  # it could not deliver an exception
    DEBUG_EXIT = "debug-exit"  # it wrote to the debug-exit port; `status` says what
    STUCK = "stuck"  # it halted, and nothing can wake it
    DISK = "disk"  # the computer cannot read or write a disk's image, and is not to go on
    ERROR = "error"  # the hypervisor cannot go on with it
    BUDGET = "budget"  # as many instructions as were asked for have retired
    UNTIL = "until"  # what was waited for is there
    DEADLINE = "deadline"  # a limit of guest time
    WALL = "wall"  # a limit of wall time: the end of a slice, after which the guest may go on
    STOPPED = "stopped"  # somebody asked for it, `VM.stop` or the control socket


PASSING: Final = frozenset({StopKind.UNTIL, StopKind.BUDGET})
"""What ends a run and means nothing to the next."""
UNEXPECTED: Final = frozenset({StopKind.ERROR, StopKind.STUCK, StopKind.TRIPLE_FAULT})
"""With these the guest's state is told."""


@dataclass(frozen=True)
class Stop:
    """Why `VM.go` came back."""

    kind: StopKind
    detail: str = ""
    status: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else str(self.kind)
