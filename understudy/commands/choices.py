"""What `--cpu help`, `--paging help`, `--hide-virtio help` and so on say: the choices there are.

Source: the rooms where the choices are registered, and the first line of each technique's file.
Invariant: what is said to be there can be chosen.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Final

from understudy.commands.cpu_help import cpu_help
from understudy.devices import Device
from understudy.devices.virtio.pci import VirtioPci
from understudy.execution import Execution
from understudy.paging import Paging


def _techniques(option: str, known: Mapping[str, type]) -> str:
    """A line for each, in its own words."""
    wide = max(map(len, known))
    lines = [f"--{option} NAME"]
    for name, kind in sorted(known.items()):
        words = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0].rstrip(".")
        lines.append(f"  {name:<{wide}}  {words}")
    return "\n".join(lines)


def _exits() -> str:
    """A line for each that an execution technique can be asked for."""
    lines = ["--exit NAME[,NAME]"]
    for technique, kind in sorted(Execution.ALL.items()):
        lines += [
            f"  {name:<10}  {technique}: {words}" for name, words in kind.optional_exits.items()
        ]
    return "\n".join(lines)


def _virtio() -> str:
    """A line for each feature that can be hidden, and which devices have it."""
    lines = ["--hide-virtio FEATURE[,FEATURE]"]
    kinds = {name: kind for name, kind in Device.ALL.items() if issubclass(kind, VirtioPci)}
    for switch in sorted({one for kind in kinds.values() for one in kind.switches}):
        devices = [name for name, kind in sorted(kinds.items()) if switch in kind.switches]
        words = "all virtio devices" if len(devices) == len(kinds) else ", ".join(devices)
        lines.append(f"  {switch:<12}  {words}")
    return "\n".join(lines)


CHOICES: Final[dict[str, Callable[[], str]]] = {
    "cpu": cpu_help,
    "paging": lambda: _techniques("paging", Paging.ALL | Paging.PV),
    "exits": _exits,
    "hide_virtio": _virtio,
    "execution": lambda: _techniques("execution", Execution.ALL),
}
"""By the field of `Config`."""
