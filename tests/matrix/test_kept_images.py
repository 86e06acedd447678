"""A host that has less memory than its VMs and what is kept of them: nobody ends, nothing is lost.

What: images that are kept while their VM writes to all of its memory; VMs that have nearly all of a
host's frames in common.  Source: docs/reference/overcommit.md.  Counts are asserted.
"""

import gc
from collections import Counter
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.test_overcommit import WALK, made, rounds, run_until
from understudy.host import Host
from understudy.image import Image
from understudy.linux import VM
from understudy.machine.words import Flag
from understudy.overcommit.plan import PlanError
from understudy.overcommit.swap import Swap
from understudy.paging import Paging

FILLED = 2 << 20  # where the program begins to write


def walking(host: Host, size: int, **options: Any) -> VM:
    vm = host.vm(size, name=f"v{len(host.vms)}", table_memory="2M", **options)
    p.start(vm, WALK, rsi=size, rdx=len(host.vms) << 40)
    return vm


def swap_of(host: Host) -> Swap:
    assert host.stock.swap is not None
    return host.stock.swap


def check_owners(host: Host, *images: Image[VM]) -> None:
    """Each frame has as many owners as name it; so has each slot of the file."""
    named: Counter[int] = Counter()
    out = 0
    for p2m in [vm.memory.p2m for vm in host.vms] + [image.contents.p2m for image in images]:  # type: ignore[attr-defined]
        named.update(pfn for _, first, n in p2m for pfn in range(first, first + n))
        out += sum(n for _, word, n in p2m.pieces() if word & Flag.SWAPPED)
    assert all(host.frames.references(pfn) == owners for pfn, owners in named.items())
    assert swap_of(host).swapped == out


@pytest.mark.parametrize("paging", Paging.ALL)
def test_a_guest_writes_to_all_of_its_memory_beside_an_image_of_it(paging: str) -> None:
    """20 MBytes, twice, on a host of 24."""
    with made("24M") as host, Host(pcpus=1, ram="64M") as other:
        vm = walking(host, 20 << 20, paging=paging)
        run_until(host, [vm], 1)
        assert not host.stock.is_on
        before = vm.memory.read(0, 20 << 20)
        with vm.snapshot() as image:
            assert host.stock.is_on
            run_until(host, [vm], rounds(vm) + 2)
            check_owners(host, image)
            assert swap_of(host).written > 1000
            again = image.restore(host=other)
            assert again.memory.read(0, 20 << 20) == before
            run_until(other, [again], rounds(again) + 1)
        check_owners(host)
        run_until(host, [vm], rounds(vm) + 1)
        vm.close()
        assert swap_of(host).in_file == swap_of(host).swapped == 0


def test_what_only_an_image_has_goes_first() -> None:
    with made("40M") as host:
        vm = walking(host, 16 << 20)
        run_until(host, [vm], 1)
        with vm.snapshot() as image:
            assert not host.stock.is_on, "both fit"
            run_until(host, [vm], rounds(vm) + 1)
        assert not host.stock.is_on
        with vm.snapshot() as image:
            walking(host, 12 << 20)
            run_until(host, host.vms, rounds(vm) + 2)
            p2m = image.contents.p2m  # type: ignore[attr-defined]
            assert swap_of(host).swapped_of(p2m) > 1000
            assert swap_of(host).swapped_of(p2m) == swap_of(host).written


def test_a_host_is_told_what_there_is_no_room_for() -> None:
    with made("24M", swap="4M") as host:
        vm = walking(host, 16 << 20)
        free = host.frames.free_count
        with pytest.raises(
            PlanError, match=r"a snapshot of v0: .*close snapshots, or give the host"
        ):
            vm.snapshot()
        assert host.frames.free_count == free and not host.stock.is_on
        run_until(host, [vm], 2)
    with made("24M", swap="32M") as host:
        vm = walking(host, 16 << 20)
        with vm.snapshot():
            with pytest.raises(PlanError, match="a snapshot of v0"):
                vm.snapshot()
            with pytest.raises(PlanError, match=r"v1: .* pages between its min"):
                walking(host, 16 << 20)
        with vm.snapshot():
            run_until(host, [vm], 2)


def test_vms_have_nearly_all_of_a_host_in_common() -> None:
    """None of their frames is one VM's alone when they begin to write."""
    size = 8 << 20
    with made("10M") as host:
        vm = walking(host, size)
        run_until(host, [vm], 1)
        with vm.snapshot() as image:
            clones = image.fork(1)
        assert host.frames.free_count < 300
        before = vm.memory.read(FILLED, size - FILLED)
        assert all(one.memory.read(FILLED, size - FILLED) == before for one in clones)
        run_until(host, [vm, *clones], rounds(vm) + 2)
        check_owners(host)
        for one in (vm, *clones):
            one.close()
        assert swap_of(host).in_file == swap_of(host).swapped == 0


def test_a_forgotten_image_ends_while_frames_of_images_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever that is: here in the middle of it."""
    with made("24M") as host:
        vm = walking(host, 16 << 20)
        run_until(host, [vm], 1)
        images = [vm.snapshot()]
        reclaim = Swap.reclaim

        def forget(*given: Any, **how: Any) -> int:
            if images:
                images.clear()
                gc.collect()
                assert swap_of(host).swapped_of(given[1]) == 0, "it is there still"
            return reclaim(*given, **how)

        monkeypatch.setattr(Swap, "reclaim", forget)
        run_until(host, [vm], rounds(vm) + 2)
        assert not images and not host.stock.images.all()
        check_owners(host)
