"""Guest time, and the things that wait for it.

Time is counted in nanoseconds since the machine's power-on, which are the ticks of its 1-GHz
TSC.  A clock never advances by itself: `now` is a reading, and callbacks fire only inside
`run_due`, which the run loop calls between two stretches of guest code.

Invariants: callbacks fire in the order (time, order of arming), each at most once; a callback
sees `now() >= when`, but for those that may be hurried: what is put off so that more of the same
may come, and done at once when a processor has nothing else to do.  Timers that a callback arms
wait for the next `run_due` if they lie after the time at which this one began, so a guest that asks
for very short periods cannot keep the VMM in the loop.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

NS_PER_SECOND = 1_000_000_000


class Timer:
    """One callback that waits for its time.  Made by `Clock.at`."""

    __slots__ = ("callback", "sequence", "when")

    def __init__(self, when: int, sequence: int, callback: Callable[[], None]) -> None:
        self.when, self.sequence = when, sequence
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never fire.  Harmless after it has fired."""
        self.callback = None

    @property
    def is_armed(self) -> bool:
        return self.callback is not None

    def __lt__(self, other: "Timer") -> bool:
        return (self.when, self.sequence) < (other.when, other.sequence)


class Clock(ABC):
    """A source of guest time with a queue of timers."""

    def __init__(self) -> None:
        self._queue: list[Timer] = []
        self._sequence = 0
        self._limit = 64  # queue length at which canceled timers are swept out
        self._eager: list[Timer] = []  # that may be hurried

    @abstractmethod
    def now(self) -> int:
        """Nanoseconds of guest time since power-on."""

    def at(self, ns: int, callback: Callable[[], None]) -> Timer:
        """Call back in the first `run_due` at or after `ns`."""
        return self._push(ns, self._sequence, callback)

    def resume(self, saved: Sequence[int], callback: Callable[[], None]) -> Timer:
        """Arm a timer of a snapshot again, (when, sequence), in its old place in the queue."""
        when, sequence = saved
        return self._push(when, sequence, callback)

    def _push(self, when: int, sequence: int, callback: Callable[[], None]) -> Timer:
        timer = Timer(when, sequence, callback)
        self._sequence = max(self._sequence, sequence + 1)
        queue = self._queue
        if len(queue) >= self._limit:
            queue[:] = [t for t in queue if t.callback is not None]
            heapq.heapify(queue)
            self._limit = max(64, 2 * len(queue))
        heapq.heappush(queue, timer)
        return timer

    def next_deadline(self) -> int | None:
        """When the next timer is due, or None."""
        queue = self._queue
        while queue and queue[0].callback is None:
            heapq.heappop(queue)
        return queue[0].when if queue else None

    def let_hurry(self, timer: Timer) -> None:
        """It need not wait until it is due if nobody has anything else to do."""
        self._eager = [*(other for other in self._eager if other.is_armed), timer]

    def hurry(self) -> None:
        """A processor waits: fire at once what may be hurried."""
        eager, self._eager = self._eager, []
        for timer in sorted(eager):
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def run_due(self) -> int:
        """Fire what is due now; returns how many callbacks were called."""
        queue = self._queue
        if not queue:
            return 0
        now = self.now()
        fired = 0
        while queue and queue[0].when <= now:
            timer = heapq.heappop(queue)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                fired += 1
                callback()
        return fired


class ManualClock(Clock):
    """A clock that tests set by hand."""

    def __init__(self, ns: int = 0) -> None:
        super().__init__()
        self.ns = ns

    def now(self) -> int:
        return self.ns

    def advance(self, ns: int) -> None:
        """Let time pass, stopping at every deadline on the way."""
        end = self.ns + ns
        while (deadline := self.next_deadline()) is not None and deadline <= end:
            self.ns = max(self.ns, deadline)
            self.run_due()
        self.ns = end


class SourceClock(Clock):
    """A clock that reads its time elsewhere, e.g. in a processor's TSC."""

    def __init__(self, source: Callable[[], int]) -> None:
        super().__init__()
        self.source = source

    def now(self) -> int:
        return self.source()


class Alarm:
    """A timer that its owner sets, moves and clears, and that a snapshot can keep.

    The callback must set the alarm later than now, or not at all.
    """

    __slots__ = ("_callback", "_clock", "_hurries", "_timer")

    def __init__(
        self, clock: Clock, callback: Callable[[], None], *, hurries: bool = False
    ) -> None:
        """`hurries`: see `Clock.hurry`."""
        self._clock, self._callback, self._hurries = clock, callback, hurries
        self._timer: Timer | None = None

    @property
    def when(self) -> int | None:
        """The time it is set to, or None."""
        timer = self._timer
        return timer.when if timer is not None and timer.is_armed else None

    def set(self, ns: int | None) -> None:
        """Move it to `ns`; None clears it."""
        timer = self._timer
        if timer is not None and timer.is_armed:
            if timer.when == ns:
                return
            timer.cancel()
        self._timer = None if ns is None else self._armed(self._clock.at(ns, self._callback))

    def save(self) -> list[int] | None:
        """(when, place in the queue), or None if it is clear."""
        timer = self._timer
        if timer is None or not timer.is_armed:
            return None
        return [timer.when, timer.sequence]

    def load(self, saved: Sequence[int] | None) -> None:
        """Be set as it was when saved."""
        self.set(None)
        if saved is not None:
            self._timer = self._armed(self._clock.resume(saved, self._callback))

    def _armed(self, timer: Timer) -> Timer:
        if self._hurries:
            self._clock.let_hurry(timer)
        return timer
