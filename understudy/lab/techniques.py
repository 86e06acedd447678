"""The paging techniques that experiments compare, in the lecture's order.

Source: lecture, "Optimizations for memory virtualization".  Invariant: a technique that is not
built is skipped, with that reason; one that is built is compared without another edit.
"""

from collections.abc import Mapping
from typing import Any, Final

from understudy.lab.experiment import Skip
from understudy.paging import Paging

LECTURE: Final = ("eager", "lazy", "vtlb", "ept")
SHADOW: Final = ("eager", "lazy", "vtlb")


def techniques() -> list[str]:
    """The lecture's four, built or not, and whatever else there is."""
    return [*LECTURE, *sorted(Paging.ALL.keys() - set(LECTURE))]


def need(name: str) -> str:
    """The name again, or Skip."""
    if name not in Paging.ALL:
        raise Skip(f"the paging technique {name} is not built")
    return name


def since(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted between two `VM.counts()`: differences of numbers, name by name."""
    out: dict[str, Any] = {}
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, Mapping):
            out[str(name)] = since(value, old if isinstance(old, Mapping) else {})
        elif isinstance(value, int):
            out[str(name)] = value - (old if isinstance(old, int) else 0)
    return out


def total(numbers: Mapping[str, Any], *leave_out: str) -> int:
    """The sum of a mapping's numbers."""
    return sum(n for name, n in numbers.items() if name not in leave_out)
