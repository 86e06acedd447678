"""The table of what boots has a row for all there is, and a reason for all there is not."""

import re

import pytest

from tests.matrix import techniques as t


def test_each_pair_of_techniques_exists_or_has_a_reason() -> None:
    missing = {pair for pair in t.pairs() if not t.exists(*pair)}
    assert missing == t.WHY.keys()


def test_no_cell_of_the_table_says_that_something_failed() -> None:
    text = t.FILE.read_text(encoding="utf-8")
    assert "**" not in text
    for pair, reason in t.WHY.items():
        assert f"| {pair[0]}, {pair[1]} | {reason} |" in text


@pytest.mark.parametrize(("execution", "paging"), [p for p in t.pairs() if t.exists(*p)])
def test_a_cell_can_be_written_again(execution: str, paging: str) -> None:
    guest = "teaching-pv-32" if execution == "pv" else "hello"
    again = t.cell(t.Job(execution, paging, guest))
    rows = re.findall(rf"^\| {execution}, {paging} \| (.*) \|$", t.FILE.read_text(), re.M)
    *counts, _ = again.split(", ")
    cells = rows[-1].split(" | ")
    *recorded, _ = cells[-1 if execution == "pv" else 0].split(", ")
    assert counts == recorded
