"""How much of its memory a VM uses: an estimate from a few pages, without the guest's help.

In each period some pages, chosen at random, are made inaccessible; whoever needs one gets it back
at once, and is counted.  The part of them that was needed is the part of memory that is active.

    sampler = WorkingSet(vm.memory)
    sampler.every(vm.clock, 30 * NS_PER_SECOND)
    vm.go(...)
    sampler.active          # pages

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Measuring Idle Memory": 100
pages each 30 s; a slow and a fast moving average, and the fast one with what the current period
has seen so far; the greatest of them counts.  The paper has no gains; those here are ours.

Devices and the hypervisor need pages for the guest, so they are counted, too; a snapshot needs all
of them, and makes the period in which it is taken look busy.

Invariants: a page costs one fault in a period at the most; whoever takes a frame away or puts
another in its place meanwhile finds nothing of the sampler's; a run in virtual time gives the
same estimates each time.
"""

import random
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from understudy.arch.address import PAGE_SHIFT
from understudy.clock import Alarm, Clock
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m, Runs
from understudy.machine.words import PRESENT, PROTECTED, Flag

SAMPLES: Final = 100
MILLION: Final = 1_000_000
PERIODS_KEPT: Final = 128  # for whoever looks; the averages need none of them
SLOW, FAST = 8, 2
"""A moving average goes by 1/SLOW or 1/FAST of the way to what a period has found."""


@dataclass(frozen=True)
class Period:
    """What one has found."""

    samples: int
    touched: int
    pages: int
    """Those of the VM that were there when it began."""

    @property
    def millionths(self) -> int:
        """The part that was needed, in millionths."""
        return MILLION * self.touched // self.samples if self.samples else 0


class WorkingSet:
    """Samples one memory.  Owns `Flag.SAMPLED` in its p2m until it is closed."""

    def __init__(self, memory: GuestMemory, samples: int = SAMPLES, seed: int = 0) -> None:
        if samples < 1:
            raise ValueError(f"{samples} samples: expected at least one")
        self._memory, self._p2m = memory, memory.p2m
        if Flag.SAMPLED in self._p2m.owners:
            raise ValueError("this memory is sampled already: close the other WorkingSet first")
        self.samples = samples
        self._random = random.Random(seed)
        self._away: dict[int, int] = {}  # gfn: pfn of the frame that is kept for it
        self._chosen = self._touched = self._pages = 0
        self.slow = self.fast = 0  # millionths
        self.periods: deque[Period] = deque(maxlen=PERIODS_KEPT)  # the last ones
        self.faults = 0
        self._alarm: Alarm | None = None
        self._p2m.owners[Flag.SAMPLED] = self
        self._p2m.watchers.append(self._changed)

    def close(self) -> None:
        """Every page is accessible again."""
        self._give_back()
        if self._alarm is not None:
            self._alarm.set(None)
        if self._p2m.owners.get(Flag.SAMPLED) is self:
            del self._p2m.owners[Flag.SAMPLED]
            self._p2m.watchers.remove(self._changed)

    # --- periods ---

    def every(self, clock: Clock, ns: int) -> None:
        """A period ends, and the next begins, each so many ns of this clock."""
        if ns < 1:
            raise ValueError(f"a period of {ns} ns: expected at least one")

        def due() -> None:
            self.end()
            self.begin()
            alarm.set(clock.now() + ns)

        if self._alarm is not None:
            self._alarm.set(None)
        self._alarm = alarm = Alarm(clock, due)
        self.begin()
        alarm.set(clock.now() + ns)

    def begin(self) -> None:
        """Choose pages among those that are there, and take them away."""
        self._give_back()
        there = [(gfn, frames) for gfn, word, frames in self._p2m.pieces() if word & PRESENT]
        ends = list(accumulate(frames for _, frames in there))
        self._pages = ends[-1] if ends else 0
        self._chosen, self._touched = min(self.samples, self._pages), 0
        with self._p2m.batch():
            for number in self._random.sample(range(self._pages), self._chosen):
                at = bisect_right(ends, number)
                gfn, frames = there[at]
                gfn += number - (ends[at] - frames)
                self._take(gfn)

    def _take(self, gfn: int) -> None:
        word = self._p2m.word(gfn)
        self._away[gfn] = word >> PAGE_SHIFT
        self._p2m.take(gfn, 1, Flag.SAMPLED | word & PROTECTED)

    def end(self) -> Period:
        """What this period has found; the averages follow."""
        self._give_back()
        found = Period(self._chosen, self._touched, self._pages)
        self._chosen = 0
        if found.samples:
            if not self.periods:
                self.slow = self.fast = found.millionths
            self.slow += (found.millionths - self.slow) // SLOW
            self.fast += (found.millionths - self.fast) // FAST
            self.periods.append(found)
        return found

    # --- what it says ---

    @property
    def current(self) -> int:
        """The fast average with what this period has seen so far, in millionths."""
        now = Period(self._chosen, self._touched, self._pages).millionths
        return self.fast + max(now - self.fast, 0) // FAST

    @property
    def millionths(self) -> int:
        """The part of the VM's memory that is active: the greatest of the three."""
        return max(self.slow, self.fast, self.current)

    @property
    def active(self) -> int:
        """Pages that are active, of those that the VM had when the period began."""
        return -(-self._pages * self.millionths // MILLION)

    def kept(self, gfn: int) -> int:
        """The pfn of the frame that is kept for a guest frame which was taken away."""
        return self._away[gfn]

    def _give_back(self) -> None:
        away, self._away = self._away, {}
        with self._p2m.batch():
            for gfn, pfn in away.items():
                self._return(gfn, pfn)

    def _return(self, gfn: int, pfn: int) -> None:
        """A page is there again; whoever has protected it, or does not any more, has his way."""
        self._p2m.map(gfn, pfn, 1, self._p2m.word(gfn) & PROTECTED)

    # --- owner of frames ---

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Somebody needs a page: it is as it was."""
        self._return(gfn, self._away.pop(gfn))
        self._touched += 1
        self.faults += 1

    def write(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever protected."""
        raise GuestMemoryError(f"guest frame {gfn:#x} is protected, but not by the sampler")

    def _changed(self, runs: Runs) -> None:
        """Another frame, or none, was put where one is kept: nobody wants that any more."""
        if not self._away:
            return
        for gfn in [gfn for gfn in self._away if not self._p2m.word(gfn) & Flag.SAMPLED]:
            self._memory.host.release(self._away.pop(gfn))
