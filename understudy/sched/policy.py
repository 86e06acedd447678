"""What a scheduling policy is: the answers to six events, for the pCPUs and vCPUs of one pool.

    class Mine(Policy, name="mine"):
        def pick(self, pcpu, now): ...

A policy is given by its name, by the path of a file that has one such class, as a class, or as an
object.  `now` is host time in ns; at the boundary of a turn it is that of the boundary.

Source: lecture, "Scheduling: Virtual CPUs"; ours.
Invariants: a policy decides, `Schedule` does and counts; what it is told of comes in the order of
time, so a policy without chance of its own gives the same run each time.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from understudy.own_class import chosen, is_own
from understudy.sched.pcpu import Pcpu
from understudy.sched.seat import Seat

NEVER: Final = (1 << 64) - 1


class PolicyError(ValueError):
    """There is no such policy, or it cannot do what it is asked to; says why in one line."""


class Policy(ABC):
    """Decides for one pool."""

    ALL: ClassVar[dict[str, type["Policy"]]] = {}
    name: ClassVar[str] = ""
    pcpus: Sequence[Pcpu] = ()
    """Those of the pool, now."""
    keeps: ClassVar[bool] = False
    """Whether a snapshot keeps what it knows of a vCPU, by `save` and `load`."""

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        if not is_own(cls):
            Policy.ALL[name] = cls

    def arrive(self, seat: Seat, now: int) -> None:  # noqa: B027 (many need not know)
        """One more is in the pool, and not runnable yet.  PolicyError if there is no room."""

    def leave(self, seat: Seat, now: int) -> None:  # noqa: B027 (many need not know)
        """It is no more; it was not runnable at last."""

    @abstractmethod
    def wake(self, seat: Seat, now: int) -> Pcpu | None:
        """It is runnable; a pCPU that is to look at the next boundary who goes on, if one is."""

    @abstractmethod
    def block(self, seat: Seat, now: int) -> None:
        """It is runnable no more (it ran, or waited)."""

    @abstractmethod
    def tick(self, pcpu: Pcpu, seat: Seat, now: int, asked: bool) -> bool:
        """The one that runs is at the end of a turn: whether it has to give the pCPU back.

        `asked`: `wake` has asked for that.
        """

    @abstractmethod
    def pick(self, pcpu: Pcpu, now: int) -> Seat | None:
        """Who runs on this pCPU now, of those that are runnable and run on no other."""

    def favor(self, pcpu: Pcpu, seat: Seat, other: Seat, now: int) -> bool:
        """The one that runs waits for this other one, which is runnable.

        True: it has given its pCPU back, and `pick` is to give it to the other one.
        """
        return False

    def due(self) -> int:
        """When `pick` may give somebody whom it does not give now, and nothing else happens."""
        return NEVER

    def changed(self, now: int) -> None:  # noqa: B027 (many need not know)
        """pCPUs, weights or caps are others.  PolicyError if it cannot be so."""

    def save(self, seat: Seat) -> dict[str, int]:
        """What a snapshot keeps of a vCPU."""
        return {}

    def load(self, seat: Seat, saved: dict[str, int]) -> None:  # noqa: B027 (if it keeps any)
        """It arrived, and was like that.  KeyError or ValueError if it cannot have been."""


Wish = str | Path | Policy | type[Policy]


def policy_of(wish: Wish) -> Policy:
    """The policy that was wished for.  PolicyError says in one line what was expected."""
    return chosen(wish, Policy, Policy.ALL, PolicyError, "policy")  # type: ignore[type-abstract]
