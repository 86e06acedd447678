"""docs/security.md: each promise names tests, and there are such tests."""

import re

import pytest

from tests.tree import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| (?!promise \|)[^-]", line)]
TEST = re.compile(r"`((?:tests|silicon)/[\w/]+\.(?:py|rs))::(\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:30])
def test_each_promise_has_tests(row: str) -> None:
    named = TEST.findall(row)
    assert named, f"no test is named: {row}"
    assert len(named) == row.count("::")
    for path, name in named:
        text = (ROOT / path).read_text()
        assert re.search(rf"^\s*(?:def|fn) {name}\(", text, re.M), f"{path} has no {name}"


@pytest.mark.parametrize("whom", ["a guest", "another VM", "a file", "a mirror", "another user"])
def test_it_says_against_whom(whom: str) -> None:
    section = PAGE.partition(f"\n## Against {whom}")[2].partition("\n## ")[0]
    assert len(TEST.findall(section)) > 1


def test_it_says_what_is_not_promised() -> None:
    section = PAGE.partition("\n## What is not promised\n")[2]
    for word in ("Timing", "Speculation"):
        assert f"**{word}.**" in section


def test_it_is_found() -> None:
    for page in ("README.md", "ARCHITECTURE.md"):
        assert "docs/security.md" in (ROOT / page).read_text()
