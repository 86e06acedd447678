"""Faults that are planted into what experiments measure: their bars see them.

Why: a bar that compares a thing with itself always holds.
"""

from typing import Any

import pytest

from experiments import balloon_first, idle_machine, page_sharing, share_before_swap
from understudy.lab.discover import find, folder
from understudy.lab.table import DONE, Record, Table
from understudy.lab.verdict import judge
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.words import Flag
from understudy.overcommit.plan import IdleTax


def failed(name: str, *points: tuple[dict[str, Any], dict[str, Any]]) -> set[str]:
    """The bars that fail with these points: parameters, and what was measured."""
    table = Table([Record(params, DONE, values) for params, values in points])
    return {bar.statement for bar in judge(find(folder(), [name])[0], table).bars if not bar.holds}


def _by_halves(plan: IdleTax, needs: Any, pages: int) -> dict[str, int]:
    """Whoever uses it."""
    return {need.name: pages // len(needs) for need in needs}


def _one_loses_two(plan: IdleTax, needs: Any, pages: int) -> dict[str, int]:
    got = DIVIDE(plan, needs, pages)
    return got | {"a": got["a"] - 2}


def _the_other_way_round(plan: IdleTax, needs: Any, pages: int) -> dict[str, int]:
    got = DIVIDE(plan, needs, pages)
    return {"a": got["b"], "b": got["a"]}


DIVIDE = IdleTax.divide


@pytest.mark.parametrize("divide", [_by_halves, _one_loses_two, _the_other_way_round])
def test_memory_that_is_divided_wrongly(divide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = "what each is to have is the fixed point, +-1 page, in each period"
    monkeypatch.setattr(idle_machine, "PERIODS", 2)
    tau = {"tau": "0.75"}
    right = idle_machine.measure(**tau)
    assert bar not in failed("idle_machine", (tau, right))
    monkeypatch.setattr(IdleTax, "divide", divide)
    assert bar in failed("idle_machine", (tau, idle_machine.measure(**tau)))


def _no_copy(owner: CopyOnWrite, p2m: Any, gfn: int) -> None:
    p2m.unprotect(gfn, 1, Flag.SHARED)


def _an_empty_copy(owner: CopyOnWrite, p2m: Any, gfn: int) -> None:
    pfn = p2m.lookup(gfn)
    p2m.move(gfn, owner._frame_for(p2m), off=Flag.SHARED)
    owner._frames.free(pfn, 1)


@pytest.mark.parametrize("write", [_no_copy, _an_empty_copy])
def test_a_write_to_a_shared_frame_that_others_see(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = "nobody else sees it, and no byte of any guest is another one"
    point = {"guests": 2, "groups": page_sharing.ONE}
    assert bar not in failed("page_sharing", (point, page_sharing.measure(**point)))
    monkeypatch.setattr(CopyOnWrite, "write", write)
    assert bar in failed("page_sharing", (point, page_sharing.measure(**point)))


def test_sharing_that_keeps_nothing_out_of_the_file() -> None:
    points = list(share_before_swap.EXPERIMENT.points())
    values = {"booted": share_before_swap.GUESTS, "off": 0, "alike": 0, "looked_up": 0, "read": 9}
    much, little = ({"written": pages, "in_file": pages} for pages in (20_000, 10))
    assert {
        "with the slow scan, fewer go to the file, are there and are read than without",
        "and fewer still with the look-up",
        "with the fast scan less than the paper's 20 MBytes is in the file",
    } <= failed("share_before_swap", *((point, values | much) for point in points))
    assert "with neither that is not so" in failed(
        "share_before_swap", *((point, values | little) for point in points)
    )


def test_a_balloon_that_is_not_asked_or_asked_too_late() -> None:
    points = list(balloon_first.EXPERIMENT.points())
    values = {"right": balloon_first.FILES, "off": 0, "swapped_from": 9}
    for ballooned_from in (9, balloon_first.NEVER):
        row = values | {"ballooned_from": ballooned_from}
        assert {
            "before anything is swapped out the balloon has pages",
            "without the balloon pages are swapped out sooner",
        } <= failed("balloon_first", *((point, row) for point in points))
