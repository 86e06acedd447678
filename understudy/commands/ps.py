"""`understudy ps` and `understudy down`.

What: the hosts of this user and their VMs, and their end.  Source: none.
Invariant: standard output has the table, or the JSON, and nothing else; while `down` waits, a
terminal's standard error says for whom.
"""

import json
import time
from typing import Annotated, Any, Final

import typer

from understudy.commands import Refusal
from understudy.commands.progress import StatusLine
from understudy.quantities import bytes_in_words
from understudy.visible import visible

COLUMNS: Final = ("HOST", "VM", "STATE", "POOL", "WEIGHT", "CPUS", "MEMORY", "GUEST", "TIME", "END")
LOOK_S: Final = 0.1
SAID_AFTER_S: Final = 0.5


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="All that there is, as JSON.")] = False,
) -> None:
    """Show which hosts of yours are up, and their VMs.

    Examples:

      understudy ps

      understudy ps --json
    """
    from understudy.control import ControlError, hosts

    try:
        found = hosts.statuses()
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    if as_json:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    rows = [COLUMNS, *(row for status in found for row in _rows(status))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _rows(status: dict[str, Any]) -> list[tuple[str, ...]]:
    name = visible(status["host"]["name"])
    if "problem" in status["host"]:
        return [(name, *["-"] * 8, visible(status["host"]["problem"]))]
    return [(name, *map(visible, _row(vm))) for vm in status["vms"]]


def _row(vm: dict[str, Any]) -> tuple[str, ...]:
    seconds = f"{vm.get('guest_ns', 0) / 1e9:.1f} s"
    return (
        vm["name"], vm["state"], vm["pool"], f"{vm['weight']:g}", str(vm["cpus"]),
        bytes_in_words(vm["memory"]), vm["guest"].rpartition("/")[2], seconds, vm["ended"],
    )  # fmt: skip


def down(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Hosts or VMs.  Default: all.")
    ] = None,
) -> None:
    """Have the guests of hosts power themselves off, and wait until they have.

    A guest that does not is ended when its host's grace is over; if it has been told before, it is
    ended at once.

    Examples:

      understudy down

      understudy down web

      understudy down hosts
    """
    from understudy.control import ControlError, folder, hosts
    from understudy.control.hosts import Target

    try:
        up = folder.hosts()
        targets = [
            Target(folder.socket_of(name)) if name in up else hosts.target(name)
            for name in (up if names is None else names)
        ]
        for target in targets:
            target.ask({"do": "down"}, timeout_s=hosts.PATIENCE_S)
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    with StatusLine("down", patience_s=SAID_AFTER_S) as line:
        while waits := [words for target in targets for words in _waits(target)]:
            line.say(visible(", ".join(waits)))
            time.sleep(LOOK_S)


def _waits(target: Any) -> list[str]:
    """What is not down yet, in words: its VMs, or the host itself."""
    from understudy.control import ControlError, folder, hosts

    host = target.socket.stem
    if host not in folder.hosts():
        return []
    try:
        status = hosts.status(target)
    except ControlError:
        return [host]  # it ends, or is busy with that
    living = [vm for vm in status["vms"] if vm["state"] != "ended"]
    if target.vm is None:
        return [_left(vm) for vm in living] or [host]
    return [_left(vm) for vm in living if vm["name"] == target.vm]


def _left(vm: dict[str, Any]) -> str:
    left = vm["ends_in_s"]
    return str(vm["name"]) if left is None else f"{vm['name']} ({left:.0f} s left)"
