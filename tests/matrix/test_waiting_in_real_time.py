"""Who misses what the computer has to read from its disk comes again; others go on meanwhile.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server"; preadv2(2), RWF_NOWAIT.
What a guest has written it must find; how often it looks in vain is asserted, times are not.
"""

import os
from collections import Counter

import pytest

from tests.matrix import test_missed_pages as told
from tests.matrix.test_overcommit import FIRST, MEMORY, audit, rounds, walking
from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.host import Host
from understudy.lab.spinners import ran, spinning
from understudy.linux import VM
from understudy.overcommit.swap import LOOKS, Swap
from understudy.overcommit.swap_file import SwapFile
from understudy.overcommit.terms import Terms
from understudy.paging import Paging
from understudy.verdict import StopKind

MS = 1_000_000
PATIENCE_MS = 60_000
IN_VAIN = 3


def made(ram: str, pcpus: int = 1) -> Host:
    terms = Terms(is_always=True, scan=0)
    return Host(pcpus=pcpus, ram=ram, clock="wall", overcommit=terms)


def swap_of(host: Host) -> Swap:
    assert host.stock.swap is not None
    return host.stock.swap


def slow(swap: Swap, looks: int) -> Counter[int]:
    """A disk that has nothing at hand before it was asked so often; who was asked for, by slot."""
    asked: Counter[int] = Counter()

    def is_at_hand(slot: int) -> bool:
        asked[slot] += 1
        return not asked[slot] % (looks + 1)

    swap.file.is_at_hand = is_at_hand  # type: ignore[method-assign]
    return asked


def run_until(host: Host, vms: list[VM], count: int) -> None:
    """Until each has been through its memory so often."""
    end = host.schedule.time.now() + PATIENCE_MS * MS
    while any(rounds(vm) < count for vm in vms):
        assert host.schedule.time.now() < end, [rounds(vm) for vm in vms]
        host.run(deadline_ns=host.schedule.time.now() + 10 * MS)
        assert all(vm.ended is None for vm in vms), [vm.ended for vm in vms]


@pytest.mark.parametrize("pcpus", [1, 2])
@pytest.mark.parametrize("paging", Paging.ALL)
def test_each_finds_what_it_wrote(paging: str, pcpus: int) -> None:
    """Three of 16 MBytes on a host of 40, all the time."""
    with made("40M", pcpus) as host:
        vms = [walking(host, n, paging=paging) for n in range(3)]
        asked = slow(swap_of(host), 1)
        run_until(host, vms, 2)
        swap = swap_of(host)
        assert swap.waits > 0 and swap.waits <= asked.total()
        audit(host)


def out(host: Host, vm: VM, pages: int) -> None:
    """So many of the pages go that it walks through."""
    run_until(host, [vm], 1)
    swap, p2m = swap_of(host), vm.memory.p2m
    may = [
        gfn for gfn in range(FIRST >> PAGE_SHIFT, MEMORY >> PAGE_SHIFT) if swap._may_go(p2m, gfn)
    ]
    told.evict(host, vm, may[:pages])
    assert swap.swapped_of(p2m) == pages


@pytest.mark.parametrize("looks", [IN_VAIN, 2 * LOOKS])
def test_it_looks_until_the_page_is_there_or_it_has_no_patience(looks: int) -> None:
    with made("64M") as host:
        vm, other = walking(host, 1), spinning(host, "other")
        out(host, vm, 1)
        swap = swap_of(host)
        asked = slow(swap, looks)
        host.schedule.settle()
        before, read = ran(other), swap.read
        run_until(host, [vm], rounds(vm) + 2)
        host.schedule.settle()
        assert swap.waits == min(looks, LOOKS) and swap.read == read + 1
        assert asked.total() == min(looks + 1, LOOKS)
        assert ran(other) > before
        audit(host)


def test_in_virtual_time_nobody_looks() -> None:
    with Host(ram="64M", overcommit=Terms(is_always=True, scan=0)) as host:
        vm = walking(host, 1)
        out(host, vm, 100)
        asked = slow(swap_of(host), IN_VAIN)
        run_until(host, [vm], rounds(vm) + 2)
        assert not asked and not swap_of(host).waits


@pytest.mark.parametrize("paging", Paging.ALL)
def test_a_guest_that_can_do_something_else_is_told(paging: str) -> None:
    """Each time that it looks in vain, until the page is there."""
    pages = 20
    with made("64M") as host:
        vm = told.summing(host, pages, paging=paging)
        slow(swap_of(host), IN_VAIN)
        end = host.schedule.time.now() + PATIENCE_MS * MS
        while vm.ended is None and host.schedule.time.now() < end:
            host.run(deadline_ns=host.schedule.time.now() + MS)
        assert vm.ended is not None and vm.ended.kind == StopKind.DEBUG_EXIT
        assert vm.memory.read_u64(told.SUM) == sum(range(1, pages + 1))
        assert sorted(told.tokens(vm, told.READY)) == sorted(told.tokens(vm, told.TOLD))
        assert len(told.tokens(vm, told.TOLD)) == swap_of(host).waits >= pages


def leave_to_the_disk(file: SwapFile) -> None:
    """What was written is on it, and in the computer's memory no more."""
    number = file._file.fileno()
    os.fsync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_real_disk() -> None:
    probe = SwapFile(1)
    slot = probe.put(b"\1" * PAGE, 0)
    assert probe.is_at_hand(slot)
    leave_to_the_disk(probe)
    is_told = not probe.is_at_hand(slot)
    probe.close()
    if not is_told:
        pytest.skip("no disk: put TMPDIR into a file system on one")
    with made("64M") as host:
        vm = walking(host, 1)
        out(host, vm, 1000)
        leave_to_the_disk(swap_of(host).file)
        run_until(host, [vm], rounds(vm) + 2)
        assert swap_of(host).waits > 0
        audit(host)
