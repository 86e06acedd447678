"""The table and build/bench.json: every row, the worst of each group first.

Invariant: nothing that was asked for is left out; what could not be measured says why.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import Result
from bench.rows import Group
from bench.stats import Spread, geomean

PLACES = ("native", "tcg", "understudy")
RATIOS = (("tcg", "understudy"), ("understudy", "native"), ("tcg", "native"))
HEADS = ("TCG/understudy", "understudy/native", "TCG/native")


def worst_first(results: Iterable[Result]) -> list[Result]:
    """Least faster than TCG first; rows without that ratio lead, slowest under TCG first."""

    def key(result: Result) -> tuple[float, float]:
        lead, cost = result.ratio("tcg", "understudy"), result.ratio("tcg", "native")
        return lead.median if lead else 0.0, -(cost.median if cost else 0.0)

    return sorted(results, key=key)


def means(results: list[Result]) -> dict[str, float | None]:
    """The geomean of each ratio over the rows that have it."""
    table: dict[str, float | None] = {}
    for slow, fast in RATIOS:
        ratios = [result.ratio(slow, fast) for result in results]
        table[f"{slow}/{fast}"] = geomean(ratio.median for ratio in ratios if ratio)
    return table


def show(results: list[Result], console: Console) -> None:
    """One table for each group, then what went wrong."""
    for group in Group:
        rows = [result for result in results if result.row.group is group]
        if rows:
            console.print(_table(group, rows))
    for result in results:
        for problem in result.problems:
            console.print(f"{result.row.name}: {problem}", markup=False, style="red")


def as_json(results: list[Result]) -> dict[str, Any]:
    """The same as plain data: the rows worst first, the geomeans by group."""
    groups = {
        str(group): means([result for result in results if result.row.group is group])
        for group in Group
    }
    return {"rows": [_row_json(result) for result in worst_first(results)], "groups": groups}


def _row_json(result: Result) -> dict[str, Any]:
    ratios = {f"{slow}/{fast}": result.ratio(slow, fast) for slow, fast in RATIOS}
    return {
        "name": result.row.name,
        "group": str(result.row.group),
        "size": result.row.size,
        "seconds": result.seconds,
        "microseconds_each": {
            place: result.microseconds_each(place) for place in PLACES if result.row.each
        },
        "checksum": next(iter(result.checksums.values()), None),
        "ratios": {
            name: {"median": ratio.median, "low": ratio.low, "high": ratio.high}
            for name, ratio in ratios.items()
            if ratio
        },
        "problems": result.problems,
    }


def _table(group: Group, rows: list[Result]) -> Table:
    table = Table(title=f"{group}, worst first", title_justify="left")
    table.add_column("row")
    unit = "µs each" if any(result.row.each for result in rows) else "s"
    for place in ("native", "TCG", "understudy"):
        table.add_column(f"{place} {unit}", justify="right")
    for head in HEADS:
        table.add_column(head, justify="right")
    for result in worst_first(rows):
        seconds = [_time(result, place) for place in PLACES]
        ratios = [_ratio(result.ratio(slow, fast)) for slow, fast in RATIOS]
        mark = " [red]![/red]" if result.problems else ""
        table.add_row(result.row.name + mark, *seconds, *ratios)
    table.add_section()
    geomeans = [f"{mean:.2f}" if mean else "-" for mean in means(rows).values()]
    table.add_row("geomean", "", "", "", *geomeans, style="bold")
    return table


def _time(result: Result, place: str) -> str:
    each, seconds = result.microseconds_each(place), result.typical(place)
    if each is not None:
        return f"{each:.2f}"
    return f"{seconds:.3f}" if seconds is not None else "-"


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    if ratio.low == ratio.high:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} \\[{ratio.low:.2f}..{ratio.high:.2f}]"
