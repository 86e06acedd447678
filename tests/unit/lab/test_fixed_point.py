"""The fixed point of the idle-memory tax: at it both pay the same price.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Reclaiming Idle Memory".
"""

from fractions import Fraction

import pytest

from understudy.lab.fixed_point import fixed_point
from understudy.overcommit.plan import Need


def rho(need: Need, pages: Fraction, tau: str) -> Fraction:
    """As the paper has it."""
    f, k = min(Fraction(need.active) / pages, Fraction(1)), 1 / (1 - Fraction(tau))
    return need.shares / (pages * (f + k * (1 - f)))


@pytest.mark.parametrize("tau", ["0", "0.25", "0.5", "0.75", "0.99"])
@pytest.mark.parametrize(("shares", "one", "other"), [(1, 20, 360), (3, 20, 20), (1, 400, 0)])
def test_both_pay_the_same(tau: str, shares: int, one: int, other: int) -> None:
    mine, its = Need("one", 0, 360, shares, one), Need("other", 0, 360, 1, other)
    pages = fixed_point(mine, its, 360, tau)
    assert rho(mine, pages, tau) == rho(its, 360 - pages, tau)
    assert fixed_point(its, mine, 360, tau) == 360 - pages


def test_bounds_are_kept() -> None:
    idle, busy = Need("idle", 0, 256, active=20), Need("busy", 0, 256, active=360)
    assert fixed_point(idle, busy, 360, "0.75") == 104  # the other has all that it can have
    assert fixed_point(idle, busy, 600, "0.75") == 256
    assert fixed_point(Need("idle", 150, 256, active=20), busy, 360, "0.75") == 150
