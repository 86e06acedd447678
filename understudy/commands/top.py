"""`understudy top`.

What: a table of what the VMs of all hosts do, twice looked at and compared.  Source: none.
Invariants: what is shown of "now" is between the last two looks; the terminal is given back.
"""

import os
import select
import time
import tty
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from understudy.commands import Refusal
from understudy.commands.last_line import short
from understudy.quantities import bytes_in_words, parse_span
from understudy.terminal import RawMode, ending_signals, is_interactive
from understudy.visible import visible

Status = dict[str, Any]
COLUMNS: Final = (
    "VM", "STATE", "POOL", "WEIGHT", "CPU", "ALL", "STEAL", "SWITCHES", "EXITS/S", "INSTR/S",
    "MEMORY", "ACTIVE", "SWAPPED", "BACK/S",
)  # fmt: skip
LEFT: Final = ("VM", "STATE", "POOL")
FIRST: Final = 11  # columns, for which there is room where there are less than NARROW
WIDE: Final = 200
NARROW: Final = 120
PAGE: Final = 4096
QUIT: Final = (b"q", b"Q", b"")


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    every: Annotated[
        str, typer.Option("--every", metavar="TIME", help="How often to look.")
    ] = "1s",
) -> None:
    """Show what the VMs of your hosts do, again and again; q ends it.

    CPU: pCPUs used since the last look, by the host's time.  ALL: since the VM began.  STEAL: how
    much of a pCPU it wanted and did not get.  MEMORY: what the computer has given, and what the
    guest may have.  ACTIVE: an estimate of what it uses.  SWAPPED: what is in the host's swap file.
    BACK/S: pages of that which it needed again; why, is said below.

    Examples:

      understudy top

      understudy top --once
    """
    from understudy.control import ControlError

    try:
        span = parse_span(every)
    except ValueError as problem:
        raise typer.BadParameter(f"--every: {problem}") from None
    try:
        with ending_signals():
            if once or not is_interactive() or Console().is_dumb_terminal:
                before = _look()
                time.sleep(span)
                console = Console(width=None if is_interactive() else WIDE, highlight=False)
                console.print(_shown(before, _look(), console.width))
            else:
                with suppress(KeyboardInterrupt):
                    _again(span)
    except ControlError as problem:
        raise Refusal(str(problem)) from None


def _again(span: float) -> None:
    console = Console(highlight=False)
    with ExitStack() as stack:
        stack.enter_context(RawMode(0, tty.setcbreak))
        live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        before = last = _look()
        while True:
            live.update(_shown(before, last, console.width), refresh=True)
            ends_at = time.monotonic() + span
            while (left := ends_at - time.monotonic()) > 0:
                try:
                    if select.select([0], [], [], left)[0] and os.read(0, 1) in QUIT:
                        return
                except OSError:
                    return
            before, last = last, _look()


def _look() -> dict[str, Status]:
    from understudy.control import hosts

    return {status["host"]["name"]: status for status in hosts.statuses()}


# --- the table ---


def _shown(before: dict[str, Status], now: dict[str, Status], width: int) -> Group:
    parts: list[Text | Table] = []
    columns = COLUMNS if width >= NARROW else COLUMNS[:FIRST]
    for name, status in now.items():
        if "problem" in status["host"]:
            parts.append(Text(visible(f"{name}: {status['host']['problem']}")))
            continue
        then = before.get(name, status)
        parts.append(Text(_host_line(then["host"], status["host"]), style="bold"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(
                column, justify="left" if column in LEFT else "right", no_wrap=True,
                overflow="ellipsis",
            )  # fmt: skip
        known = {vm["name"]: vm for vm in then["vms"]}
        spans = _spans(then["host"], status["host"])
        for vm in status["vms"]:
            row = vm_row(known.get(vm["name"], vm), vm, *spans)[: len(columns)]
            table.add_row(*map(visible, row))
        parts.append(table)
        slow = [vm for vm in status["vms"] if _is_slow(known.get(vm["name"], vm), vm)]
        parts += [Text(visible(f"{vm['name']}: {vm['pages']['why']}")) for vm in slow]
    return Group(*parts) if parts else Group(Text("no host is up: understudy up FILE"))


def _spans(then: Status, now: Status) -> tuple[float, float]:
    """Host time in ns, and real time in s, between two looks at the same host."""
    if then["pid"] != now["pid"]:
        return 0, 0
    return now["now"] - then["now"], now["wall"] - then["wall"]


def _host_line(then: Status, now: Status) -> str:
    span, _ = _spans(then, now)
    old = {number: pcpu["running_ns"] for number, pcpu in enumerate(then["pcpus"])}
    uses = (
        _percent(max(0, pcpu["running_ns"] - old.get(number, 0)), span)
        for number, pcpu in enumerate(now["pcpus"])
    )
    rows = [f"{number}: {use}" for number, use in enumerate(uses)]
    memory = f"{bytes_in_words(now['resident'])} of {bytes_in_words(now['ram'])}"
    return visible(
        f"{now['name']}  {now['now'] / 1e9:.1f} s ({now['clock']})  pCPUs {_listed(rows)}  "
        f"memory {memory}, {now['memory']}"
    )


def _listed(rows: Iterable[str]) -> str:
    rows = list(rows)
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _is_slow(then: Status, now: Status) -> bool:
    """Whether it has waited for pages since the last look."""
    if "pages" not in now or "pages" not in then or now["state"] == "ended":
        return False
    return bool(now["pages"]["swapped_in"] > then["pages"]["swapped_in"])


def vm_row(then: Status, now: Status, span_ns: float, span_s: float) -> tuple[str, ...]:
    """What one VM has done between two looks."""
    if "ns" not in now:
        return (now["name"], now["state"], now["pool"], f"{now['weight']:g}", *[""] * 10)
    if now["state"] == "ended" or "ns" not in then:
        then = now
    old, new = then["ns"], now["ns"]
    total = sum(new.values()) / now["cpus"]
    old_pages, new_pages = then["pages"], now["pages"]
    back = new_pages["swapped_in"] - old_pages["swapped_in"]
    exits, instructions = (now[key] - then[key] for key in ("exits", "instructions"))
    return (
        now["name"], now["state"], now["pool"], f"{now['weight']:g}",
        _percent(new["running"] - old["running"], span_ns), _percent(new["running"], total),
        _percent(new["runnable"] - old["runnable"], span_ns), f"{now['switches']:,}",
        short(exits / span_s) if span_s else "-", _rate(instructions, span_s),
        f"{bytes_in_words(now['resident'])} of {bytes_in_words(now['memory'])}",
        bytes_in_words(new_pages["active"] * PAGE), bytes_in_words(new_pages["swapped"] * PAGE),
        f"{back / span_s:,.0f}" if span_s else "-",
    )  # fmt: skip


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def _rate(count: float, span_s: float) -> str:
    return f"{count / span_s / 1e6:,.1f}M" if span_s else "-"
