"""A virtual processor's time: what is due, the timer that brings it back, and sleep.

The guest's TSC is the processor's.  The next deadline of devices and APIC timer is put into the
technique's timer (`Guest.arm`), and only when it changes; with the virtual clock the timer keeps
its count over exits; with the wall clock each entry starts it with what it was told last, so that
is told anew whenever it is older than `LAG_NS`.

Time that no instruction counts (a bus cycle, an instruction carried out by the hypervisor) is a
debt, which is paid once on the way into the guest.

Invariants: nothing fires before the timer could say so; two runs in virtual time see the same
times at the same instructions.
"""

from collections.abc import Callable
from time import monotonic_ns
from typing import Final

from understudy.bell import Bell
from understudy.clock import Clock, Timer
from understudy.guest import Guest
from understudy.silicon import LocalApic

NEVER: Final = (1 << 64) - 1
FAR: Final = 1 << 61  # ns of guest time, seven decades: nothing is waited for so long
LAG_NS: Final = 20_000  # that a deadline may be late by, with the wall clock
LONGEST: Final = (1 << 32) - 1  # that the guest's timer can be told, in its units


class GuestClock(Clock):
    """Guest time of a whole VM: the TSC of the processor that runs it, plus an offset.

    `changed` holds what wants to hear that a deadline may have moved: each vCPU's `look`.
    """

    def __init__(self, source: Callable[[], int]) -> None:
        super().__init__()
        self.source, self.offset = source, 0
        self.changed: list[Callable[[], None]] = []

    def now(self) -> int:
        return self.source() + self.offset & NEVER  # a TSC has 64 bits

    def _push(self, ns: int, sequence: int, callback: Callable[[], None]) -> Timer:
        for listener in self.changed:
            listener()
        return super()._push(ns, sequence, callback)


def passing(news: Bell, seconds: float | None, left: int) -> int:
    """Wait for news, so long at most: how many ns have passed of `left`, all if none came."""
    began = monotonic_ns()
    return min(monotonic_ns() - began, left) if news.wait(seconds) else left


class Deadlines:
    """What one vCPU waits for: the board's timers and its own APIC's."""

    def __init__(self, guest: Guest, clock: GuestClock, apic: LocalApic, *, is_wall: bool) -> None:
        self.guest, self.clock, self.apic, self.is_wall = guest, clock, apic, is_wall
        self.board: Clock = clock  # whose timers it sees to: with others, one of them does
        self.shift = guest.timer_shift
        self.armed = 0  # the deadline that the guest's timer holds
        self.is_linked = False  # something may come from others, at any time
        self.debt = 0  # ticks that have passed, and that the processor has not been told
        self.limit = NEVER  # when the processor's turn is over
        self.stale = 0  # when the timer of the wall clock lags too much, by `monotonic_ns`
        self.wake = Bell()
        self._up = (1 << self.shift) - 1
        self.moved()

    def moved(self) -> None:
        """The vCPU is on another processor, whose timer is not set."""
        guest = self.guest
        self._advance, self._arm, self._tsc = guest.advance, guest.arm, guest.read_tsc
        self.armed = 0

    def due(self) -> int:
        """When something is due, in ns of guest time; `NEVER` if nothing is before `FAR`."""
        device, apic = self.board.next_deadline(), self.apic.deadline()
        due = apic if device is None or apic < device else device
        return due if due < FAR else NEVER

    def next(self) -> int:
        """When to come back at the latest: something is due, or the turn is over."""
        due = self.due()
        return due if due < self.limit else self.limit

    def fire(self) -> None:
        """Let happen what is due.

        Not before the guest's timer could say so: a kick, which comes at any time, must not make
        anything happen earlier than it would without.
        """
        if self.is_due:
            self.board.run_due()
            now = self.clock.now()
            if self.apic.deadline() <= now:
                self.apic.tick(now)

    @property
    def is_due(self) -> bool:
        """Whether something is, as the guest's timer counts."""
        return self.due() <= self.clock.now() >> self.shift << self.shift

    @property
    def is_over(self) -> bool:
        """Whether the turn is."""
        return self.limit != NEVER and self.limit <= self.clock.now()

    def arm(self) -> None:
        """Put the next deadline into the guest's timer, if it does not hold it already."""
        deadline = self.next()
        if deadline != self.armed:
            self.armed = deadline
            self.rearm()

    def rearm(self) -> None:
        """Tell the guest's timer how far the deadline is.

        It counts changes of bit `shift` of the TSC: round so as never to be early.
        """
        shift, now = self.shift, self._tsc() + self.clock.offset & NEVER
        ticks = (self.armed + self._up >> shift) - (now >> shift)
        self._arm(LONGEST if ticks > LONGEST else ticks if ticks > 0 else 0)
        if self.is_wall:
            self.stale = monotonic_ns() + LAG_NS

    def pay(self) -> None:
        """Let the time pass that is owed; the timer did not see it."""
        debt, self.debt = self.debt, 0
        if self.is_wall:
            return
        now, shift = self._advance(debt) + self.clock.offset, self.shift
        ticks = (self.armed + self._up >> shift) - (now >> shift)  # `rearm`, written out
        self._arm(LONGEST if ticks > LONGEST else ticks if ticks > 0 else 0)

    def idle(self, has_news: Callable[[], bool]) -> bool:
        """One step of idle time.  False if nothing is armed that could end it.

        `has_news`: whether another thread wants something (with the wall clock).
        """
        deadline = self.next()
        if self.is_wall:
            self.wake.clear()
            if not has_news():
                left = deadline - self.clock.now()
                self.wake.wait(None if deadline == NEVER else max(left, 0) / 1e9)
            return True
        if deadline == NEVER and not self.is_linked:
            return False
        left = -(-deadline >> self.shift << self.shift) - self.clock.now()
        if left > 0:
            if self.is_linked:
                left = self._wait(deadline, left, has_news)
            self.guest.advance(min(left, NEVER))
        self.armed = 0  # the guest's timer does not count idle time
        return True

    def _wait(self, deadline: int, left: int, has_news: Callable[[], bool]) -> int:
        """Idle time passes as it does for others: how much until something comes, or all."""
        self.wake.clear()
        if has_news():
            return 0
        return passing(self.wake, None if deadline == NEVER else left / 1e9, left)
