"""A pool: some pCPUs of a host, the vCPUs that run on them, and the policy by which they do.

Source: lecture, "Scheduling: Virtual CPUs" ("a mix of both policies, and dynamically switch").
Invariant: each pCPU and each VM of a host is in exactly one pool.
"""

from typing import Any

from understudy.sched.pcpu import Pcpu
from understudy.sched.policy import Policy
from understudy.sched.seat import Seat, State


class Pool:
    """One pool of a host."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name, self.policy = name, policy
        self.pcpus: list[Pcpu] = []
        self.seats: list[Seat] = []
        policy.pcpus = self.pcpus

    def __repr__(self) -> str:
        return f"pool {self.name}"

    def use(self, policy: Policy, now: int) -> None:
        """Another policy from now on; nobody runs on the pool's pCPUs.

        PolicyError if it has no room for all: then it is as it was.
        """
        policy.pcpus = self.pcpus
        for seat in self.seats:
            policy.arrive(seat, now)
        self.policy = policy
        for seat in self.seats:
            if seat.state is State.RUNNABLE:
                policy.wake(seat, now)

    def inspect(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "policy": self.policy.name,
            "pcpus": [pcpu.number for pcpu in self.pcpus],
            "vcpus": [repr(seat) for seat in self.seats],
        }
