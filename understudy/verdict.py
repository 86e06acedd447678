"""What comes of an exit: the guest goes on, or the run stops, and why."""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Verdict(Enum):
    """What an exit leads to, if not a stop."""

    RESUME = 0


RESUME: Final = Verdict.RESUME


@dataclass(frozen=True)
class Stop:
    """Why `VM.go` came back.

    kind: poweroff, reset, triple-fault, debug-exit, budget, until, deadline, wall, stuck, stopped,
    error.
    """

    kind: str
    detail: str = ""
    status: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind
