"""Who gets how much memory: against the paper's formula, and the paper's own way page by page."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.overcommit.plan import (
    DOWN,
    IdleTax,
    Need,
    Order,
    Plan,
    PlanError,
    Shortage,
    State,
    admit,
    orders,
    plan_of,
)

MB = 256  # pages
TAUS = (0, 0.25, 0.5, 0.75, 0.99)


@st.composite
def needs(draw: st.DrawFn) -> list[Need]:
    found = []
    for n in range(draw(st.integers(1, 5))):
        low = draw(st.integers(0, 30))
        high = low + draw(st.integers(0, 60))
        found.append(Need(f"vm{n}", low, high, draw(st.integers(1, 9)), draw(st.integers(0, 100))))
    return found


def rho(need: Need, pages: int, k: Fraction) -> Fraction:
    """As the paper has it."""
    f = min(Fraction(need.active, pages), Fraction(1))
    return need.shares / (pages * (f + k * (1 - f)))


@settings(max_examples=300, deadline=None)
@given(needs(), st.sampled_from(TAUS), st.integers(0, 500))
def test_revocation_page_by_page_ends_there(them: list[Need], tau: float, pages: int) -> None:
    plan = IdleTax(tau)
    if pages < sum(n.minimum for n in them):
        with pytest.raises(PlanError, match="minima"):
            plan.divide(them, pages)
        return
    k = 1 / (1 - Fraction(str(tau)))
    has = {n.name: n.maximum for n in them}
    while sum(has.values()) > pages:  # the one who pays least gives one
        giving = [n for n in them if has[n.name] > n.minimum]
        lowest = min(rho(n, has[n.name], k) for n in giving)
        victim = plan.victim(them, has)
        assert victim is not None and rho(victim, has[victim.name], k) == lowest
        has[victim.name] -= 1
    got = plan.divide(them, pages)
    assert sum(got.values()) == sum(has.values())
    assert all(n.minimum <= got[n.name] <= n.maximum for n in them)
    assert all(abs(got[name] - has[name]) <= 1 for name in has)
    for a in them:  # no page is better with another
        for b in them:
            if got[a.name] > a.minimum and got[b.name] < b.maximum:
                assert rho(a, got[a.name], k) >= rho(b, got[b.name] + 1, k)


def test_the_papers_two_machines() -> None:
    windows = Need("windows", 0, 256 * MB, active=20 * MB)
    linux = Need("linux", 0, 256 * MB, active=360 * MB)
    bigger = Need("linux", 0, 360 * MB, active=360 * MB)

    def split(tau: float, other: Need) -> tuple[int, int]:
        got = IdleTax(tau).divide([windows, other], 360 * MB)
        return got["windows"] // MB, got["linux"] // MB

    assert split(0, linux) == (180, 180)
    assert split(0.75, linux) == (104, 256)
    assert split(0.75, bigger) == (84, 276)


def test_who_pays_least() -> None:
    first = Need("first", 0, 4000, 6000, active=1000)
    second = Need("second", 0, 2000, 2000, active=1700)
    has = {"first": 4000, "second": 2000}
    assert first.price(4000, Fraction(5)) == Fraction(3, 8)
    assert second.price(2000, Fraction(5)) == Fraction(5, 8)
    assert second.price(0, Fraction(5)) is None
    for tau, name in ((0.8, "first"), (0, "second")):
        victim = IdleTax(tau).victim([first, second], has)
        assert victim is not None and victim.name == name
    assert IdleTax().victim([first], {"first": 0}) is None


@pytest.mark.parametrize("tau", [-0.1, 1, 2])
def test_a_tax_of_all_or_more_is_none(tau: float) -> None:
    with pytest.raises(PlanError, match="tau"):
        IdleTax(tau)


@pytest.mark.parametrize("wrong", [(-1, 5, 1, 0), (6, 5, 1, 0), (0, 5, 0, 0), (0, 5, 1, -1)])
def test_a_need_that_cannot_be(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(PlanError, match="vm: minimum"):
        Need("vm", *wrong)


# --- states ---


def test_the_states_and_the_way_back() -> None:
    short = Shortage(10_000)
    trace = [
        (601, State.HIGH), (400, State.HIGH), (399, State.SOFT), (600, State.SOFT),
        (650, State.SOFT), (651, State.HIGH), (399, State.SOFT), (200, State.SOFT),
        (199, State.HARD), (400, State.HARD), (450, State.HARD), (451, State.SOFT),
        (199, State.HARD), (100, State.HARD), (99, State.LOW), (200, State.LOW),
        (250, State.LOW), (251, State.HARD), (0, State.LOW), (10_000, State.HIGH),
        (0, State.LOW),
    ]  # fmt: skip
    assert [short.update(free) for free, _ in trace] == [state for _, state in trace]
    assert short.wanted == 651
    with pytest.raises(PlanError):
        Shortage(0)


@given(st.lists(st.integers(0, 1000), max_size=50))
def test_a_state_changes_only_across_its_thresholds(frees: list[int]) -> None:
    short = Shortage(1000)
    for free in frees:
        before = DOWN.index(short.state)
        after = DOWN.index(short.update(free))
        if after > before:
            assert free * 100 < DOWN[after] * 1000
        if after < before:
            assert free * 100 > DOWN[after] * 1000 + 500
        assert Shortage(1000).update(free) >= short.state


def test_what_gives_and_how() -> None:
    them = [Need("a", 0, 100), Need("b", 0, 100), Need("c", 0, 100)]
    has = {"a": 60, "b": 60, "c": 10}

    def told(state: State) -> list[Order]:
        return orders(IdleTax(), state, them, 90, has, balloons=["a"])

    target = 30
    assert told(State.HIGH) == [Order(n, target) for n in "abc"]
    for state, by in (
        (State.SOFT, ("balloon", "swap")),
        (State.HARD, ("swap", "swap")),
        (State.LOW, ("swap", "swap")),
    ):
        assert told(state) == [
            Order("a", target, 30, by[0]), Order("b", target, 30, by[1]),
            Order("c", target),
        ]  # fmt: skip


# --- admission ---


def test_who_may_start() -> None:
    there = [Need("a", 100, 300, beside=10), Need("b", 50, 50, beside=10)]
    admit(Need("c", 30, 80, beside=10), there, pages=210, swap=250)
    with pytest.raises(
        PlanError, match="c: a minimum of 31 pages and 10 beside need 41, and 40 of"
    ):
        admit(Need("c", 31, 80, beside=10), there, pages=210, swap=250)
    with pytest.raises(PlanError, match=r"c: 51 pages between its min and .* 50 of 250"):
        admit(Need("c", 30, 81, beside=10), there, pages=210, swap=250)


# --- the user's own ---

OWN = """
from understudy.overcommit.plan import Plan

class Even(Plan, name="even"):
    def divide(self, needs, pages):
        return {need.name: pages // len(needs) for need in needs}
"""


def test_a_plan_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "even.py"
    path.write_text(OWN)
    plan = plan_of(path)
    assert plan.divide([Need("a", 0, 9), Need("b", 0, 9)], 8) == {"a": 4, "b": 4}
    assert "even" not in Plan.ALL and isinstance(plan_of("idle_tax"), IdleTax)
    assert plan_of(plan) is plan and isinstance(plan_of(IdleTax), IdleTax)
    with pytest.raises(PlanError, match="expected one of idle_tax, or the path of a file"):
        plan_of("none")
    path.write_text("")
    with pytest.raises(PlanError, match="expected one class that is a Plan, found 0"):
        plan_of(path)


def test_a_plan_without_divide_is_none() -> None:
    class Lazy(Plan, name="lazy"):
        """Says nothing."""

    try:
        with pytest.raises(TypeError):
            plan_of(Lazy)  # type: ignore[type-abstract]
    finally:
        del Plan.ALL["lazy"]
