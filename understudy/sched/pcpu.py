"""A physical processor, and the pool that it belongs to.

Invariant: all that a thread of its own would touch while vCPUs run on it is in the one object.
"""

from collections import Counter
from typing import Any

from understudy.bell import Bell
from understudy.sched.seat import Seat
from understudy.silicon import Processor


class Pcpu:
    """One processor of a host."""

    def __init__(self, number: int, processor: Processor) -> None:
        self.number, self.processor = number, processor
        self.pool = ""  # its pool's name
        self.seat: Seat | None = None  # who runs on it now
        self.inside: Seat | None = None  # who executes here, in this pCPU's thread, if it has one
        self.end = 0  # when the turn that began there is over, in its thread; 0: none has begun
        self.bell = Bell()  # wakes the thread
        self.there: Seat | None = None  # whose registers it has
        self.reason = "idle"  # why the last one left
        self.preempted = False  # the one that runs is to give way at the next boundary
        self.running_ns = 0
        self.switches: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"pCPU {self.number}"

    def inspect(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "pool": self.pool,
            "running": None if self.seat is None else repr(self.seat),
            "running_ns": self.running_ns,
            "switches": dict(sorted(self.switches.items())),
            "instructions": self.processor.retired,
        }
