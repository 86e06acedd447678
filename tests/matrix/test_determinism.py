"""In virtual time, one run is every run.

What: the same guest run again, chopped into random budgets, and saved and restored on the way
(on the other engine too), gives the same console bytes, instructions, exits by reason, injected
interrupts, time and memory as a run in one piece; but for the moved ones, the same page walks too.
Source: none.  Invariant: budgets and snapshots come at random instructions, from a fixed seed.
"""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.matrix.lockstep import PROMPT, counted, linux, memory_hash
from understudy.guests import hello, loader
from understudy.verdict import StopKind
from understudy.vm import VM

CI_INSTRUCTIONS = 60_000_000
WALL_S = 1800.0  # a guest that hangs fails the test


class Run:
    """A VM in virtual time, with all that it prints; types `poweroff` at the first prompt."""

    def __init__(self, guest: str, engine: str, limit: int | None) -> None:
        """limit: the run's length in instructions; None: to the guest's end."""
        self.heard, self.limit = bytearray(), limit
        if guest == "hello":
            self.vm = VM("16M", engine=engine)
            self.vm.enter(loader.load(self.vm.memory, hello.image()))
        else:
            self.vm = linux(engine, guest, append="earlyprintk=ttyS0")  # prints from the beginning
        self.vm.console.on_output.append(self._hear)

    def _hear(self, data: bytes) -> None:
        was_prompted = PROMPT in self.heard
        self.heard += data
        if not was_prompted and PROMPT in self.heard:
            self.vm.console.send(b"poweroff\n")

    def go(self, budget: int | None = None) -> str:
        """Go on; "budget" means that there is more to run."""
        left = None if self.limit is None else self.limit - self.vm.instructions
        budget = left if budget is None or (left is not None and left < budget) else budget
        kind = self.vm.go(budget=budget, wall_seconds=WALL_S).kind
        return "limit" if kind == StopKind.BUDGET and self.vm.instructions == self.limit else kind

    def move(self, engine: str) -> None:
        """Save, close, restore."""
        saved = self.vm.save()
        self.vm.close()
        self.vm = VM.restore(saved, engine=engine)
        self.vm.console.on_output.append(self._hear)

    def outcome(self, end: str) -> dict[str, Any]:
        """All that must be the same; `end` is how the run ended."""
        counts = counted(self.vm)
        del counts["kicks"]  # how often the hypervisor asked; the guest has no part in it
        seen = {"console": bytes(self.heard), "now": self.vm.clock.now(), "end": end}
        return counts | seen | {"memory": memory_hash(self.vm)}


# --- ways to run; `length` is how many instructions it will be ---

Way = Callable[[Run, int], str]


def whole(run: Run, length: int) -> str:
    return run.go()


def stretches(largest: int) -> Iterator[int]:
    """Random budgets: many small ones, then a few large ones, and again."""
    chance = random.Random(3)
    while True:
        for limit in [min(5_000, largest)] * 100 + [largest] * 3:
            yield chance.randrange(1, limit + 1)


def chopped(run: Run, length: int) -> str:
    budgets = stretches(length // 20)
    while (kind := run.go(next(budgets))) == StopKind.BUDGET:
        pass
    return kind


def moved(*engines: str) -> Way:
    """Saved, and restored on each of the engines, at random instructions."""

    def run_and_move(run: Run, length: int) -> str:
        chance = random.Random(5)
        for engine in engines:
            assert run.go(chance.randrange(1, length // len(engines))) == StopKind.BUDGET
            run.move(engine)
        return run.go()

    return run_and_move


WAYS = {
    "again": whole,
    "chopped": chopped,
    "moved": moved("dbt", "dbt"),
    "moved-between-engines": moved("reference", "dbt", "reference", "dbt"),
}


def outcome(way: Way, guest: str, engine: str, limit: int | None, length: int) -> dict[str, Any]:
    run = Run(guest, engine, limit)
    try:
        return run.outcome(way(run, length))
    finally:
        run.vm.close()


@functools.cache
def expected(guest: str, limit: int | None) -> dict[str, Any]:
    """The run that the others are compared with."""
    return outcome(whole, guest, "dbt", limit, 0)


def check(way: str, guest: str, engine: str, limit: int | None, end: str) -> None:
    first = expected(guest, limit)
    assert first["end"] == end
    other = outcome(WAYS[way], guest, engine, limit, first["instructions"])
    if way.startswith("moved"):  # a restored processor begins with an empty TLB
        first = first | {name: other[name] for name in ("tlb", "walk")}
    assert other == first


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("way", WAYS)
def test_hello(way: str, engine: str) -> None:
    check(way, "hello", engine, None, StopKind.POWEROFF)
    assert expected("hello", None)["console"] == hello.MESSAGE


@pytest.mark.real_guest
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_the_beginning_of_linux(guest: str, way: str) -> None:
    check(way, guest, "dbt", CI_INSTRUCTIONS, "limit")
    assert b"Linux version" in expected(guest, CI_INSTRUCTIONS)["console"]


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686-pae"])
def test_a_whole_boot_of_linux(guest: str, way: str) -> None:
    """To the prompt, and from there to the power-off."""
    check(way, guest, "dbt", None, StopKind.POWEROFF)


def test_the_comparison_can_fail() -> None:
    """One instruction less is another run."""
    assert outcome(whole, "hello", "dbt", 100, 0) != outcome(whole, "hello", "dbt", 99, 0)
