"""Faults that are planted into what experiments measure: their bars see them.

Why: a bar that compares a thing with itself always holds.
"""

from typing import Any

import pytest

from experiments import idle_machine, page_sharing
from understudy.lab.discover import find, folder
from understudy.lab.table import DONE, Record, Table
from understudy.lab.verdict import judge
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.words import Flag
from understudy.overcommit.plan import IdleTax


def failed(name: str, params: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The bars that one point fails; controls aside, which need others."""
    verdict = judge(find(folder(), [name])[0], Table([Record(params, DONE, values)]))
    return [bar.statement for bar in verdict.bars if bar.holds is False and not bar.is_control]


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
    assert bar not in failed("idle_machine", tau, right)
    monkeypatch.setattr(IdleTax, "divide", divide)
    assert bar in failed("idle_machine", tau, idle_machine.measure(**tau))


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
    assert failed("page_sharing", point, page_sharing.measure(**point)) == []
    monkeypatch.setattr(CopyOnWrite, "write", write)
    assert bar in failed("page_sharing", point, page_sharing.measure(**point))
