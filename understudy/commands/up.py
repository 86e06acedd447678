"""`understudy up`.

What: starts a host and its VMs from a file, here or in the background.  Source: none.
Invariants: however it ends, its VMs are ended, its socket is gone and the terminal is as it was;
the status is 0 only if all VMs ended as they should.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from understudy.commands import Refusal
from understudy.commands.background import in_background
from understudy.commands.progress import Steps
from understudy.quantities import bytes_in_words
from understudy.terminal import handled
from understudy.visible import visible

if TYPE_CHECKING:
    from understudy.fleet.fleet import Fleet
    from understudy.fleet.member import Member
    from understudy.fleet.plan import HostPlan


def up(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A host and its VMs, as TOML.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the file is as it should be.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Go on in the background when all have started.")
    ] = False,
) -> None:
    """Start a host with several VMs on it, as a file describes them.

    Ctrl-C (or understudy down) has all guests power themselves off; a second one ends them.  The
    status is 0 if all VMs ended as they should.  What each prints is in a file, see ps, and to be
    had with understudy console.

    Examples:

      understudy up hosts.toml

      understudy up --check hosts.toml

      understudy up --detach hosts.toml

    A file:

      [host]

      pcpus = 2

      [vm.web]

      guest = "cloud-amd64"

      memory = "256M"

      weight = 2

      [vm.job]

      guest = "cloud-amd64"

      exec = "sha256sum /dev/zero | head -c 1"

      cap = 0.5
    """
    # Imported late: `understudy --help` must work, and quickly, without the compiled half.
    from understudy.control import ControlError, folder
    from understudy.fleet.plan import PlanError, read

    try:
        plan = read(file)
        if check:
            typer.echo(f"{file}: {_in_words(plan)}")
            return
        with folder.lock(plan.name):
            if not detach:
                raise typer.Exit(_run(plan, lambda: None))
            log = folder.log_of(plan.name)
            status = in_background(log, lambda ready: _run(plan, ready))
    except (PlanError, ControlError) as problem:
        raise Refusal(str(problem)) from None
    if status is not None:
        raise typer.Exit(status)
    typer.echo(f"{plan.name} is up: understudy ps; its log is {log}")


def _in_words(plan: "HostPlan") -> str:
    return f"host {plan.name} with {plan.pcpus} pCPUs, {len(plan.vms)} VMs"


def _run(plan: "HostPlan", ready: Callable[[], None]) -> int:
    from understudy.control import ControlSocket, folder
    from understudy.fleet.actions import ACTIONS
    from understudy.fleet.fleet import Fleet

    consoles = folder.consoles_of(plan.name)
    consoles.mkdir(mode=0o700, exist_ok=True)
    try:
        with ExitStack() as stack:
            fleet = stack.enter_context(Fleet(plan, consoles, _tell))
            stack.enter_context(ControlSocket(fleet, folder.socket_of(plan.name), ACTIONS))
            stack.enter_context(_ending_signals(fleet))
            with Steps(plan.name) as steps:
                fleet.start(steps)
            ready()
            return 0 if fleet.run() else 1
    except MemoryError as problem:
        size = bytes_in_words(plan.ram)
        words = str(problem) or f"this computer cannot give {size}"
        raise Refusal(f"{plan.file}: host.ram: {words}") from None


def _tell(member: "Member") -> None:
    """A line for what has become of a VM."""
    plan, left = member.plan, member.ends_in_s
    if left is not None:
        words = f"told to power itself off; ended in {left:.3g} s if it does not"
    elif member.is_alive:
        cpus = plan.config.topology.count
        size = bytes_in_words(int(plan.config.memory))
        words = f"started ({plan.guest}, {size}, {cpus} vCPU{'s' * (cpus > 1)}, pool {plan.pool})"
    else:
        words = f"ended{' badly' * member.is_bad}: {member.how}"
    with suppress(OSError):  # nobody reads it any more, and the VMs go on
        print(visible(f"{member.name}: {words}"), flush=True)


@contextmanager
def _ending_signals(fleet: "Fleet") -> Iterator[None]:
    """Ctrl-C and its kin have all VMs power themselves off, a second time end them."""

    def end(_number: int, _frame: object) -> None:
        fleet.post(fleet.down)

    try:
        with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), end):
            yield
    finally:
        sys.stdout.flush()
