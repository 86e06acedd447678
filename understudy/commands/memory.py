"""`understudy memory`.

What: what each VM of a host has of its memory, drawn.  Source: none.
Invariant: standard output has the drawing, or the JSON, and nothing else.
"""

import json
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from understudy.commands import Refusal
from understudy.quantities import bytes_in_words
from understudy.terminal import is_interactive
from understudy.visible import visible

PAGE: Final = 4096
WIDE: Final = 100
ROW: Final = 64  # cells in a line of a map
KINDS: Final = {
    "own": ("o", "green", "its own"),
    "shared": ("s", "blue", "shared, and the same as others'"),
    "zero": ("z", "cyan", "shared, all zero"),
    "sampled": ("?", "yellow", "watched whether it is used"),
    "swapped": ("w", "red", "swapped out"),
    "ballooned": ("b", "magenta", "in the balloon"),
    "free": (".", "bright_black", "not used"),
}
"""By the kind of a page: its letter in a map, its color, and what it is."""
COLUMNS: Final = ("VM", "SIZE", "TARGET", "USES", "SAVED", *(kind.upper() for kind in KINDS),
                  "HINTS", "SWAPPED IN", "ACTIVE")  # fmt: skip


def memory(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[HOST]...", help="Hosts.  Default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that there is, as JSON.")] = False,
) -> None:
    """Show what the VMs of your hosts have of their memory, as numbers and as maps.

    A map goes from the first page of a VM to its last.  Each block stands for the kind that most
    of the pages there are.

    Examples:

      understudy memory

      understudy memory --json
    """
    from understudy.control import ControlError, folder, hosts

    try:
        up = folder.hosts()
        for name in names or ():
            if name not in up:
                known = ", ".join(up) or "none is up: understudy up FILE"
                raise ControlError(f"there is no host {name!r}; {known}")
        told = {
            name: hosts.Target(folder.socket_of(name)).ask(
                {"do": "memory"}, timeout_s=hosts.PATIENCE_S
            )
            for name in names or up
        }
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    if as_json:
        typer.echo(json.dumps(told, indent=2, sort_keys=True))
        return
    console = Console(width=None if is_interactive() else 2 * WIDE, highlight=False)
    for name, one in told.items():
        console.print(shown(name, one, is_plain=console.color_system is None))
    if not told:
        typer.echo("no host is up: understudy up FILE")


def shown(name: str, told: dict[str, Any], *, is_plain: bool) -> Group:
    """One host: a line, a table, and a map of each VM, of letters if there are no colors."""
    line = Text(visible(
        f"{name}  {bytes_in_words(told['total'] * PAGE)}: {bytes_in_words(told['free'] * PAGE)} "
        f"free, {bytes_in_words(told['own'] * PAGE)} of the hypervisor's own, "
        f"{bytes_in_words(told['in_file'] * PAGE)} in the swap file\n{told['why']}"
    ), style="bold")  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "VM" else "right", no_wrap=True)
    for vm in told["vms"]:
        table.add_row(*map(visible, _row(vm)))
    parts: list[Text | Table] = [line, table]
    for vm in told["vms"]:
        parts += [Text(visible(f"{vm['name']}: {vm['why']}")), _map(vm["map"], is_plain)]
    parts.append(_legend(is_plain))
    return Group(*parts)


def _row(vm: dict[str, Any]) -> tuple[str, ...]:
    pages = (vm["size"], vm["target"], vm["consumed"], vm["saved"],
             *(vm["kinds"][kind] for kind in KINDS), vm["hints"])  # fmt: skip
    sizes = (bytes_in_words(count * PAGE) for count in pages)
    return vm["name"], *sizes, f"{vm['swapped_in']:,}", bytes_in_words(vm["active"] * PAGE)


def _map(cells: str, is_plain: bool) -> Text:
    colors = {letter: color for letter, color, _ in KINDS.values()}
    drawn = Text()
    for at in range(0, len(cells), ROW):
        drawn.append("  ")
        for letter in cells[at : at + ROW]:
            drawn.append(letter if is_plain else "█", style=colors.get(letter, ""))
        drawn.append("\n")
    return drawn


def _legend(is_plain: bool) -> Text:
    drawn = Text()
    for letter, color, words in KINDS.values():
        drawn.append(letter if is_plain else "█", style=color)
        drawn.append(f" {words}   ")
    return drawn
