"""What ends a run from outside the guest: a limit of time, Ctrl-C, a callback that fails, a wish.

Source: none.  Invariants: what was set for one run ends no other; whatever ends a run, the guest
is between two instructions and can go on; a reset of the guest makes no limit void.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from understudy.clock import Clock
from understudy.interruption import interruptible
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop, StopKind

FAILED: Final = Stop(StopKind.STOPPED, "a callback failed")


class Endings:
    """Ends the runs of one VM."""

    def __init__(self, vcpus: Sequence[Vcpu], clock: Clock) -> None:
        self._vcpus, self._clock = vcpus, clock
        self._problem: Exception | None = None
        self._asked: Stop | None = None  # from outside, during this run

    def request(self, stop: Stop) -> None:
        """End the run before the next entry.  On the VM's thread."""
        for vcpu in self._vcpus:
            vcpu.request(stop)

    def limit(self, stop: Stop) -> None:
        """The same from outside the guest: it holds over a reset, too."""
        self._asked = self._asked or stop
        self.request(stop)

    def again(self) -> None:
        """The guest was reset, by which requests are lost: what was asked for still holds."""
        if self._asked is not None:
            self.request(self._asked)

    def interrupt(self, stop: Stop) -> None:
        """From any thread: end the run soon."""
        self.limit(stop)
        for vcpu in self._vcpus:
            vcpu.look_now()

    def fail(self, problem: Exception) -> None:
        """From a callback that has failed: end the run, which raises this."""
        self._problem = self._problem or problem
        self.limit(FAILED)

    @contextmanager
    def within(self, deadline_ns: int | None, wall_seconds: float | None) -> Iterator[None]:
        """For one run: until this guest time, for so many seconds, or until Ctrl-C."""
        self._asked = None
        ours = [FAILED, Stop(StopKind.STOPPED, "interrupted")]
        timer = alarm = None
        if deadline_ns is not None:
            over = Stop(StopKind.DEADLINE, f"guest time {deadline_ns} ns")
            alarm = self._clock.at(deadline_ns, lambda: self.limit(over))
        if wall_seconds is not None:
            ours.append(Stop(StopKind.WALL, f"{wall_seconds} s"))
            timer = threading.Timer(max(wall_seconds, 0), self.interrupt, (ours[-1],))
            timer.daemon = True
            timer.start()
        try:
            with interruptible(lambda: self.interrupt(ours[1])):
                yield
        finally:
            if alarm is not None:
                alarm.cancel()
            if timer is not None:
                timer.cancel()
                timer.join()
            for vcpu in self._vcpus:
                if any(vcpu.requested is stop for stop in ours):
                    vcpu.requested = None
            self.raise_problem()

    def raise_problem(self) -> None:
        """Raise what a callback has failed with, once."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
