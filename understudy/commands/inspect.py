"""`understudy inspect`.

What: shows both page walks of a linear address, of a running VM or of a snapshot.  Source: none.
Invariant: neither the VM nor the snapshot is changed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from understudy.commands import Refusal

if TYPE_CHECKING:
    from understudy.inspection import Inspection


def inspect(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="A linear address like 0xc0100000, or a register like rip."
        ),
    ],
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            "-c",
            metavar="NAME|SOCKET",
            help="Of a VM that runs: of a host, or what run --control got.",
        ),
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", "-s", metavar="FILE", help="Of a VM as it was: control save."),
    ] = None,
    unit: Annotated[
        bool,
        typer.Option("--unit", help="Show the translation of the code there (--execution bt)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same for programs.")] = False,
) -> None:
    """Show how a guest's linear address translates: its own walk, and the hypervisor's beside it.

    Every entry is decoded in the words of the processor's manual.  The hypervisor's walk is that
    of the EPT, or of the shadow page tables, by the VM's paging technique.

    With --unit: the guest's code there, and what runs in its stead.

    Examples:

      understudy run --guest 686 --control vm.sock

      understudy inspect --control vm.sock 0xc1000000

      understudy inspect --control vm.sock rip

      understudy inspect --control vm.sock --unit rip

      understudy inspect --snapshot vm.snapshot 0xc1000000 --json
    """
    if (control is None) == (snapshot is None):
        raise typer.BadParameter("say either --control SOCKET or --snapshot FILE")
    if unit and control is None:
        raise typer.BadParameter("--unit: a snapshot holds no translations; say --control SOCKET")
    # Imported late: `understudy --help` must work, and quickly, without the compiled half.
    from understudy.control import ControlError

    try:
        if unit and control is not None:
            typer.echo(_unit_of(control, address))
            return
        if control is not None:
            found = _of_running(control, address)
        elif snapshot is not None:
            found = _of_snapshot(snapshot, address)
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    typer.echo(json.dumps(found.inspect(), indent=2) if as_json else str(found))


def _of_running(name: str, wanted: str) -> "Inspection":
    from understudy.control import hosts
    from understudy.inspection import Inspection

    return Inspection.of(hosts.named(name).ask({"do": "inspect", "address": wanted}))


def _unit_of(name: str, wanted: str) -> str:
    from understudy.control import hosts

    return str(hosts.named(name).ask({"do": "unit", "address": wanted}))


def _of_snapshot(file: Path, wanted: str) -> "Inspection":
    from understudy import plain_file
    from understudy.control.actions import address
    from understudy.image_file import SnapshotError
    from understudy.vm import VM

    try:
        with VM.restore(plain_file.read(file)) as vm:
            return vm.inspect(address(vm, wanted))
    except SnapshotError as problem:
        raise Refusal(f"{file}: {problem}") from None
