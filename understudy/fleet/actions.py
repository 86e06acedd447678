"""What can be asked of a host that was started from a file, and of each of its VMs.

A request with "vm" is for that one: what can be asked of any running VM (`understudy.control`),
and what only a VM of a host has.  Source: ours.
Invariant: what cannot be done is a ControlError of one line; the host goes on.
"""

import difflib
from collections.abc import Callable
from typing import Any, Final

from understudy.control import actions as of_any
from understudy.control.actions import ControlError, Request
from understudy.fleet.fleet import Fleet
from understudy.fleet.keys import VM, Key
from understudy.fleet.member import Member
from understudy.linux import VM as Machine
from understudy.overcommit.accounts import accounts

ACTIONS: Final[dict[str, Callable[[Fleet, Request], Any]]] = {}
CHANGES: Final = ("weight", "cap", "pool")
"""What can be changed of a VM while it runs."""
OWN: Final = (*CHANGES, "pause", "resume", "console", "down")


def action(function: Callable[[Fleet, Request], Any]) -> Callable[[Fleet, Request], Any]:
    """Put a function into the table, under its name."""
    ACTIONS[function.__name__] = function
    return function


@action
def ps(fleet: Fleet, request: Request) -> dict[str, Any]:
    """The host and all its VMs."""
    return fleet.status()


@action
def memory(fleet: Fleet, request: Request) -> dict[str, Any]:
    """What each VM has of the host's memory, kind by kind, and a map of it."""
    return accounts(fleet.host.stock).plain()


@action
def down(fleet: Fleet, request: Request) -> str:
    """Have the VM power itself off, or all; if it was told before, it ends at once."""
    fleet.down([_member(fleet, request).name] if "vm" in request else None)
    return "going down"


@action
def console(fleet: Fleet, request: Request) -> Any:
    """The VM's console, from now on; with "type", what comes is typed, if nobody else types."""
    member = _member(fleet, request)
    first = {"vm": member.name, "ended": member.how}
    wants = request.get("type") is True
    return member.line.attach(first, member.shown, fleet.post, wants_to_type=wants)


@action
def pause(fleet: Fleet, request: Request) -> str:
    """Let the VM stand still."""
    member = _living(fleet, request)
    if member.ends_at is not None:
        raise ControlError(f"{member.name} is going down")
    member.pause()
    return "paused"


@action
def resume(fleet: Fleet, request: Request) -> str:
    """Let it go on."""
    _living(fleet, request).resume()
    return "going on"


def _change(name: str) -> None:
    """The action that asks for or changes one of `CHANGES`."""
    key: Key = VM[name]

    def change(fleet: Fleet, request: Request) -> Any:
        machine = _machine(fleet, request)
        if "to" in request:
            wanted = request["to"]
            if name == "cap" and wanted is None:
                machine.cap = None
            else:
                try:
                    setattr(machine, name, key.read(wanted))
                except ValueError as problem:
                    raise ControlError(f"{name}: {problem}") from None
        return getattr(machine, name)

    change.__name__, change.__doc__ = name, key.words
    action(change)


def _of_any(name: str) -> None:
    """The action that any running VM answers."""
    function = of_any.ACTIONS[name]
    ACTIONS[name] = lambda fleet, request: function(_machine(fleet, request), request)


def _member(fleet: Fleet, request: Request) -> Member:
    name = request.get("vm")
    if isinstance(name, str) and name in fleet.members:
        return fleet.members[name]
    near = difflib.get_close_matches(str(name), fleet.members, 1)
    expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(fleet.members)}"
    raise ControlError(f"there is no VM {name!r}; {expected}")


def _living(fleet: Fleet, request: Request) -> Member:
    member = _member(fleet, request)
    if not member.is_alive:
        raise ControlError(f"{member.name} has ended: {member.how}")
    if member.vm is None:
        raise ControlError(f"{member.name} is starting: ask again")
    return member


def _machine(fleet: Fleet, request: Request) -> Machine:
    machine = _living(fleet, request).vm
    assert machine is not None
    return machine


for _name in CHANGES:
    _change(_name)
for _name in of_any.ACTIONS:
    _of_any(_name)
