"""`understudy lab`.

What: runs experiments, shows what became of their claims, writes the report.  Source: none.
Invariants: the status is 0 only if no claim failed and no point broke; an interrupted lab says what
is kept and goes on from there when called again.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from rich.text import Text

from understudy.commands import Refusal
from understudy.commands.progress import Steps
from understudy.lab import sweep, version
from understudy.lab.discover import LabError, Loaded, find, folder, load, names
from understudy.lab.store import Store
from understudy.lab.table import DONE, SKIPPED
from understudy.lab.verdict import Status, Verdict, judge
from understudy.visible import visible

COLORS = {
    Status.PASSED: "green",
    Status.PARTIAL: "yellow",
    Status.SKIPPED: "bright_black",
    Status.FAILED: "red",
}
NEEDED = ("distributed", "matplotlib", "jinja2")


def lab(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Which experiments.  None: list them."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="All experiments.")] = False,
    quick: Annotated[bool, typer.Option("--quick", "-q", help="Shorter sweeps.")] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Dask scheduler, tcp://host:port, to run points."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes on this computer.  Default: one for each core; 0: none, run here.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where report and results go.")
    ] = Path("build/lab"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what is known already.")
    ] = False,
    where: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="Experiments of your own."),
    ] = None,
) -> int:
    """Run experiments: claims about virtualisation, decided by counting.

    Writes DIR/report.html, figures and tables.  Finished points are kept: after Ctrl-C, the same
    command goes on from there.  The status is 1 if a claim failed.

    Examples:

      understudy lab

      understudy lab walk_references

      understudy lab --all --quick
    """  # fmt: skip
    if wanted and everything:
        raise Refusal("name experiments or say --all, not both", status=2)
    place = where if where is not None else folder()
    try:
        if not wanted and not everything:
            _list(place)
            return 0
        _require()
        return _run(find(place, wanted or []), quick, scheduler, workers, output, fresh)
    except LabError as error:
        raise Refusal(str(error)) from None


def _list(place: Path) -> None:
    titles = {name: load(place / f"{name}.py").story.title for name in names(place)}
    width = max(map(len, titles))
    for name, title in titles.items():
        typer.echo(f"{name.ljust(width)}  {title}")


def _require() -> None:
    import importlib.util

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(
            f"the lab needs Python packages that are not here ({', '.join(missing)}): "
            "pip install 'understudy[lab]'"
        )


def _run(
    experiments: Sequence[Loaded],
    quick: bool,
    scheduler: str | None,
    workers: int | None,
    output: Path,
    fresh: bool,
) -> int:
    talk = Console(stderr=True)
    store = Store(output.resolve() / "results")
    with Steps("guests", talk) as steps:
        made = sweep.plan(experiments, store, quick=quick, fresh=fresh, say=steps)
    begin = time.monotonic()
    try:
        with Ticker(talk, made) as ticker:
            sweep.run(made, store, scheduler=scheduler, workers=workers, on_done=ticker.done)
    except KeyboardInterrupt:
        done = sweep.kept(made, store)
        raise Refusal(
            f"interrupted: {done} finished points are kept; the same command goes on from there",
            status=130,
        ) from None
    except (OSError, TimeoutError) as error:
        if scheduler is None:
            raise
        raise LabError(f"no scheduler answers at {scheduler}: {error}") from error
    verdicts = [judge(loaded, made.table(loaded)) for loaded in experiments]
    from understudy.lab import report

    written = report.write(output, verdicts, quick=quick, version=version.of_package()[:12])
    screen = Console()
    for verdict in verdicts:
        _show(screen, verdict, alone=len(verdicts) == 1)
    screen.print(report.lead(verdicts), markup=False, highlight=False)
    screen.print(
        f"{os.path.relpath(written.page)}   ({time.monotonic() - begin:.0f} s)",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return int(any(verdict.status is Status.FAILED for verdict in verdicts))


class Ticker:
    """Progress: a bar on a terminal, else a line now and then."""

    EVERY_S = 10.0

    def __init__(self, talk: Console, made: sweep.Plan) -> None:
        self.talk, self.total = talk, len(made.tasks)
        self.kept, self.count, self.last = len(made.known), 0, time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]lab"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.description}"), console=talk, transient=True,
            disable=not talk.is_terminal or talk.is_dumb_terminal,
        )  # fmt: skip

    def __enter__(self) -> "Ticker":
        if self.total:
            kept = f" ({self.kept} are known)" if self.kept else ""
            self._say(f"{self.total} points to measure{kept}")
        self.bar.start()
        self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.bar.stop()

    def _say(self, text: str) -> None:
        self.talk.print(f"lab: {visible(text)}", markup=False, highlight=False)

    def done(self, task: sweep.Task, outcome: sweep.Outcome) -> None:
        """One more."""
        self.count += 1
        params = " ".join(str(value) for value in task.params.values())
        self.bar.update(self.task, advance=1, description=f"{task.path.stem} {params}")
        if outcome.status not in (DONE, SKIPPED):
            self._say(f"{task.path.stem} {params}: {outcome.reason.partition(chr(10))[0]}")
        now = time.monotonic()
        if self.bar.disable and now - self.last >= self.EVERY_S:
            self.last = now
            self._say(f"{self.count} of {self.total} points, the last: {task.path.stem} {params}")


def _show(screen: Console, verdict: Verdict, alone: bool) -> None:
    head = Text.assemble(
        (verdict.status.value.upper(), f"bold {COLORS[verdict.status]}"), "  ",
        (verdict.loaded.name, "bold"), f"  {verdict.loaded.story.title}",
    )  # fmt: skip
    screen.print(head)
    if alone:
        _table(screen, verdict)
    for bar in verdict.bars:
        if alone or not bar.holds:
            mark = {True: "✓", False: "✗", None: "–"}[bar.holds]
            kind = "control: " if bar.is_control else ""
            found = visible(bar.found)
            screen.print(f"  {mark} {kind}{bar.statement}: {found}", markup=False,
                         highlight=False)  # fmt: skip
    reasons: dict[str, int] = {}
    for record in verdict.table.records:
        if record.status != DONE:
            line = visible(f"{record.status}: {record.reason.partition(chr(10))[0]}")
            reasons[line] = reasons.get(line, 0) + 1
    for line, count in reasons.items():
        points = f"{count} point{'s' * (count != 1)}"
        screen.print(f"  – {points} {line}", markup=False, highlight=False)


def _table(screen: Console, verdict: Verdict) -> None:
    from understudy.lab.report import show, words

    table = verdict.table
    columns = list(verdict.loaded.experiment.columns) or table.columns()
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        is_text = any(isinstance(row.get(name), str) for row in table.rows)
        grid.add_column(words(name), justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(show(row.get(name))) for name in columns))
    screen.print(grid)
