"""What a guest can make grow is bounded, whatever it does, and its neighbors go on.

Source: docs/reference/bounds.md.  Invariant: nothing here waits for a time but the slow test.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.programs import HELLO, start
from tests.walls.growth import MEMORY, ROUND, STEPS, growing
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.paging import BUDGET, Paging
from understudy.paging.budget import Budgeted
from understudy.verdict import StopKind
from understudy.vm import VM

LEAST = 2 << 20
SMALL = 1 << 18


def answers(vm: VM) -> None:
    """A neighbor runs as if it were alone."""
    heard = bytearray()
    vm.console.on_output.append(heard.extend)
    start(vm, HELLO)
    assert (vm.go(budget=1000).status, bytes(heard)) == (42, b"hello\n")
    vm.console.on_output.clear()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_guest_stays_within_its_budget_and_its_neighbors_answer(paging: str, step: int) -> None:
    with Host("64M") as host:
        neighbor = VM("4M", host=host, paging=paging, table_memory=LEAST)
        vm = growing(step, paging=paging, host=host, table_memory=LEAST)
        if isinstance(vm.pages, Budgeted):  # a smaller one still, so that it is full soon
            vm.pages.limit = SMALL
        free = host.frames.free_count
        for _ in range(3):
            assert vm.go(budget=300 * ROUND).kind is StopKind.BUDGET
            assert host.frames.free_count == free
            answers(neighbor)
            if isinstance(vm.pages, Budgeted):
                assert vm.pages.kept_bytes() <= SMALL + vm.pages.headroom
        assert (vm.counts()["evictions"] == 0) == (paging == "ept")
        neighbor.close()
        vm.close()


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_what_is_set_aside_nobody_else_gets(paging: str) -> None:
    """A host that is full from the moment when the VM was made."""
    with Host("64M") as host:
        vm = growing(paging=paging, host=host, table_memory=LEAST)
        while host.frames.free_count:
            host.frames.allocate_runs(host.frames.free_count)
        with pytest.raises(OutOfFrames):
            VM("1M", host=host)
        assert vm.go(budget=500 * ROUND).kind is StopKind.BUDGET
        vm.close()
        assert host.frames.free_count >= MEMORY >> 12


def test_code_is_found_that_was_evicted() -> None:
    """What carries an instruction out fetches it, and the tables need not be complete."""
    for paging in sorted(Paging.ALL):
        with growing(paging=paging) as vm:
            vm.go(budget=10)
            vm.vcpus[0].leave_guest()
            guest = vm.vcpus[0].guest
            code = guest.code_at(guest.rip, 15)
            if isinstance(vm.pages, Budgeted):
                vm.pages.evict(0)
            assert guest.code_at(guest.rip, 15) == code == vm.memory.read(guest.rip, 15)


def test_the_budget_follows_the_ram() -> None:
    for memory, expected in (("4M", BUDGET), ("64M", 16 << 20), ("256M", 64 << 20)):
        with VM(memory, paging="vtlb") as vm:
            assert vm.pages.budget == expected
            assert vm.pages.reserve.count == expected >> 12


def test_a_vm_that_evicts_goes_on_the_same_when_it_was_saved() -> None:
    for paging in sorted(Paging.ALL):
        with growing(paging=paging, table_memory=LEAST) as vm:
            vm.go(budget=500 * ROUND)
            with VM.restore(vm.save()) as copy:
                for one in (vm, copy):
                    if isinstance(one.pages, Budgeted):
                        one.pages.limit = SMALL
                    one.go(budget=300 * ROUND)
                kept: list[dict[str, Any]] = [one.counts() for one in (vm, copy)]
                for counts in kept:
                    for name in ("engine", "tlb", "walk", "walk_caches", "kicks"):
                        del counts[name]
                assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_ten_minutes_of_growing(paging: str) -> None:
    """In a process of its own: what the computer gives it is RAM, budgets, and 10 % more."""
    program = Path(__file__).with_name("ten_minutes.py")
    done = subprocess.run(
        [sys.executable, str(program), paging, "600"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
