"""The report: whole in itself, well formed, and the bad news first."""

import csv
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from understudy.lab import report
from understudy.lab.bars import Bar, equal, true
from understudy.lab.discover import Loaded
from understudy.lab.experiment import Experiment, Story
from understudy.lab.table import BROKEN, DONE, SKIPPED, Record, Table
from understudy.lab.verdict import Verdict

VOID = {"meta", "br", "img", "link", "use", "path", "rect"}


class Balance(HTMLParser):
    """Complains about a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def _verdict(name: str, bars: list[Bar], records: list[Record], draw: Any = None) -> Verdict:
    story = Story(f"Title of {name}", {"Claim": "a < b & `c`.", "Source": "a slide"})
    experiment = Experiment(
        measure=dict, guest="none", sweep={"n": [1, 2]}, check=lambda table: bars, draw=draw
    )
    return Verdict(Loaded(name, Path("x.py"), story, experiment), Table(records), bars)


def _draw(table: Table, figure: Any) -> None:
    figure.add_subplot().bar([0], [table.rows[0]["square"]])


def _break(table: Table, figure: Any) -> None:
    raise ZeroDivisionError("no axis")


RECORDS = [
    Record({"n": 1}, DONE, {"square": 1234, "share": -0.001, "word": "<b>"}, wall_s=1.5),
    Record({"n": 2}, SKIPPED, reason="no such <thing> here"),
    Record({"n": 3}, BROKEN, reason="ValueError: bang\nTraceback"),
]


@pytest.fixture
def page(tmp_path: Path) -> str:
    verdicts = [
        _verdict("good", [true("it holds", True, "24")], RECORDS[:1], _draw),
        _verdict("bad", [equal("it is 25", 24, 25)], RECORDS),
        _verdict("open", [true("nobody knows", None, "no point")], RECORDS[1:2]),
        _verdict("odd", [true("fine", True, "")], RECORDS[:1], _break),
    ]
    return report.write(tmp_path, verdicts, quick=True, version="abc").page.read_text()


def test_the_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.tags.count("article") == 4
    assert {"script", "link", "img", "iframe"} & set(parser.tags) == set()
    assert "http" not in page.replace("http://www.w3.org/", "")


def test_what_failed_and_what_was_left_out_is_said(page: str) -> None:
    assert page.index("1 failed") < page.index("2 passed")
    assert "1 could not be decided here" in page
    assert "found 24, expected 25" in page
    assert "skipped: no such &lt;thing&gt; here" in page
    assert "broken: ValueError: bang" in page
    assert "Traceback" not in page
    assert "No figure: ZeroDivisionError: no axis" in page


def test_text_is_escaped_and_numbers_are_readable(page: str) -> None:
    assert "A &lt; b &amp; <code>c</code>." in page
    assert "&lt;b&gt;" in page
    assert "1\N{NARROW NO-BREAK SPACE}234" in page
    assert "-0.00" not in page


def test_table_and_figure_lie_beside_it(tmp_path: Path, page: str) -> None:
    with (tmp_path / "tables/bad.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "skipped", "broken"]
    assert rows[0]["square"] == "1234"
    markdown = (tmp_path / "tables/bad.md").read_text().splitlines()
    assert markdown[:2] == ["| n | square | share | word |", "|--:|--:|--:|---|"]
    assert [line.split("|")[-2].strip() for line in markdown[2:]] == ["<b>", "skipped", "broken"]
    assert (tmp_path / "figures/good.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures/good.svg").read_text()
    assert not (tmp_path / "figures/odd.svg").exists()
    assert 'aria-label="Title of good"' in page
