"""`understudy fetch`.

What: gets guests into the cache and shows which there are.  Source: none.
Invariant: a guest that is already there costs a check of its bytes and nothing else.
"""

from typing import Annotated

import typer

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

      understudy fetch 686 686-pae
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
    rows = [("NAME", "STATUS", "VERSION", "WHAT")]
    rows += [(row.name, row.status, row.version, row.description) for row in debian.listing()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        typer.echo("  ".join([*cells, row[3]]))
