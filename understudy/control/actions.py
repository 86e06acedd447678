"""What can be asked of a running VM, and how each is answered.

Each action is a function of the VM and the request that returns plain values; its name is what a
request says in "do".  They run on the VM's own thread, between two exits.
Source: none.  Invariant: what cannot be done is a ControlError of one line; the VM goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from understudy.backends.cable import NetworkError
from understudy.backends.folder import ShareError
from understudy.backends.opening import ImageError
from understudy.backends.unix_ports import VsockError
from understudy.plug import KINDS
from understudy.state import restore
from understudy.telling import unit_of

if TYPE_CHECKING:
    from understudy.vm import VM

Request = dict[str, Any]
Action = Callable[["VM", Request], Any]
ACTIONS: Final[dict[str, Action]] = {}


class ControlError(Exception):
    """It cannot be done: the text is one line that says why."""


def action(function: Action) -> Action:
    """Put a function into the table, under its name."""
    ACTIONS[function.__name__] = function
    return function


@action
def status(vm: "VM", request: Request) -> dict[str, Any]:
    """What runs, how far it is, and by which techniques."""
    return {
        "name": vm.name, "engine": vm.engine, "clock": vm.clock_kind, "paging": vm.pages.name,
        "execution": vm.execution,
        "guest_ns": vm.clock.now(), "instructions": vm.instructions,
    }  # fmt: skip


@action
def counts(vm: "VM", request: Request) -> dict[str, Any]:
    """Everything counted."""
    return vm.counts()


@action
def describe(vm: "VM", request: Request) -> str:
    """The decoded state."""
    vm.vcpus[0].leave_guest()
    return vm.describe()


@action
def inspect(vm: "VM", request: Request) -> dict[str, Any]:
    """Both page walks of "address": a number, or the name of a register."""
    return vm.inspect(address(vm, request.get("address"))).inspect()


@action
def unit(vm: "VM", request: Request) -> str:
    """Translated code with the instruction at "address", beside the guest's own."""
    try:
        with vm.turns.still():
            return unit_of(vm.vcpus[0].guest, address(vm, request.get("address")))
    except ValueError as problem:
        raise ControlError(str(problem)) from None


@action
def paging(vm: "VM", request: Request) -> str:
    """The paging technique's name; with "to", another takes over first."""
    wanted = request.get("to")
    if wanted is not None:
        vm.change_paging(wanted)
    return vm.paging


@action
def execution(vm: "VM", request: Request) -> str:
    """The technique of execution's name; with "to", another takes over first."""
    wanted = request.get("to")
    if wanted is not None:
        vm.change_execution(wanted)
    return vm.execution


@action
def plug(vm: "VM", request: Request) -> str:
    """Put in one of `KINDS`, as "disk" with the fields of a `Disk`."""
    kind = next((kind for kind in KINDS if kind in request), "net")
    try:
        name = vm.plug(restore(KINDS[kind][0], request.get(kind), kind))
    except (ValueError, RuntimeError, ImageError, NetworkError, ShareError, VsockError) as problem:
        raise ControlError(str(problem)) from None
    return f"{name} is plugged in"


@action
def unplug(vm: "VM", request: Request) -> str:
    """Ask the guest to give up what is plugged in, "what" by its name."""
    try:
        vm.unplug(str(request.get("what")))
    except (ValueError, RuntimeError) as problem:
        raise ControlError(str(problem)) from None
    return f"the guest was asked to give up {request['what']}"


@action
def save(vm: "VM", request: Request) -> dict[str, Any]:
    """Write a snapshot to "file"; it appears there whole or not at all."""
    name = request.get("file")
    if not isinstance(name, str) or not name:
        raise ControlError('save: expected "file" with the name of a file')
    try:
        length = vm.write(Path(name))
    except OSError as error:
        raise ControlError(f"{name}: {error.strerror or error}") from None
    except ShareError as error:  # of a folder whose server cannot be saved
        raise ControlError(str(error)) from None
    return {"file": name, "bytes": length}


@action
def stop(vm: "VM", request: Request) -> str:
    """End the VM, as if its power were cut."""
    vm.stop("asked to through the control socket")
    return "stopping"


def address(vm: "VM", wanted: object) -> int:
    """A linear address: a number, as text or not, or a register's name for what it holds."""
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        number = wanted
    elif isinstance(wanted, str):
        text = wanted.strip().lower()
        try:
            number = int(text, 0)
        except ValueError:
            vm.vcpus[0].leave_guest()
            registers = vm.vcpus[0].guest.registers()
            if text not in registers:
                raise ControlError(
                    f"address {wanted!r}: expected a number like 0xc0100000, or a register like rip"
                ) from None
            number = registers[text]
            if text in ("rip", "rsp"):  # offsets into a segment
                number += registers["cs_base" if text == "rip" else "ss_base"]
    else:
        raise ControlError('inspect: expected "address", a number or the name of a register')
    if not 0 <= number < 1 << 64:
        raise ControlError(f"address {number:#x}: expected 0 to 0xffffffffffffffff")
    return number
