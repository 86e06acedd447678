"""Who gets how much of a host's memory, who must give, and by which means.

    plan = IdleTax(tau=0.75)
    plan.divide([Need("web", 0, 65536, shares=2, active=9000), ...], pages=100_000)

A VM has a minimum, which it always gets, a maximum, which is its memory, and shares.  A page of a
VM is paid with shares: the price that it pays is rho = S / (P (f + k (1 - f))), where f is the part
of its P pages that is active, and an idle page costs k = 1 / (1 - tau) times as much as an active
one.  Who pays least gives the next page (min-funding revocation).

Nothing here knows a VM: numbers come in, numbers go out.  All memory is in pages.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Shares vs. Working Sets"
and "Allocation Policies"; the paper says "significantly exceeding" of the way back to a higher
state, and no number: `SLACK` is ours.
Invariants: arithmetic is exact; what is divided is all that there is, unless all have their
maximum; nobody gets less than its minimum nor more than its maximum.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Final

from understudy.own_class import chosen, is_own

TAU: Final = 0.75
SLACK: Final = Fraction(1, 200)  # of all memory: by so much is a threshold to be exceeded


class PlanError(ValueError):
    """There is no such plan, or it cannot be carried out; says why in one line."""


@dataclass(frozen=True)
class Need:
    """What one VM may have, and what it does with it."""

    name: str
    minimum: int
    maximum: int
    shares: int = 1
    active: int = 0
    """Pages that it has touched lately."""
    beside: int = 0
    """What it needs beside its memory, and never gives."""

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or self.shares < 1 or self.active < 0:
            raise PlanError(
                f"{self.name}: minimum {self.minimum}, maximum {self.maximum}, shares "
                f"{self.shares}: expected 0 <= minimum <= maximum, and at least 1 share"
            )

    def cost(self, pages: int | Fraction, k: Fraction) -> Fraction:
        """What so many pages cost: P (f + k (1 - f)) with f = active / P, 1 at the most."""
        return min(Fraction(pages), Fraction(self.active)) + k * max(pages - self.active, 0)

    def price(self, pages: int, k: Fraction) -> Fraction | None:
        """rho, the shares that it pays for a page.  None: it has none to pay for."""
        cost = self.cost(pages, k)
        return self.shares / cost if cost else None


# --- how memory is divided ---


class Plan(ABC):
    """Divides the memory of a host.  A subclass with a name can be chosen by it."""

    ALL: ClassVar[dict[str, type["Plan"]]] = {}
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        if not is_own(cls):
            Plan.ALL[name] = cls

    @abstractmethod
    def divide(self, needs: Sequence[Need], pages: int) -> dict[str, int]:
        """How many pages each one is to have.  PlanError if there are less than the minima."""


Wish = str | Path | Plan | type[Plan]


def plan_of(wish: Wish) -> Plan:
    """The plan that was wished for: by name, by the path of a file, a class or an object."""
    return chosen(wish, Plan, Plan.ALL, PlanError, "plan")  # type: ignore[type-abstract]


class IdleTax(Plan, name="idle_tax"):
    """By shares, with a tax on what is idle.  tau 0: shares alone; near 1: working sets alone."""

    def __init__(self, tau: float = TAU) -> None:
        if not 0 <= tau < 1:
            raise PlanError(f"tau={tau!r}: expected 0 to less than 1")
        self.tau = tau
        self.k: Fraction = 1 / (1 - Fraction(str(tau)))

    def divide(self, needs: Sequence[Need], pages: int) -> dict[str, int]:
        least, most = sum(n.minimum for n in needs), sum(n.maximum for n in needs)
        if pages < least:
            raise PlanError(f"{pages} pages for minima of {least} in all")
        if pages >= most:
            return {need.name: need.maximum for need in needs}
        level = self._level(needs, pages)
        got = {need.name: int(self._pages_at(need, level)) for need in needs}
        for _ in range(pages - sum(got.values())):  # less than one page for each
            growing = [need for need in needs if got[need.name] < need.maximum]
            got[min(growing, key=lambda n: self.cost_of(n, got[n.name] + 1)).name] += 1
        return got

    def victim(self, needs: Iterable[Need], pages: Mapping[str, int]) -> Need | None:
        """Who pays least, and so gives the next page; None if all have their minimum."""
        giving = [need for need in needs if pages[need.name] > need.minimum]
        return max(giving, key=lambda n: self.cost_of(n, pages[n.name]), default=None)

    def cost_of(self, need: Need, pages: int) -> Fraction:
        """1 / rho: what each share has to carry."""
        return need.cost(pages, self.k) / need.shares

    def _pages_at(self, need: Need, level: Fraction) -> Fraction:
        """With how many pages each share of it carries as much as that."""
        carried = level * need.shares
        idle = max(carried - need.active, Fraction(0)) / self.k
        pages = min(carried, Fraction(need.active)) + idle
        return max(min(pages, Fraction(need.maximum)), Fraction(need.minimum))

    def _level(self, needs: Sequence[Need], pages: int) -> Fraction:
        """What each share carries when all pages are given: the fixed point.

        The sum of pages over the level is a line between two of these bends.
        """
        bends = sorted(
            {Fraction(0)}
            | {self.cost_of(n, at) for n in needs for at in (n.minimum, n.active, n.maximum)}
        )

        def sum_at(level: Fraction) -> Fraction:
            return sum((self._pages_at(need, level) for need in needs), Fraction(0))

        at = bisect_left(bends, Fraction(pages), key=sum_at)  # the sum only grows
        if at == 0 or at == len(bends):
            return bends[min(at, len(bends) - 1)]
        low, high = bends[at - 1], bends[at]
        before, after = sum_at(low), sum_at(high)
        return low + (high - low) * (pages - before) / (after - before)


# --- when, and by which means ---


class State(IntEnum):
    """How short memory is; a value is the threshold, in per cent of all memory that is free."""

    HIGH = 6
    """Nothing has to be done."""
    SOFT = 4
    """By the balloon; by swapping where there is none."""
    HARD = 2
    """By swapping."""
    LOW = 1
    """By swapping, and who has more than it should does not run."""


DOWN: Final = (State.HIGH, State.SOFT, State.HARD, State.LOW)


class Shortage:
    """The state of a host, with hysteresis."""

    def __init__(self, pages: int, slack: Fraction = SLACK) -> None:
        """`pages`: all memory."""
        if pages < 1:
            raise PlanError(f"a host of {pages} pages: expected at least one")
        self.pages, self.slack, self.state = pages, slack, State.HIGH

    def threshold(self, state: State) -> Fraction:
        """In pages."""
        return Fraction(self.pages * state, 100)

    def update(self, free: int) -> State:
        """So many pages are free now.

        Down if fewer are than the lower state's threshold; up if more are than the higher
        state's, and the slack beside.
        """
        self.state = self.at(free)
        return self.state

    def at(self, free: int) -> State:
        """What `update` would say."""
        at = DOWN.index(self.state)
        while at < 3 and free < self.threshold(DOWN[at + 1]):
            at += 1
        while at > 0 and free > self.threshold(DOWN[at - 1]) + self.slack * self.pages:
            at -= 1
        return DOWN[at]

    @property
    def wanted(self) -> int:
        """Pages that are to be free: with so many the state is high, whatever it was."""
        return int(self.threshold(State.HIGH) + self.slack * self.pages) + 1


@dataclass(frozen=True)
class Order:
    """What one VM has to do."""

    name: str
    target: int
    """Pages that it is to have."""
    gives: int = 0
    """Pages that it must give."""
    means: str = ""
    """ "balloon" or "swap"; "" if it gives none."""


def orders(
    plan: Plan,
    state: State,
    needs: Sequence[Need],
    pages: int,
    has: Mapping[str, int],
    balloons: Iterable[str] = (),
) -> list[Order]:
    """Who gives what, and how.

    pages: those for VMs, without what is to be free.  has: pages of each now.  balloons: those
    whose balloon obeys.
    """
    targets, obeying = plan.divide(needs, pages), frozenset(balloons)
    if missing := [need.name for need in needs if need.name not in targets]:
        raise PlanError(f"plan {plan.name or type(plan).__name__}: no pages for {missing}")
    found = []
    for need in needs:
        target = targets[need.name]
        over = max(has[need.name] - target, 0)
        if state == State.HIGH or not over:
            found.append(Order(need.name, target))
            continue
        by = "balloon" if state == State.SOFT and need.name in obeying else "swap"
        found.append(Order(need.name, target, over, by))
    return found


# --- who may start ---


def admit(new: Need, others: Iterable[Need], pages: int, swap: int) -> None:
    """PlanError unless the host can keep its promise to one more VM.

    It needs memory for its minimum and what is beside, and room in the host's swap file for the
    rest.
    """
    others = list(others)
    taken = sum(need.minimum + need.beside for need in others)
    if new.minimum + new.beside > pages - taken:
        raise PlanError(
            f"{new.name}: a minimum of {new.minimum} pages and {new.beside} beside need "
            f"{new.minimum + new.beside}, and {max(pages - taken, 0)} of {pages} are not promised: "
            "lower its min, or give the host more ram"
        )
    promised = sum(need.maximum - need.minimum for need in others)
    if new.maximum - new.minimum > swap - promised:
        raise PlanError(
            f"{new.name}: {new.maximum - new.minimum} pages between its min and its memory may "
            f"have to be swapped out, and {max(swap - promised, 0)} of {swap} are not promised: "
            "raise its min, close snapshots, or give the host more swap"
        )
