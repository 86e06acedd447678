"""A virtual processor that needs what is being read in: it waits, and others may execute.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Reclamation Mechanisms".
Cost: none for who never misses a page; one timer of the board for who does.
In virtual time a page is there at once, and has a price; in real time it is looked for again when
the wait is over.
Invariants: virtual time, in ns, follows from what was missed alone; nothing but the page ends the
wait, also of one that has interrupts pending.
"""

from dataclasses import dataclass
from typing import Protocol

from understudy.clock import Alarm, Clock
from understudy.state import U62, Part
from understudy.vcpu.activity import Activity, VcpuState


class Waiter(Protocol):
    """Whose wait it is."""

    state: VcpuState


@dataclass
class PageWaitState:
    """What a snapshot keeps."""

    at: U62 = 0  # ns of guest time: when it has its page; 0: it waits for none


class PageWait(Part):
    """Of one vCPU."""

    state: PageWaitState

    def __init__(self, waiter: Waiter, clock: Clock) -> None:
        self._waiter, self._clock = waiter, clock
        self.state, self._alarm = PageWaitState(), Alarm(clock, self._came)

    def wait(self, ns: int) -> bool:
        """It executes nothing before one more page was read, which takes so long.

        False: it does not execute anyway.
        """
        own, now = self._waiter.state, self._clock.now()
        if own.activity not in (Activity.ACTIVE, Activity.WAIT_FOR_PAGE):
            return False
        begin = self.state.at if own.activity is Activity.WAIT_FOR_PAGE else now
        own.activity, self.state.at = Activity.WAIT_FOR_PAGE, begin + ns
        self._alarm.set(self.state.at)  # which has it look around before it goes on
        return True

    def give_up(self) -> int:
        """It goes on without the page: when it would have had it, in ns of guest time."""
        at, self.state.at = self.state.at, 0
        self._waiter.state.activity = Activity.ACTIVE
        self._alarm.set(None)
        return at

    def _came(self) -> None:
        self.state.at = 0
        if self._waiter.state.activity is Activity.WAIT_FOR_PAGE:
            self._waiter.state.activity = Activity.ACTIVE

    def load(self, saved: dict[str, object]) -> None:
        super().load(saved)
        self._alarm.set(self.state.at or None)
