"""Whose turn it is: a VM's processors advance one after the other, on one thread.

In virtual time each has turns of the same length, in ns of guest time, whether it has something to
do or not, so whose turn it is follows from the time alone.  All time-stamp counters read the same
time, which never goes back from one processor to the next: a machine of N processors each of
which executes 1/N of an instruction in a ns.  Where all wait, time jumps to what comes next.

In real time a turn goes to the next that has something to do, and is longer: an exit takes time
there, and a turn must be many of them.

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: one processor is always on for ever, with no turns; two runs in virtual time give the
same turns; a limit of one run changes no turn of the next.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from understudy.silicon import hold_signals
from understudy.vcpu.activity import Goal
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import NEVER, GuestClock
from understudy.verdict import ASLEEP, Stop, StopKind

TURN_NS: Final = 50_000
WALL_TURN_NS: Final = 200_000  # much more, and processors wait for answers to their interrupts
GRAIN: Final = 1 << 12
"""A clock's offset is a multiple of this, so that timers tick with the processors' TSC."""


class Turns:
    """Runs the vCPUs of one VM."""

    def __init__(self, vcpus: Sequence[Vcpu], clock: GuestClock, *, is_wall: bool) -> None:
        self.vcpus, self.clock, self.is_wall = vcpus, clock, is_wall
        self._last = 0  # the number of the processor that ran last, in real time

    def run(self, end: int | None, until: Callable[[], bool] | None) -> Stop:
        """Until as many instructions have retired in all, `until` says so, or the VM ends."""
        hold_signals()
        while True:
            vcpu, limit = self._next()
            if len(self.vcpus) > 1 and vcpu.is_idle:
                stop = self._wait(vcpu, limit)
            else:
                left = None if end is None else end - sum(one.retired for one in self.vcpus)
                vcpu.time.limit = limit
                found = vcpu.run(Goal(None if left is None else vcpu.retired + left, until))
                if isinstance(found, Stop):
                    self._told(found)
                    return found
                stop = self._wait(vcpu, limit) if found is ASLEEP else None
            if stop is not None:
                return stop

    def _told(self, stop: Stop) -> None:
        """Who asks for a stop asks every processor; that one has heard of it is enough."""
        for vcpu in self.vcpus:
            if vcpu.requested is stop:
                vcpu.requested = None

    def _next(self) -> tuple[Vcpu, int]:
        """Who goes on, and when its turn is over."""
        vcpus, count = self.vcpus, len(self.vcpus)
        if count == 1:
            return vcpus[0], NEVER
        now = self.clock.now()
        if self.is_wall:
            order = [(self._last + n) % count for n in range(1, count + 1)]
            self._last = next((n for n in order if not vcpus[n].is_idle), self._last)
            return vcpus[self._last], now + WALL_TURN_NS
        turn = now // TURN_NS
        vcpu = vcpus[turn % count]
        self._bring_up(vcpu, now)
        return vcpu, (turn + 1) * TURN_NS

    def _bring_up(self, vcpu: Vcpu, now: int) -> None:
        """Its time-stamp counter stood while others had their turns."""
        late = now - (vcpu.guest.read_tsc() + self.clock.offset)
        if late > 0:
            vcpu.guest.advance(late)
            vcpu.time.armed = 0  # the guest's timer did not see it
            vcpu.look()
        self.clock.source = vcpu.guest.read_tsc

    def resume(self, offset: int, now: int) -> None:
        """The VM was restored from a moment at which its clock said `now`.

        The processor that is furthest was the last.  If it comes from elsewhere, or runs in real
        time, its counter does not say `now`.
        """
        clock = self.clock
        clock.source = max((one.guest.read_tsc for one in self.vcpus), key=lambda read: read())
        if not self.is_wall and clock.now() != now:
            self.vcpus[0].guest.advance((now - clock.source()) % GRAIN or GRAIN)
            clock.source = self.vcpus[0].guest.read_tsc
        clock.offset = now - clock.source()

    def held(self) -> AbstractContextManager[None]:
        """Inside, nobody answers an exit of the VM."""
        return nullcontext()

    def still(self) -> AbstractContextManager[None]:
        """Inside, nobody executes anything of the VM."""
        return nullcontext()

    def save(self) -> dict[str, Any]:
        """Whose turn it is follows from the time."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Nor does it matter here where the VM was."""

    def counts(self) -> dict[str, Any]:
        """Nothing is shared."""
        return {}

    def close(self) -> None:
        """The VM is no more."""

    def _wait(self, vcpu: Vcpu, limit: int) -> Stop | None:
        """One step of the time in which this one waits: to what is due next, or another's turn."""
        if all(one.is_idle for one in self.vcpus if one is not vcpu):
            if all(one.is_off for one in self.vcpus):
                return Stop(StopKind.STUCK, "halted with RFLAGS.IF=0")
            limit = min((one.time.due() for one in self.vcpus if one is not vcpu), default=NEVER)
        vcpu.time.limit = limit
        if not vcpu.time.idle(lambda: bool(vcpu.posts) or vcpu.requested is not None):
            return Stop(StopKind.STUCK, "halted, and no timer is armed")
        vcpu.look()
        return None
