"""A VM's place on a host: processors of its own, or a claim on those that all share.

Source: ours.  Invariant: on a host that VMs share, weight, cap and pool can change at any time
between two runs, or in a callback.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from threading import get_ident
from typing import Any, Concatenate, ParamSpec, TypeVar

from understudy.arch.address import PAGE
from understudy.assembly import overhead_of
from understudy.config import Config
from understudy.devices.virtio.balloon import Balloon
from understudy.machine.ballooned import Ballooned
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.holding import Ways
from understudy.overcommit.plan import PlanError
from understudy.quantities import bytes_of
from understudy.sched import keeping
from understudy.sched.host import SharedHost
from understudy.sched.schedule import Aim, Schedule
from understudy.sched.seat import Claim, portion
from understudy.threads import Threads
from understudy.turns import Turns
from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop

T = TypeVar("T", bound="Tenant")
P = ParamSpec("P")
R = TypeVar("R")


class Shared:
    """On processors that others use as well."""

    def __init__(self, schedule: Schedule, claim: Claim) -> None:
        self.schedule, self.claim = schedule, claim

    def run(self, end: int | None, until: Callable[[], bool] | None) -> Stop:
        """Run the host until as many instructions of this VM have retired in all, or it ends."""
        return self.schedule.run(Aim(self.claim, end, until))

    def resume(self, offset: int, now: int) -> None:
        """The VM was restored from a moment at which its clock said `now`."""
        self.schedule.resume_clock(self.claim.clock, offset, now)
        for seat in self.claim.seats:
            seat.since = self.schedule.time.now()
            self.schedule.poke(seat)

    def held(self) -> AbstractContextManager[None]:
        """Inside, nobody answers an exit of the VM."""
        return self.schedule.held()

    def still(self) -> AbstractContextManager[None]:
        """Inside, nobody executes anything of the VM."""
        return self.schedule.still(self.claim)

    def save(self) -> dict[str, Any]:
        """What a snapshot keeps of the VM's place."""
        return keeping.save(self.schedule, self.claim)

    def load(self, saved: dict[str, Any]) -> None:
        """The VM's clock goes on already."""
        keeping.load(self.schedule, self.claim, saved)

    def counts(self) -> dict[str, Any]:
        """How the time of its vCPUs has passed."""
        self.schedule.settle()
        return {"scheduling": [seat.counts.inspect() for seat in self.claim.seats]}

    def close(self) -> None:
        """The VM is no more."""
        self.schedule.dismiss(self.claim)


def place_of(
    host: Host, config: Config, vcpus: Sequence[Vcpu], clock: GuestClock,
    finish: Callable[[Stop], Stop | None], stolen: Callable[[int, int], None], owner: "Tenant",
) -> Turns | Shared:  # fmt: skip
    """Where a VM's vCPUs run.  `finish`: what comes of its end; None: it goes on.

    `stolen` hears, when a vCPU goes on, how long it has waited for a processor in all.
    """
    if not isinstance(host, SharedHost):
        is_wall = config.clock == "wall"
        if is_wall and len(vcpus) > 1:
            return Threads(vcpus, clock)
        turns = Turns(vcpus, clock, is_wall=is_wall)
        link(turns, config, vcpus)
        return turns
    claim = Claim(config.name, vcpus, clock, finish, owner)
    claim.stolen = stolen
    place = Shared(host.schedule, claim)
    link(place, config, vcpus)
    host.schedule.admit(claim)
    return place


def link(place: Turns | Shared, config: Config, vcpus: Sequence[Vcpu]) -> None:
    """Tell whoever lets time pass whether others can send the VM something."""
    if isinstance(place, Shared):
        place.claim.is_linked, place.claim.has_outside = config.is_linked, config.has_outside
    elif not isinstance(place, Threads):
        for vcpu in vcpus:
            vcpu.time.is_linked = config.is_linked


def hold(
    host: Host, config: Config, memory: GuestMemory, vcpus: Sequence[Vcpu],
    post: Callable[[Callable[[], None]], None], thin: Callable[[], None], given: ExitStack,
) -> Ballooned:  # fmt: skip
    """A new VM is to have memory of this host, until `given` is closed.

    `post` has something done between two exits; `thin`: its page tables go, then.  Returns who
    keeps what it does without.  PlanError if the host cannot keep its promise to it.
    """

    def delay(ns: int) -> bool:
        mine = (vcpu for vcpu in vcpus if vcpu.guest.thread == get_ident())
        return any(vcpu.page.wait(ns) for vcpu in mine)  # an exit of that one is being answered

    def is_idle() -> bool:
        return not any(vcpu.is_running for vcpu in vcpus)

    ballooned, ways = Ballooned(memory), Ways(post, delay, thin, is_idle)
    if isinstance(host, SharedHost):
        least, beside = bytes_of(config.min_memory) // PAGE, overhead_of(config) // PAGE
        holding = host.stock.admit(
            config.name, memory, ballooned, least, config.shares, beside, ways,
            config.sharing_group,
        )  # fmt: skip
        given.callback(host.stock.dismiss, holding)
    return ballooned


def promise(host: Host, memory: GuestMemory, config: Config) -> None:
    """The VM is going to be this one.  PlanError if its host cannot keep its promise to it then."""
    if isinstance(host, SharedHost):
        host.stock.change(memory.p2m, overhead_of(config) // PAGE)


def check(wish: str, host: Host, memory: GuestMemory, config: Config) -> None:
    """PlanError if it cannot be this one, as somebody wishes."""
    if isinstance(host, SharedHost):
        try:
            host.stock.check(memory.p2m, overhead_of(config) // PAGE)
        except PlanError as problem:
            raise PlanError(f"{wish}: {problem}") from None


def equip(
    host: Host, memory: GuestMemory, balloons: Sequence[Balloon], clock: GuestClock
) -> None:  # fmt: skip
    """Its board is there, and may have a balloon."""
    if isinstance(host, SharedHost):
        host.stock.holdings[memory.p2m].equip(balloons, clock)


def still(act: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Do it while nobody executes anything of the VM."""

    @wraps(act)
    def done(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.turns.still():
            return act(self, *args, **kwargs)

    return done


class Tenant:
    """What a VM says of its place."""

    host: Host
    turns: Turns | Shared

    @property
    def claim(self) -> Claim:
        """What it may have of the host's processors.  RuntimeError if it has its own."""
        if not isinstance(self.turns, Shared):
            raise RuntimeError("this VM has processors of its own: make it by Host(pcpus=N).vm")
        return self.turns.claim

    @property
    def weight(self) -> float:
        """Its share, in relation to those of others in its pool."""
        return self.claim.weight

    @weight.setter
    def weight(self, value: float) -> None:
        with self.turns.held():
            self.claim.weight = portion(value, "weight")

    @property
    def cap(self) -> float | None:
        """At most so many pCPUs, even if others idle; 0.5 is half of one."""
        return self.claim.cap

    @cap.setter
    def cap(self, value: float | None) -> None:
        with self.turns.held():
            self.claim.cap = None if value is None else portion(value, "cap")

    @property
    def pool(self) -> str:
        """The name of its pool."""
        return self.claim.pool

    @pool.setter
    def pool(self, name: str) -> None:
        assert isinstance(self.turns, Shared)
        self.turns.schedule.move_claim(self.claim, name)

    @property
    def ended(self) -> Stop | None:
        """Why it takes no part in runs of its host any more."""
        return self.claim.ended
