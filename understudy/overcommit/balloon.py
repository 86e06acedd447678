"""How a balloon is brought to the size that the host wants, and what its guest makes of that.

    steering = Steering(vm.clock, vm.pc.part("virtio_balloon", Balloon))
    steering.goal = 20_000                  # pages
    vm.go(...)
    steering.standing, steering.why         # Standing.OBEYS, "…"

Each second of guest time the target goes a step towards the goal, never further than `rate` pages
from where the driver is, so that the guest is not flooded, and the statistics are asked for.

What the driver says is compared with what the host has: a guest obeys, has no driver, refuses
(nothing has moved for `PATIENCE` steps, or it takes pages out by itself), or lies (it says that
pages are in the balloon which the host has not got, or uses some that are in it).  One that does
not obey has to give by swapping; it harms only itself.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Ballooning": the driver
polls for a target each second, and is limited in its rate.
Invariant: guest time alone decides, so a run in virtual time is the same each time.
"""

from collections.abc import Callable
from enum import Enum
from typing import Final

from understudy.clock import NS_PER_SECOND, Alarm, Clock
from understudy.devices.virtio.balloon import Balloon

RATE: Final = 4096  # pages a step: 16 MBytes
PATIENCE: Final = 5  # steps
UNTOLD: Final = 1024  # pages that a driver may have moved, and not yet told of
"""Linux takes 256 pages out, and tells of them afterwards."""


class Standing(Enum):
    """What a guest makes of what it is asked for."""

    NO_DRIVER = "has no driver"
    OBEYS = "obeys"
    REFUSES = "refuses"
    LIES = "lies"


class Steering:
    """Moves one balloon to its goal.  From the VM's thread only."""

    def __init__(
        self, clock: Clock, balloon: Balloon, *, rate: int = RATE, every: int = NS_PER_SECOND
    ) -> None:
        """`rate`: pages a step; `every`: ns of guest time."""
        if rate < 1 or every < 1:
            raise ValueError(f"{rate} pages each {every} ns: expected at least one of each")
        self.clock, self.balloon, self.rate, self.every = clock, balloon, rate, every
        self.goal = balloon.target
        """Pages that are to be in the balloon at last."""
        self.standing, self.why = Standing.NO_DRIVER, "it has not been asked yet"
        self.on_change: list[Callable[[Standing, str], None]] = []
        self.steps = 0
        self._stuck = self._unmatched = 0  # steps in a row
        self._actual = balloon.actual
        self._broken = balloon.pages.counts().get("broken", 0)
        self._alarm = Alarm(clock, self._due)
        self._alarm.set(clock.now() + every)

    def close(self) -> None:
        """The balloon stays as it is."""
        self._alarm.set(None)

    @property
    def given(self) -> int:
        """Pages in the balloon that the host really has."""
        return self.balloon.pages.counts().get("ballooned", 0)

    def _due(self) -> None:
        self._alarm.set(self.clock.now() + self.every)
        self.step()

    def step(self) -> None:
        """A step towards the goal, and a look at what came of the last one."""
        self.steps += 1
        self._judge()
        actual = self.balloon.actual
        self.balloon.target = min(max(self.goal, actual - self.rate, 0), actual + self.rate)
        self.balloon.ask()

    def _judge(self) -> None:
        balloon = self.balloon
        actual, target, told = balloon.actual, balloon.target, balloon.pages.counts()
        given, broken = told.get("ballooned", 0), told.get("broken", 0)
        used, self._broken = broken - self._broken, broken
        self._unmatched = self._unmatched + 1 if actual > given + UNTOLD else 0
        is_slow = actual < target and actual <= self._actual
        self._stuck = self._stuck + 1 if is_slow else 0
        before, self._actual = self._actual, actual
        if not balloon.is_live:
            self._is(Standing.NO_DRIVER, "no driver has set the balloon up")
        elif used > 0:
            self._is(Standing.LIES, f"it has used {used} pages that are in the balloon")
        elif self._unmatched > 1:
            words = f"it says that {actual} pages are in the balloon, and the host has {given}"
            self._is(Standing.LIES, words)
        elif self._stuck >= PATIENCE:
            words = f"of {target} pages {actual} are in the balloon, and no more since {PATIENCE} s"
            self._is(Standing.REFUSES, words)
        elif actual < min(before, target):
            self._is(Standing.REFUSES, f"it has taken {before - actual} pages out by itself")
        elif not (is_slow or self._unmatched) or self.standing is Standing.NO_DRIVER:
            self._is(Standing.OBEYS, f"{actual} of {target} pages are in the balloon")

    def _is(self, standing: Standing, why: str) -> None:
        was, self.standing, self.why = self.standing, standing, why
        if was is not standing:
            for listener in self.on_change:
                listener(standing, why)
