"""Who misses a page that is in the swap file waits for it, and another VM has the processor.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".  Virtual times are asserted:
alone it waits to the grain of its timer, beside others up to two turns longer.
"""

from typing import Any

import pytest

from tests.matrix.test_overcommit import made, rounds, walking
from understudy.host import Host
from understudy.lab.spinners import ran, run_for, spinning
from understudy.linux import VM
from understudy.paging import Paging
from understudy.sched.seat import State
from understudy.turns import GRAIN, TURN_NS
from understudy.vcpu.activity import Activity

READ_NS = 300_000
PAGES = 100
LONG_NS = 2 * PAGES * READ_NS


def missing(host: Host, **options: Any) -> VM:
    """A VM that has been through its memory once, and of which so many pages are out."""
    vm = walking(host, 1, **options)
    while rounds(vm) < 1:
        run_for(host, TURN_NS)
    swap = host.stock.swap
    assert swap is not None and swap.reclaim(vm.memory.p2m, PAGES) == PAGES
    return vm


def times(paging: str, read_ns: int, *, is_alone: bool = False) -> tuple[int, ...]:
    """Frames read, ns blocked, ns that the other ran, instructions."""
    with made("64M", is_always=True, scan=0, read_ns=read_ns) as host:
        vm, other = missing(host, paging=paging), spinning(host, "other", paging=paging)
        if is_alone:
            other.close()
        swap, seat = host.stock.swap, vm.claim.seats[0]
        assert swap is not None
        host.schedule.settle()
        reads, blocked = swap.read, seat.counts.ns[State.BLOCKED]
        running = 0 if is_alone else ran(other)
        run_for(host, LONG_NS)
        host.schedule.settle()
        assert vm.ended is None
        return (
            swap.read - reads, seat.counts.ns[State.BLOCKED] - blocked,
            0 if is_alone else ran(other) - running, vm.instructions,
        )  # fmt: skip


@pytest.mark.parametrize("paging", Paging.ALL)
def test_it_waits_so_long_and_another_runs(paging: str) -> None:
    found = times(paging, READ_NS)
    reads, blocked, other, *_ = found
    assert PAGES // 2 < reads <= PAGES
    assert (reads - 1) * READ_NS <= blocked <= reads * (READ_NS + 2 * TURN_NS)
    assert other > blocked - reads * TURN_NS
    assert times(paging, READ_NS) == found, "two runs are the same"


def test_alone_it_waits_to_the_grain_of_its_timer() -> None:
    reads, blocked, *_ = times("ept", READ_NS, is_alone=True)
    assert reads > PAGES // 2 and reads * READ_NS <= blocked <= reads * (READ_NS + GRAIN)


def test_control_without_a_price_nobody_waits() -> None:
    reads, blocked, *_ = times("ept", 0)
    assert reads > PAGES // 2 and blocked == 0


def test_a_copy_of_one_that_waits_waits_as_long() -> None:
    with made("64M", is_always=True, scan=0, read_ns=READ_NS) as host:
        vm = missing(host)
        vcpu = vm.vcpus[0]
        while vcpu.state.activity is not Activity.WAIT_FOR_PAGE:
            run_for(host, TURN_NS // 5)
        at, retired = vcpu.page.state.at, vm.instructions
        assert vm.clock.now() < at <= vm.clock.now() + READ_NS
        with VM.restore(vm.save()) as again, VM.restore(vm.save(), host=host) as beside:
            assert again.instructions == retired
            again.go(budget=1)
            assert again.instructions == retired + 1 and again.clock.now() >= at
            run_for(host, LONG_NS)
            assert beside.instructions > retired and vm.instructions > retired
            assert all(one.ended is None for one in (vm, beside))


def test_a_reset_forgets_the_page() -> None:
    with made("64M", is_always=True, scan=0, read_ns=READ_NS) as host:
        vm = missing(host)
        vcpu = vm.vcpus[0]
        while vcpu.state.activity is not Activity.WAIT_FOR_PAGE:
            run_for(host, TURN_NS // 5)
        vcpu.reset()
        assert vcpu.state.activity is Activity.ACTIVE
        vm.clock.run_due()
        assert vcpu.state.activity is Activity.ACTIVE
