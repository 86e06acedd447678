"""A guest under one technique and under VMX: after every so many instructions all is the same."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix import programs as p
from understudy.execution.deprivileged import Deprivileged
from understudy.guests.entry import GuestError
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind
from understudy.vm import VM

CPU = "understudy,-pmu,-xsaves"
Make = Callable[[str], VM]


def seen(vm: VM) -> dict[str, Any]:
    """What a guest could see of its processor."""
    processor = vm.processors[0]
    out = dict(vm.vcpus[0].registers())
    out |= {f"ymm{n}": processor.ymm(n) for n in range(16)}
    return out | {"retired": vm.instructions, "tsc": processor.tsc, "fx": processor.fxsave()}


def guest_of(vm: VM) -> Deprivileged:
    """The first vCPU's."""
    guest = vm.vcpus[0].guest
    assert isinstance(guest, Deprivileged)
    return guest


def together(one: VM, other: VM, step: int, most: int) -> StopKind:
    """Run both, so many instructions at a time; how they ended."""
    stop = StopKind.BUDGET
    while stop == StopKind.BUDGET and one.instructions < most:
        before = one.describe()
        stop = one.go(budget=step).kind
        assert stop == other.go(budget=step).kind
        a, b = seen(one), seen(other)
        differ = {name: (a[name], b[name]) for name in a if a[name] != b[name]}
        assert not differ, f"{differ} after:\n{before}"
    return stop


def agree(
    make: Make, step: int, most: int, execution: str = "deprivileged"
) -> tuple[str, Counter[str], Counter[str]]:
    """Run this way and by VMX; how they ended, what trapped, and what VMX executed."""
    with make(execution) as one, make("vmx") as other:
        guest, stop = guest_of(one), together(one, other, step, most)
        entries = one.processors[0].counters()["entries"]
        assert entries == sum(guest.handed_over.values())
        return stop, Counter(guest.traps), Counter(guest.handed_over)


def small(
    program: str, engine: str, paging: str, *, virtualizable: bool = True, **handlers: str
) -> Make:
    """A program of `programs`, with handlers named by vector: v20."""

    def make(execution: str) -> VM:
        vm = VM(
            "16M", execution=execution, engine=engine, paging=paging, cpu=CPU,
            virtualizable_isa=virtualizable,
        )  # fmt: skip
        registers: dict[str, int] = {}
        for vector, code in handlers.items():
            registers |= p.handle(vm, int(vector[1:], 16), code)
        p.start(vm, program, **registers)
        return vm

    return make


def linux(guest: str, paging: str, engine: str = "dbt", *, virtualizable: bool = True) -> Make:
    """One of the guests that can be fetched; skips if it is not there."""

    def make(execution: str) -> VM:
        try:
            return LinuxVM.linux(
                guest, execution=execution, paging=paging, engine=engine, cpu=CPU,
                virtualizable_isa=virtualizable,
            )  # fmt: skip
        except GuestError as problem:
            pytest.skip(f"no guest {guest}: {problem}")

    return make
