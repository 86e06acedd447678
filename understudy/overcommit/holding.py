"""What one VM has of its host's memory, and what is known of it.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".
Invariant: nothing here decides; all numbers are pages.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from understudy.arch.address import PAGE
from understudy.clock import Clock
from understudy.devices.virtio.balloon import Balloon
from understudy.machine.ballooned import Ballooned
from understudy.machine.memory import GuestMemory
from understudy.machine.words import Flag
from understudy.overcommit.balloon import Standing, Steering
from understudy.overcommit.plan import Need, PlanError
from understudy.overcommit.working_set import WorkingSet

SPARED: Final = 8  # a guest keeps 1/SPARED of its memory available, whatever its balloon gives


class Ways(NamedTuple):
    """What can be asked of a VM."""

    post: Callable[[Callable[[], None]], None]
    """Have something done between two of its exits."""
    delay: Callable[[int], bool]
    """Whoever of it misses a page waits so many ns for it.  False: it is no vCPU, or is off."""
    thin: Callable[[], None]
    """Between two exits: page tables go that can be made again, and with them what they protect."""
    is_idle: Callable[[], bool]
    """Whether no exit of its is being answered."""


class Holding:
    """One VM's."""

    def __init__(
        self, name: str, memory: GuestMemory, ballooned: Ballooned, minimum: int, shares: int,
        overhead: int, ways: Ways, group: str,
    ) -> None:  # fmt: skip
        """`overhead`: what it needs beside.  `group`: with whom it may have frames in common.

        PlanError if that cannot be a VM's.
        """
        self.name, self.memory, self.p2m = name, memory, memory.p2m
        self.ballooned, self.ways = ballooned, ways
        self.maximum, self.minimum, self.shares = memory.pages, minimum, shares
        self.overhead, self.group = overhead, group
        self._balloon: tuple[Balloon, Clock] | None = None
        self.sampler: WorkingSet | None = None
        self.steering: Steering | None = None
        self.target = self.maximum
        self.swapped: Callable[[], int] = lambda: 0
        self.swapped_in: Callable[[], int] = lambda: 0
        """Pages that are out now, and that have come back, ever."""
        self.why = "it has all its memory"
        self._is_to_thin = False
        self.need()

    def need(self) -> Need:
        """What it may have, and what it does with it."""
        active = self.sampler.active if self.sampler is not None else 0
        return Need(self.name, self.minimum, self.maximum, self.shares, active, self.overhead)

    @property
    def has(self) -> int:
        """Guest frames that are there."""
        return self.maximum - self.p2m.absent

    @property
    def obeys(self) -> bool:
        """Whether its balloon does what it is asked for."""
        return self.steering is not None and self.steering.standing is Standing.OBEYS

    def equip(self, balloons: Sequence[Balloon], clock: Clock) -> None:
        """It may have a balloon."""
        self._balloon = (balloons[0], clock) if balloons else None
        if self.sampler is not None:
            self._steer()

    def begin(self) -> None:
        """Its host has less memory than its VMs."""
        self.memory.is_lazy, self.memory.is_idle = True, self.ways.is_idle
        self.sampler = WorkingSet(self.memory)
        self._steer()

    def _steer(self) -> None:
        if self.steering is not None:
            self.steering.close()
        if self._balloon is not None:
            balloon, clock = self._balloon
            self.steering = Steering(clock, balloon)

    def give(self, pages: int) -> None:
        """Its balloon is to take so many more pages, or (less than 0) to give them back.

        No more than the guest says that it can do without, but for a part for its next programs;
        and nothing comes back because it says that it has less than that.
        """
        assert self.steering is not None
        given, told = self.steering.given, self.steering.balloon.statistics
        room = self.maximum - self.minimum - given
        if (available := told.get("available_memory")) is not None:
            room = min(room, available // PAGE - self.maximum // SPARED)
        self.steering.goal = max(given + min(pages, max(room, 0)), 0)

    def thin(self) -> None:
        """Its page tables are to go before it goes on."""
        if not self._is_to_thin:
            self._is_to_thin = True
            self.ways.post(self._thin)

    def _thin(self) -> None:
        self._is_to_thin = False
        self.ways.thin()

    def check_sampled(self) -> None:
        """PlanError if somebody else samples its memory."""
        if Flag.SAMPLED in self.p2m.owners:
            raise PlanError(
                f"{self.name}: its memory is sampled already, and the host samples it when there "
                "is more than it has: close that WorkingSet first"
            )

    def reason(self, gives: int, means: str) -> str:
        """Why it has no more than it has, and what it must give, in words."""
        out = self.swapped()
        words = f"{out} of its pages are swapped out" if out else "none of its pages is swapped out"
        if gives:
            means = "its balloon" if means == "balloon" else "swapping"
            words += f"; it has {gives} more than its share, and gives them by {means}"
        if self.steering is not None and not self.obeys:
            words += f"; its guest {self.steering.standing.value}: {self.steering.why}"
        return words

    def told(self) -> dict[str, int | str]:
        """What can be said of it at any time, at no cost."""
        active = self.sampler.active if self.sampler is not None else self.maximum
        return {
            "has": self.has, "target": self.target, "active": active, "swapped": self.swapped(),
            "swapped_in": self.swapped_in(), "why": self.why,
        }  # fmt: skip

    def close(self) -> None:
        """The VM is no more, or its memory is its own again."""
        if self.sampler is not None:
            self.sampler.close()
        if self.steering is not None:
            self.steering.close()
        self.sampler = self.steering = None
