"""The table of what boots has a row for all there is, and a reason for all there is not."""

import re

import pytest

from tests.matrix import techniques as t
from understudy.execution import Execution


def test_each_pair_of_techniques_exists_or_has_a_reason() -> None:
    missing = {pair for pair in t.pairs() if not t.exists(*pair)}
    assert missing == t.WHY.keys()


@pytest.mark.parametrize("execution", Execution.ALL)
def test_the_table_is_whole(execution: str) -> None:
    text = t.FILE.read_text(encoding="utf-8")
    groups = [g for g in (t.DEBIANS, t.OWN, t.PARAVIRTUAL) if g[0] in t.guests_of(execution)]
    for paging in t.PAGINGS:
        rows = re.findall(rf"^\| {execution}, {paging} \| (.*) \|$", text, re.M)
        if not t.exists(execution, paging):
            assert rows == [t.WHY[execution, paging]]
            continue
        assert [len(row.split(" | ")) for row in rows] == [len(group) for group in groups]
        assert not [row for row in rows if "**" in row], "something did not boot"


@pytest.mark.parametrize(("execution", "paging"), [p for p in t.pairs() if t.exists(*p)])
def test_a_cell_can_be_written_again(execution: str, paging: str) -> None:
    guest = "teaching-pv-32" if execution == "pv" else "hello"
    again = t.cell(t.Job(execution, paging, guest))
    rows = re.findall(rf"^\| {execution}, {paging} \| (.*) \|$", t.FILE.read_text(), re.M)
    *counts, _ = again.split(", ")
    cells = rows[-1].split(" | ")
    *recorded, _ = cells[-1 if execution == "pv" else 0].split(", ")
    assert counts == recorded
