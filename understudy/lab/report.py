"""The report: one page of HTML that holds everything; CSV, Markdown, PNG, SVG for each experiment.

Source: none.  Invariants: what failed, broke or was skipped is shown with its reason, before and
beside what passed; the page needs nothing but itself (no script, no font, no network).
"""

import csv
import html
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from understudy.lab import figure
from understudy.lab.bars import Bar
from understudy.lab.table import BROKEN, DONE, SKIPPED, Table
from understudy.lab.verdict import Status, Verdict
from understudy.visible import visible

TITLE: Final = "What virtualisation costs, counted"
CSS: Final = {
    Status.PASSED: "passed",
    Status.PARTIAL: "part",
    Status.SKIPPED: "skipped",
    Status.FAILED: "failed",
}
MARKS: Final = {True: ("yes", "✓", "holds"), False: ("no", "✗", "does not hold"),
                None: ("open", "–", "not decided")}  # fmt: skip
LONG = 12  # rows beyond which a table is folded


@dataclass(frozen=True)
class Written:
    """What `write` left behind."""

    page: Path


def write(folder: Path, verdicts: Sequence[Verdict], *, quick: bool, version: str) -> Written:
    """The page and everything beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    page = folder / "report.html"
    text = environment.get_template("report.html.j2").render(
        title=TITLE,
        lead=lead(verdicts),
        quick=quick,
        verdicts=[_section(folder, verdict) for verdict in verdicts],
        footer=_footer(quick, version),
    )
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    Path(part).replace(page)
    return Written(page)


def lead(verdicts: Sequence[Verdict]) -> str:
    """The whole in one sentence, the bad news first."""
    parts = []
    for status, words in (
        (Status.FAILED, "failed"),
        (Status.SKIPPED, "could not be decided here"),
        (Status.PARTIAL, "passed in part, with points skipped"),
        (Status.PASSED, "passed"),
    ):
        count = sum(verdict.status is status for verdict in verdicts)
        if count:
            parts.append(f"{count} {words}")
    return (
        f"{len(verdicts)} claim{'s' * (len(verdicts) != 1)}: {', '.join(parts)}. Every number is "
        "an exact count by a simulated machine, the same on each computer; only wall times are not."
    )


def _footer(quick: bool, version: str) -> list[str]:
    return [
        f"understudy, code {version}, Python {platform.python_version()} on {platform.machine()}. "
        + ("Quick sweeps; leave out --quick for the whole ones." if quick else "Whole sweeps."),
        "Results are kept by what was run: a point is measured again only if the code, the guest "
        "or its parameters changed. A control is a statement that must fail.",
    ]


def _section(folder: Path, verdict: Verdict) -> dict[str, Any]:
    loaded, table = verdict.loaded, verdict.table
    experiment, story = loaded.experiment, loaded.story
    decided = [bar for bar in verdict.bars if bar.holds is not None]
    drawing, trouble = _figure(folder, verdict)
    columns = list(experiment.columns) or table.columns()
    _csv(folder, loaded.name, table)
    _markdown(folder, loaded.name, table, columns)
    return {
        "name": loaded.name,
        "title": story.title,
        "status": verdict.status.value,
        "css": CSS[verdict.status],
        "decided": f"{sum(bool(b.holds) for b in decided)} of {len(verdict.bars)} bars hold",
        "claim": sentence(story.sections["Claim"]),
        "source": marked(story.sections["Source"]),
        "control": sentence(story.sections.get("Control", "")),
        "note": sentence(story.sections.get("Note", "")),
        "figure": drawing,
        "figure_trouble": trouble,
        "bars": [_bar(bar) for bar in verdict.bars],
        "guest": marked(experiment.guest),
        "axes": _axes(table, list(experiment.sweep)),
        "points": _points(table),
        "is_long": len(table.records) > LONG,
        "columns": [
            {"title": words(name), "is_text": _is_text(table, name)}
            for name in [*columns, "wall_s"]
        ],
        "rows": [_row(table, columns, n) for n in range(len(table.records))],
    }


def sentence(words: str) -> Markup:
    """With a capital letter at its beginning."""
    return marked(words[:1].upper() + words[1:])


def marked(words: str) -> Markup:
    """Words of an experiment for the page: what is between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words, quote=False)))


def words(name: str) -> str:
    """A column's heading."""
    return {"wall_s": "wall time, s"}.get(name, name.replace("_", " "))


def _axes(table: Table, names: Sequence[str]) -> list[tuple[str, str]]:
    out = []
    for name in names:
        values = dict.fromkeys(str(record.params[name]) for record in table.records)
        out.append((words(name).capitalize(), ", ".join(values)))
    return out


def _points(table: Table) -> str:
    done = table.with_status(DONE)
    kept = sum(record.is_old for record in done)
    text = f"{len(done)} of {len(table.records)} measured"
    text += f", {sum(record.wall_s for record in done):.1f} s in all"
    text += f" ({kept} kept from earlier calls)" if kept else ""
    for status in (SKIPPED, BROKEN):
        count = len(table.with_status(status))
        text += f", {count} {status}" if count else ""
    return text


def _bar(bar: Bar) -> dict[str, Any]:
    css, mark, word = MARKS[bar.holds]
    return {"css": css, "mark": mark, "word": word, "statement": bar.statement,
            "found": bar.found, "is_control": bar.is_control}  # fmt: skip


def _is_text(table: Table, name: str) -> bool:
    return any(isinstance(record.row.get(name), str) for record in table.records)


def show(value: object) -> str:
    """A cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if isinstance(value, float):
        value = round(value, 2) + 0.0  # no negative zero
        return f"{value:,.2f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(of)}" for key, of in value.items())
    return "" if value is None else visible(str(value))


def _row(table: Table, columns: Sequence[str], n: int) -> dict[str, Any]:
    record = table.records[n]
    params = [name for name in columns if name in record.params]
    others = [name for name in columns if name not in record.params]

    def cell(name: str) -> dict[str, Any]:
        css = "text" if _is_text(table, name) else ""
        return {"text": show(record.row.get(name)), "css": css, "span": 1}

    if record.status == DONE:
        wall = {"text": show(float(record.wall_s)), "css": "", "span": 1}
        return {"css": "", "cells": [*(cell(name) for name in columns), wall]}
    why = f"{record.status}: {visible(record.reason.partition(chr(10))[0])}"
    last = {"text": why, "css": "why", "span": len(others) + 1}
    ordered = [cell(name) for name in params]
    return {"css": "broken" if record.status == BROKEN else "", "cells": [*ordered, last]}


def _figure(folder: Path, verdict: Verdict) -> tuple[Markup | None, str]:
    draw, name = verdict.loaded.experiment.draw, verdict.loaded.name
    if draw is None:
        return None, ""
    if not verdict.table.rows:
        return None, "no point was measured."
    try:
        png, svg = figure.render(draw, verdict.table, name)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    figure.save(folder / "figures", name, png, svg)
    title = html.escape(re.sub(r"\s+", " ", verdict.loaded.story.title), quote=True)
    return Markup(figure.inline(svg, title)), ""


def _csv(folder: Path, name: str, table: Table) -> None:
    where = folder / "tables"
    where.mkdir(parents=True, exist_ok=True)
    columns = table.columns()
    with (where / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "status", "reason", "wall_s"])
        for record in table.records:
            cells = [record.row.get(column, "") for column in columns]
            writer.writerow([*cells, record.status, record.reason, f"{record.wall_s:.3f}"])


def _markdown(folder: Path, name: str, table: Table, columns: Sequence[str]) -> None:
    """The same rows as on the page, for a document."""
    lines = ["| " + " | ".join(words(column) for column in columns) + " |"]
    lines.append("|" + "|".join("---" if _is_text(table, c) else "--:" for c in columns) + "|")
    for record in table.records:
        cells = [show(record.row.get(column)) for column in columns]
        if record.status != DONE:
            cells[-1] = record.status
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    (folder / "tables" / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
