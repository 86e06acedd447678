"""`understudy fetch`.

What: gets guests into the cache and shows which there are.  Source: none.
Invariant: a guest that is already there costs a check of its bytes and nothing else.
"""

from typing import Annotated

import typer

from understudy.commands import Refusal
from understudy.commands.progress import Steps
from understudy.guests import debian
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.guests.release import RELEASES

USUAL = "cloud-amd64"


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help=f"Which guests.  Default: {USUAL}."),
    ] = None,
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PACKAGE",
            help="A Debian package to install in a whole Debian.  May be repeated.",
        ),
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

      understudy fetch debian --with stress-ng
    """
    try:
        if show:
            _list()
            return
        for name in dict.fromkeys(names or [USUAL]):
            if packages and name not in RELEASES:
                raise typer.BadParameter(f"--with goes with a whole Debian, and {name} is none")
            with Steps(name) as steps:
                version = _fetched(name, packages or [], steps)
            more = "".join(f" --with {package}" for package in packages or [])
            typer.echo(f"{name}{version} is ready: understudy run --guest {name}{more}")
    except GuestError as error:
        raise Refusal(str(error)) from None


def _fetched(name: str, packages: list[str], steps: Steps) -> str:
    """Fetch a guest; the version of it, with a space before."""
    if name in RELEASES:
        from understudy.linux import VM  # late: a kernel is fetched without the compiled half

        image = VM.whole(name, packages, steps)
        version = Cache().manifest(image.parent.name).get("version", "")
    else:
        version = debian.fetch(name, steps).version
    return f" {version}" if version else ""


def _list() -> None:
    rows = [("NAME", "STATUS", "VERSION", "WHAT")]
    rows += [(row.name, row.status, row.version, row.description) for row in debian.listing()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        typer.echo("  ".join([*cells, row[3]]))
