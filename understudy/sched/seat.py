"""VMs and vCPUs as a scheduler sees them: what they may have, where they are, how time has passed.

Source: lecture, "Scheduling: Virtual CPUs"; Linux, Documentation/virt/kvm/x86/msr.rst, for steal
time.  Times are host time, in ns.
Invariants: a seat is in one state at a time, and the times in all of them add up to that since it
came; only `Schedule` changes the state.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from understudy.vcpu.loop import Vcpu
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop

LEAST, MOST = 0.001, 1_000_000
"""Of weights and caps: policies can divide by them, and a snapshot has them in thousandths."""


def portion(value: Any, name: str = "") -> float:
    """A weight or a cap.  ValueError, with its name, if it can be none."""
    if type(value) not in (int, float) or not LEAST <= value <= MOST:
        whose = f"{name}: " if name else ""
        raise ValueError(f"{whose}expected a number from {LEAST} to {MOST:,}, got {value!r:.40}")
    return float(value)


class State(StrEnum):
    """What a vCPU does."""

    RUNNING = "running"  # a pCPU is its own, now
    RUNNABLE = "runnable"  # it wants one
    BLOCKED = "blocked"  # it waits for something else
    AWAY = "away"  # its VM does not take part


@dataclass
class SeatCounts:
    """All that is counted of one, in virtual time to the last ns."""

    ns: Counter[str] = field(default_factory=Counter)  # by state
    switches: Counter[str] = field(default_factory=Counter)  # it left a pCPU to another, by reason
    migrations: int = 0
    wakes: int = 0
    wait_ns: int = 0  # from waking to running, of all wakes
    longest_wait_ns: int = 0

    @property
    def steal_ns(self) -> int:
        """How long it could have run, and had no processor."""
        return self.ns[State.RUNNABLE]

    def inspect(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "ns": {str(state): self.ns[state] for state in State if self.ns[state]},
            "steal_ns": self.steal_ns,
            "switches": dict(sorted(self.switches.items())),
            "migrations": self.migrations,
            "wakes": self.wakes,
            "wait_ns": self.wait_ns,
            "longest_wait_ns": self.longest_wait_ns,
        }


class Claim:
    """What one VM may have of a host's processors."""

    def __init__(
        self, name: str, vcpus: Sequence[Vcpu], clock: GuestClock,
        finish: Callable[[Stop], Stop | None], owner: Any,
    ) -> None:  # fmt: skip
        """`finish`: what comes of a stop; None: the VM goes on.  `owner`: the VM."""
        self.name, self.clock, self.finish, self.owner = name, clock, finish, owner
        self.weight: float = 1
        self.cap: float | None = None  # at most so many pCPUs, all its vCPUs together
        self.pool = ""
        self.is_linked = self.has_outside = False  # others, or more than VMs, may send it something
        self.ended: Stop | None = None  # why it takes part no more
        self.seats = [Seat(self, vcpu, number) for number, vcpu in enumerate(vcpus)]
        self.stolen: Callable[[int, int], None] = lambda number, ns: None
        """Hears, when a vCPU goes on, how long it has waited in all."""

    @property
    def retired(self) -> int:
        """Instructions of all its vCPUs."""
        return sum(seat.vcpu.retired for seat in self.seats)

    def inspect(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "pool": self.pool, "weight": self.weight, "cap": self.cap,
            "ended": None if self.ended is None else str(self.ended.kind),
            "vcpus": [seat.counts.inspect() | {"state": str(seat.state), "pcpu": seat.pcpu}
                      for seat in self.seats],
        }  # fmt: skip


class Seat:
    """One vCPU's place in the schedule."""

    def __init__(self, claim: Claim, vcpu: Vcpu, number: int) -> None:
        self.claim, self.vcpu, self.number = claim, vcpu, number
        self.state, self.since = State.AWAY, 0
        self.counted = 0  # up to when its time is in the counts
        self.woken_at: int | None = None  # it waits for a processor since it woke
        self.pcpu: int | None = None  # the number of the pCPU on which it ran last
        self.key: Any = None  # what the policy keeps of it
        self.counts = SeatCounts()

    def __repr__(self) -> str:
        return f"{self.claim.name}/{self.number}"

    @property
    def weight(self) -> float:
        """Its part of the weight of its VM."""
        return self.claim.weight / len(self.claim.seats)

    def become(self, state: State, now: int) -> None:
        """In this state from now on."""
        self.settle(now)
        counts = self.counts
        if state is State.RUNNABLE and self.state is State.BLOCKED:
            counts.wakes += 1
            self.woken_at = now
        elif state is State.RUNNING and self.woken_at is not None:
            waited, self.woken_at = now - self.woken_at, None
            counts.wait_ns += waited
            counts.longest_wait_ns = max(counts.longest_wait_ns, waited)
        self.state, self.since = state, now

    def settle(self, now: int) -> None:
        """Count the time up to now."""
        self.counts.ns[self.state] += now - self.counted
        self.counted = now
