"""`understudy fetch`.

What: gets guests into the cache and shows which there are.  Source: none.
Invariant: a guest that is already there costs a check of its bytes and nothing else.
"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from understudy.commands import Refusal
from understudy.commands.progress import Steps
from understudy.guests import debian
from understudy.guests.entry import GuestError

USUAL = "cloud-amd64"


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help=f"Which guests.  Default: {USUAL}."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", "-l", help="Only show which there are, and which are here.")
    ] = False,
) -> None:
    """Get guests through this computer's own package client, into a cache of yours.

    Needs no root and changes nothing on the system.  What is there is not fetched again.

    Examples:

      understudy fetch --list

      understudy fetch cloud-amd64

      understudy fetch amd64 memtest86+
    """
    try:
        if show:
            _list()
            return
        for name in dict.fromkeys(names or [USUAL]):
            with Steps(name) as steps:
                guest = debian.fetch(name, steps)
            version = f" {guest.version}" if guest.version else ""
            typer.echo(f"{name}{version} is ready: understudy run --guest {name}")
    except GuestError as error:
        raise Refusal(str(error)) from None


def _list() -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "WHAT", "STATUS", "VERSION"):
        table.add_column(column, no_wrap=column != "WHAT")
    for row in debian.listing():
        table.add_row(row.name, row.description, row.status, row.version)
    Console(highlight=False).print(table)
