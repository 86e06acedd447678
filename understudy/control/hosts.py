"""The hosts of this user that are up, and their VMs, as others see them.

Source: ours.  Invariant: a host that does not answer keeps nobody from the others.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy.control import folder
from understudy.control.actions import ControlError, Request
from understudy.control.sockets import ask

PATIENCE_S: Final = 10.0


@dataclass(frozen=True)
class Target:
    """Whom a request is for: a host, or one VM."""

    socket: Path
    vm: str | None = None

    def request(self, request: Request) -> Request:
        """The request, with the VM's name."""
        return request if self.vm is None else request | {"vm": self.vm}

    def ask(self, request: Request, *, timeout_s: float | None = None) -> Any:
        """Its answer, or ControlError."""
        return ask(self.socket, self.request(request), timeout_s=timeout_s)


def statuses(name: str | None = None) -> list[dict[str, Any]]:
    """What each host says of itself and its VMs; with "problem" where it says nothing."""
    found = []
    for one in folder.hosts() if name is None else [name]:
        try:
            found.append(ask(folder.socket_of(one), {"do": "ps"}, timeout_s=PATIENCE_S))
        except ControlError as problem:
            found.append({"host": {"name": one, "problem": str(problem)}, "vms": []})
    return found


def status(of: Target) -> dict[str, Any]:
    """What the target's host says.  ControlError if it says nothing."""
    told: dict[str, Any] = ask(of.socket, {"do": "ps"}, timeout_s=PATIENCE_S)
    return told


def target(name: str) -> Target:
    """The VM that is called so, or HOST/VM if several are.  ControlError if there is none."""
    known = [(status["host"]["name"], vm["name"]) for status in statuses() for vm in status["vms"]]
    matching = [(host, vm) for host, vm in known if name in (vm, f"{host}/{vm}")]
    if len(matching) == 1:
        host, vm = matching[0]
        return Target(folder.socket_of(host), vm)
    if matching:
        names = ", ".join(f"{host}/{vm}" for host, vm in matching)
        raise ControlError(f"several VMs are called {name}: say one of {names}")
    near = difflib.get_close_matches(name, [vm for _, vm in known], 1)
    if near:
        raise ControlError(f"there is no VM {name!r}; did you mean {near[0]}?")
    names = ", ".join(f"{host}/{vm}" for host, vm in known) or "none is up: understudy up FILE"
    raise ControlError(f"there is no VM {name!r}; {names}")


def named(name: str) -> Target:
    """A VM by its name, or the socket that `run --control` was given."""
    path = Path(name)
    return Target(path) if path.suffix == ".sock" or path.exists() else target(name)
