"""An experiment: what is measured at one point, over which sweep, and what must hold.

Source: the file's docstring states the claim; see `docs/adding-an-experiment.md`.
Invariants: a point is known by its measuring function and its parameters, so two experiments that
measure the same share the result; `check` sees counts, never times.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from understudy.lab.bars import Bar
from understudy.lab.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalar = str | int | float | bool | None
Axes = Mapping[str, Sequence[Scalar]]
SECTIONS = ("Claim", "Source", "Control", "Note")


class Skip(Exception):
    """This point cannot be run here; the text says why."""


def _everything(point: Row) -> bool:
    return True


def _all_of_it(values: Row) -> Row:
    return values


@dataclass(frozen=True)
class Experiment:
    """One claim.

    `measure` gets a point's parameters as keywords and returns what it counted.  The sweep is the
    product of its axes, less the points for which `where` says no; `quick` replaces axes by
    shorter ones.  `select` makes a row of what was measured, where several experiments look at one
    measurement.  `check` yields bars.  `draw` fills a figure.  `columns` are the table's columns
    (all, if none are named).  `guest` tells people what runs in the VM, `slide`
    where in the lecture the claim is, which gives the order in the report.
    """

    measure: Callable[..., Row]
    guest: str
    sweep: Axes
    check: Callable[[Table], Iterable[Bar]]
    draw: "Callable[[Table, Figure], None] | None" = None
    quick: Axes = field(default_factory=dict)
    where: Callable[[Row], bool] = _everything
    select: Callable[[Row], Row] = _all_of_it
    columns: Sequence[str] = ()
    slide: int = 0

    def points(self, quick: bool = False) -> Iterator[dict[str, Any]]:
        """The parameters of every point, the last axis changing fastest."""
        axes = {**self.sweep, **(self.quick if quick else {})}
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            if self.where(point):
                yield point


@dataclass(frozen=True)
class Story:
    """What an experiment's docstring says: its title, and the paragraphs that have a name."""

    title: str
    sections: Mapping[str, str]

    @classmethod
    def read(cls, text: str) -> "Story":
        """From a docstring; raises ValueError if title, claim or source are missing."""
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text.strip())]
        title, sections = paragraphs[0].rstrip("."), {}
        for paragraph in paragraphs[1:]:
            name, colon, rest = paragraph.partition(":")
            if colon and name in SECTIONS:
                sections[name] = rest.strip()
            else:
                sections["Note"] = f"{sections.get('Note', '')} {paragraph}".strip()
        missing = [name for name in ("Claim", "Source") if not sections.get(name)]
        if not title or missing:
            raise ValueError(
                "an experiment's docstring has a title and paragraphs that begin with "
                f"'Claim:' and 'Source:'; missing: {', '.join(missing) or 'the title'}"
            )
        return cls(title, sections)
