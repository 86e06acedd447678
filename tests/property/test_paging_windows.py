"""The state machine of `test_paging`, with windows forced on.

What: what a guest's tables lose, its program's window loses.  Source: the invariants of
`understudy.paging`.  What is checked: see `paging_machine`.
"""

from collections import Counter
from multiprocessing import get_context
from typing import ClassVar

import pytest

from tests.property.paging_machine import FORMATS
from tests.property.playing import play
from tests.property.test_paging import LENGTH, ROOMS, machine
from tests.property.windowed_machine import WindowedMachine
from understudy.paging import Paging


def check(paging: str, shape_name: str, steps: int) -> Counter[str]:
    """Run machines until so many steps are done; what was done with windows."""

    class Windowed(WindowedMachine):
        windows: ClassVar[Counter[str]] = Counter()

    play(machine(paging, shape_name, ROOMS, Windowed), steps, LENGTH)
    print(f"{paging}, {shape_name}: {steps} steps, {dict(Windowed.windows)}")
    return Windowed.windows


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_windows_are_never_stale(paging: str, shape_name: str) -> None:
    # (What Hypothesis draws depends on the modules that are loaded.)
    with get_context("spawn").Pool(1) as alone:
        windows = alone.apply(check, (paging, shape_name, 200))
    assert windows["windows_opened"] > 0, windows
    assert windows["window_fills"] > 10 and windows["window_drops"] > 10, windows


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_windows_are_not_for_a_hundred_thousand_steps(paging: str, shape_name: str) -> None:
    assert check(paging, shape_name, 100_000)["window_drops"] > 1000
