"""Bars, tables and verdicts: what was not decided never counts as passed."""

from pathlib import Path
from typing import Any

import pytest

from understudy.lab.bars import Bar, control, equal, every, true
from understudy.lab.discover import Loaded
from understudy.lab.experiment import Experiment, Story
from understudy.lab.table import BROKEN, DONE, SKIPPED, Record, Table
from understudy.lab.verdict import Status, judge


def _every(rows: list[dict[str, Any]]) -> Bar:
    return every("n is two", rows, lambda r: r["n"], lambda r: 2, name=lambda r: r["at"])


def test_every_holds_for_all_rows_or_names_those_that_differ() -> None:
    assert _every([{"at": "a", "n": 2}, {"at": "b", "n": 2}]).holds is True
    wrong = _every([{"at": "a", "n": 2}, *({"at": f"x{n}", "n": n} for n in (3, 4, 5, 6))])
    assert wrong.holds is False
    assert wrong.found == (
        "4 of 5 differ: x3: 3, expected 2; x4: 4, expected 2; x5: 5, expected 2; and 1 more"
    )


def test_no_rows_decide_nothing() -> None:
    assert _every([]).holds is None
    assert control("must fail", _every([])).holds is None


def test_a_control_holds_if_what_it_wraps_fails() -> None:
    assert control("24 is not 25", equal("", 24, 25)).holds is True
    assert control("24 is not 24", equal("", 24, 24)).holds is False


def test_rows_are_the_points_that_ran() -> None:
    table = Table(
        [
            Record({"a": 1}, DONE, {"n": 5}),
            Record({"a": 2}, SKIPPED, reason="not here"),
            Record({"a": 3}, BROKEN, reason="bang"),
            Record({"a": 4}, DONE, {"n": 6}),
        ]
    )
    assert table.rows == [{"a": 1, "n": 5}, {"a": 4, "n": 6}]
    assert table.where(a=(1, 2)) == [{"a": 1, "n": 5}]
    assert (table.values("n"), table.columns()) == ([5, 6], ["a", "n"])


def _judge(bars: list[Bar], records: list[Record]) -> Status:
    experiment = Experiment(measure=dict, guest="none", sweep={}, check=lambda table: iter(bars))
    loaded = Loaded("x", Path("x.py"), Story("x", {}), experiment)
    return judge(loaded, Table(records)).status


YES, NO, OPEN = true("", True, ""), true("", False, ""), true("", None, "")
RAN, LEFT, BROKE = Record({}, DONE), Record({}, SKIPPED), Record({}, BROKEN)


@pytest.mark.parametrize(
    ("bars", "records", "status"),
    [
        ([YES], [RAN], Status.PASSED),
        ([YES, NO], [RAN], Status.FAILED),
        ([YES], [RAN, BROKE], Status.FAILED),
        ([YES], [RAN, LEFT], Status.PARTIAL),
        ([YES, OPEN], [RAN], Status.PARTIAL),
        ([OPEN], [LEFT], Status.SKIPPED),
        ([NO], [LEFT], Status.FAILED),
        ([], [RAN], Status.FAILED),  # a check that states nothing
    ],
)
def test_the_worst_decides(bars: list[Bar], records: list[Record], status: Status) -> None:
    assert _judge(bars, records) is status


def test_a_check_that_breaks_is_a_failure() -> None:
    def check(table: Table) -> list[Bar]:
        raise KeyError("references")

    experiment = Experiment(measure=dict, guest="none", sweep={}, check=check)
    verdict = judge(Loaded("x", Path("x.py"), Story("x", {}), experiment), Table([RAN]))
    assert verdict.status is Status.FAILED
    assert "KeyError" in verdict.bars[0].found


def test_a_docstring_states_claim_and_source() -> None:
    story = Story.read("A title.\n\nClaim: this\nand that.\n\nSource: a slide.\n\nMore.\n")
    assert story.title == "A title"
    assert story.sections == {"Claim": "this and that.", "Source": "a slide.", "Note": "More."}
    with pytest.raises(ValueError, match="missing: Source"):
        Story.read("A title.\n\nClaim: this.\n")


def test_points_are_the_product_of_the_axes_less_what_cannot_be() -> None:
    experiment = Experiment(
        measure=dict, guest="", sweep={"a": [1, 2, 3], "b": ["x", "y"]}, quick={"a": [1]},
        where=lambda p: p != {"a": 1, "b": "y"}, check=lambda table: [],
    )  # fmt: skip
    assert len(list(experiment.points())) == 5
    assert list(experiment.points(quick=True)) == [{"a": 1, "b": "x"}]
