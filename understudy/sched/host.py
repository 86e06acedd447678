"""A host whose processors VMs share.

Invariant: its processors are there from the beginning; no VM brings one.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

from understudy.config import check_choice
from understudy.machine.host import Host
from understudy.overcommit.stock import PERIOD_NS, Stock
from understudy.overcommit.terms import Terms
from understudy.sched.house import DEFAULT
from understudy.sched.policy import Policy, PolicyError, Wish, policy_of
from understudy.sched.pool import Pool
from understudy.sched.threads import schedule_of
from understudy.verdict import Stop, StopKind

MOST: Final = 256


class SharedHost(Host):
    """A physical machine of so many processors."""

    def __init__(
        self, pcpus: int = 1, ram: int | str = "4G", *, policy: Wish = "share",
        pools: Mapping[str, Mapping[str, Any]] | None = None,
        engine: str = "dbt", clock: str = "virtual", yields: bool = True,
        overcommit: Terms | None = None,
    ) -> None:  # fmt: skip
        """`pools`: by name, each with `pcpus` and a `policy`; the rest is of the pool "default".

        `yields`: a vCPU that spins lets another of its VM go first, if one waits.
        `overcommit`: how it deals with VMs that have more memory than it.

        ValueError says in one line what was expected.
        """
        if type(pcpus) is not int or not 1 <= pcpus <= MOST:
            raise ValueError(f"pcpus={pcpus!r}: expected 1 to {MOST}")
        check_choice("engine", engine, ("dbt", "reference"))
        check_choice("clock", clock, ("virtual", "wall"))
        first = policy_of(policy)
        asked = {name: _pool(name, what) for name, what in (pools or {}).items()}
        if (total := sum(count for count, _ in asked.values())) > pcpus:
            raise ValueError(f"pools: {total} pCPUs in all, and the host has {pcpus}")
        super().__init__(ram)
        self.engine, self.clock, self.spins_exit = engine, clock, yields
        for _ in range(pcpus):
            self.plug(engine, clock)
        self.schedule = schedule_of(self.processors, first, is_wall=clock == "wall")
        self.stock = self.room = Stock(
            self, overcommit or Terms(), self._begin_chores, is_wall=clock == "wall"
        )
        free = pcpus  # the first ones are left for the pool "default"
        for name, (count, its) in asked.items():
            self.schedule.add_pool(name, its)
            for _ in range(count):
                free -= 1
                self.schedule.move_pcpu(free, name)

    def held(self) -> AbstractContextManager[None]:
        return self.schedule.held()

    def close(self) -> None:
        """Give memory and processors back at once; the VMs on it can only be closed from now on."""
        super().close()
        self.stock.close()

    def _begin_chores(self) -> None:
        self.schedule.every(PERIOD_NS, self.stock.tick)

    # --- pools ---

    @property
    def pools(self) -> dict[str, Pool]:
        """By name."""
        return dict(self.schedule.pools)

    def add_pool(self, name: str, policy: Wish = "share", *, pcpus: Iterable[int] = ()) -> Pool:
        """One more, with these pCPUs, which leave their own.  PolicyError if they cannot."""
        pool = self.schedule.add_pool(name, policy_of(policy))
        for number in pcpus:
            self.schedule.move_pcpu(number, name)
        return pool

    def use_policy(self, policy: Wish, pool: str = DEFAULT) -> None:
        """Another policy for a pool, while its VMs run."""
        self.schedule.use_policy(pool, policy_of(policy))

    def stop(self, reason: str = "asked to") -> None:
        """From any thread: end `run` soon."""
        self.schedule.ask(Stop(StopKind.STOPPED, reason))

    def inspect(self) -> dict[str, object]:
        """What there is and what it costs, for people."""
        schedule = self.schedule
        with schedule.still():
            schedule.settle()
            return super().inspect() | {
                "now": schedule.time.now(),
                "pools": {name: pool.inspect() for name, pool in schedule.pools.items()},
                "pcpus": [pcpu.inspect() for pcpu in schedule.pcpus],
                "vms": {claim.name: claim.inspect() for claim in schedule.claims},
            }


def _pool(name: str, what: Mapping[str, Any]) -> tuple[int, Policy]:
    if unknown := sorted(what.keys() - {"pcpus", "policy"}):
        raise ValueError(f"pool {name!r}: {unknown[0]!r} is no key; expected pcpus or policy")
    count = what.get("pcpus", 0)
    if type(count) is not int or count < 0:
        raise ValueError(f"pool {name!r}: pcpus={count!r}: expected a number of pCPUs")
    try:
        return count, policy_of(what.get("policy", "share"))
    except PolicyError as problem:
        raise PolicyError(f"pool {name!r}: {problem}") from None
