"""Bars: the statements that decide a claim, each with what was found.

Source: none.  Invariants: a bar over no rows is undecided, never passed; a control holds if what
it wraps fails, so a check that cannot fail is caught by its own control.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from understudy.lab.table import Row

SHOWN = 3  # so many rows are named where a bar fails


@dataclass(frozen=True)
class Bar:
    """One statement.  `holds`: True, False, or None if nothing could decide it."""

    statement: str
    holds: bool | None
    found: str
    is_control: bool = False


def true(statement: str, holds: bool | None, found: str) -> Bar:
    """A bar that the check has decided itself."""
    return Bar(statement, holds, found)


def equal(statement: str, found: object, expected: object) -> Bar:
    """Exactly this, tolerance 0."""
    if found == expected:
        return Bar(statement, True, f"{found}")
    return Bar(statement, False, f"found {found}, expected {expected}")


def every(
    statement: str,
    rows: Iterable[Row],
    found: Callable[[Row], Any],
    expected: Callable[[Row], Any],
    *,
    name: Callable[[Row], str],
) -> Bar:
    """For every row, `found` is exactly `expected`; `name` says which row it is."""
    compared = [(name(row), found(row), expected(row)) for row in rows]
    wrong = [(row, got, wanted) for row, got, wanted in compared if got != wanted]
    if not compared:
        return Bar(statement, None, "no point that could decide it was run")
    if not wrong:
        return Bar(statement, True, f"all {len(compared)} of {len(compared)}")
    listed = "; ".join(
        f"{row}: {got}" + ("" if wanted is True else f", expected {wanted}")
        for row, got, wanted in wrong[:SHOWN]
    )
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return Bar(statement, False, f"{len(wrong)} of {len(compared)} differ: {listed}{more}")


def absent(bar: Bar) -> Bar:
    """A control in which the effect must be absent: `bar` must hold."""
    return replace(bar, is_control=True)


def control(statement: str, bar: Bar) -> Bar:
    """A negative control: `bar` must fail."""
    if bar.holds is None:
        return Bar(statement, None, bar.found, is_control=True)
    found = "it held, and must not" if bar.holds else f"it fails, as it should: {bar.found}"
    return Bar(statement, not bar.holds, found, is_control=True)
