"""docs/lecture.md: every slide has an answer, and every link leads somewhere.

Why: the lecture is the specification; the map is honest only if a test reads it.
"""

import re
from pathlib import Path

import pytest

from tests.tree import ROOT, files, text

MAP = Path("docs/lecture.md")
DOCUMENTS = [
    *(path for path in files("docs", ".md")),
    *(Path(name) for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
SLIDES = 82
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def _rows() -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text(MAP).splitlines()
        if re.match(r"\| \d+ \|", line)
    ]


def _anchors(path: Path) -> set[str]:
    """The anchors that the headings of a document make."""
    headings = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_slide_is_there_once_in_order() -> None:
    """82 slides, none forgotten."""
    assert [int(row[0]) for row in _rows()] == list(range(1, SLIDES + 1))


def test_every_slide_has_an_answer() -> None:
    """A module and an experiment, or "not yet", or a dash where there is nothing to build."""
    for number, slide, module, experiment in _rows():
        assert slide, number
        for cell in (module, experiment):
            known = cell in ("–", "not yet") or "](" in cell or cell.startswith("`understudy ")
            assert known, f"slide {number}: {cell!r}"


def test_the_slides_of_what_is_built_are_not_all_open() -> None:
    """A map of nothing but "not yet" would pass the other tests."""
    answered = [row for row in _rows() if "](" in row[2]]
    assert len(answered) >= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of every document names a file that exists, and a heading in it."""
    broken = []
    for link in _LINK.findall(text(document)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document.parent / name).resolve() if name else ROOT / document
        if not target.exists() or (anchor and anchor not in _anchors(target.relative_to(ROOT))):
            broken.append(link)
    assert broken == []
