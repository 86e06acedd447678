"""A host that has less memory than its VMs and what is kept of them: nobody ends, nothing is lost.

What: images that are kept while their VM writes to all of its memory; VMs that have nearly all of a
host's frames in common.  Source: docs/reference/overcommit.md.  Counts are asserted.
"""

import errno
import gc
import os
import random
from collections import Counter
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.test_overcommit import WALK, made, rounds, run_until
from understudy import outlets
from understudy.guests.placement import Placement
from understudy.host import Host
from understudy.image import Image
from understudy.linux import VM
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host as Bare
from understudy.machine.words import Flag
from understudy.overcommit.plan import PlanError
from understudy.overcommit.swap import Swap
from understudy.overcommit.swap_file import SwapFile
from understudy.paging import Paging
from understudy.vm import VM as BareVm

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


def test_a_forgotten_image_ends_while_frames_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever Python finds that out: here in the middle of it."""
    with made("24M") as host:
        vm = walking(host, 16 << 20)
        run_until(host, [vm], 1)
        images = [vm.snapshot()]
        put = SwapFile.put

        def forget(file: SwapFile, contents: bytes, gfn: int) -> int:
            if images:
                images.clear()
                gc.collect()
                assert host.stock.images.all(), "it is there until nobody is at work"
            return put(file, contents, gfn)

        monkeypatch.setattr(SwapFile, "put", forget)
        run_until(host, [vm], rounds(vm) + 2)
        assert not images and not host.stock.images.all()
        check_owners(host)


def test_a_forgotten_image_ends_while_frames_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Bare("64M")
    free = host.frames.free_count
    with BareVm("16M", host=host) as vm:
        images, own = [vm.snapshot()], host.frames._own
        for gfn in range(512, 1024):
            vm.memory.write(gfn << 12, b"own")

        def forget(*given: int) -> None:
            if images:
                images.clear()
                gc.collect()
            own(*given)

        monkeypatch.setattr(host.frames, "_own", forget)
        pfn = host.frames.allocate(512)
        assert host.frames.references(pfn) == 1
        host.frames.free(pfn, 512)
    assert host.frames.free_count == free


@pytest.mark.parametrize("others", ["an image", "a clone", "nobody"])
@pytest.mark.parametrize("minimum", ["0M", "16M"])
def test_who_has_frames_in_common_and_stands_still_gives_some(others: str, minimum: str) -> None:
    """What he is to give no other has, or somebody else gives it."""
    with made("24M") as host:
        one = walking(host, 16 << 20)
        run_until(host, [one], 1)
        kept: list[Any] = [one.snapshot()]
        if others != "an image":
            kept += kept[0].fork(others == "a clone")
            kept[0].close()
        for vm in host.vms:  # jmp $
            vm.memory.write(vm.vcpus[0].registers()["rip"], b"\xeb\xfe")
        two = walking(host, 16 << 20, shares=1000, min_memory=minimum)
        run_until(host, [two], 2)
        check_owners(host, *(kept if others == "an image" else ()))


@pytest.mark.parametrize("how", ["it ends", "it is closed"])
def test_who_was_to_make_room_does_not_go_on(how: str) -> None:
    """Then another one does, when it needs a frame."""
    with made("24M") as host:
        one, two = walking(host, 16 << 20), walking(host, 32 << 20)
        run_until(host, [one, two], 1)
        if how == "it ends":
            one.memory.write(one.vcpus[0].registers()["rip"], b"\x0f\x0b" * 8)
            while one.ended is None:
                host.run(deadline_ns=host.schedule.time.now() + 50_000)
        for gfn in range(512, 4096):
            one.memory.read(gfn << 12, 8)
        if how == "it is closed":
            one.close()
        run_until(host, [two], 3)


def test_the_last_owner_leaves_frames_to_an_image() -> None:
    """Without a copy: they may go at once."""
    with made("24M") as host:
        one, other = walking(host, 12 << 20), walking(host, 12 << 20)
        run_until(host, [one, other], 1)
        with one.snapshot():
            run_until(host, [one, other], 2)
            one.close()
            other.close()
            run_until(host, [walking(host, 16 << 20, min_memory="16M")], 2)


def test_a_vm_begins_where_no_two_free_frames_lie_in_a_row() -> None:
    with made("24M") as host:
        vms = [walking(host, 16 << 20) for _ in range(2)]
        run_until(host, vms, 3)
        new = walking(host, 4 << 20)
        run_until(host, [*vms, new], rounds(vms[0]) + 1)


def test_a_vm_for_which_there_is_no_frame_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: Any, **how: Any) -> None:
        raise OutOfFrames("none is free")

    with made("64M") as host:
        vm = walking(host, 16 << 20)
        free = host.frames.free_count
        with monkeypatch.context() as patch:
            patch.setattr("understudy.execution.vmx.technique.Operation", none)
            with pytest.raises(OutOfFrames):
                walking(host, 16 << 20)
        assert host.frames.free_count == free
        assert vm.save() and "rip" in vm.describe()
        run_until(host, [vm, walking(host, 16 << 20)], 1)


def test_what_is_in_the_balloon_stays_there_wherever_it_is_restored() -> None:
    with made("64M") as roomy, made("64M", is_always=True) as host:
        vm = walking(roomy, 16 << 20, balloon=True)
        run_until(roomy, [vm], 1)
        outlets.balloons_of(vm.pc)[0].pages.inflate([(3072, 512)])
        outlets.balloons_of(vm.pc)[0].target = 77
        again = VM.restore(vm.save(), host=host)
        balloon = outlets.balloons_of(again.pc)[0]
        assert balloon.pages.counts()["ballooned"] == 512
        steering = host.stock.holdings[again.memory.p2m].steering
        assert steering is not None and steering.goal == balloon.target == 77


def test_another_technique_is_promised_what_it_needs() -> None:
    with made("37M", is_always=True) as host:
        vms = [walking(host, 16 << 20, min_memory="16M") for _ in range(2)]
        run_until(host, vms, 1)
        with pytest.raises(PlanError, match="v0: a minimum of 4096 pages"):
            vms[0].change_paging("eager")
        assert vms[0].paging == "ept"
        run_until(host, vms, 2)
    with made("39M") as host:
        vm, other = walking(host, 16 << 20), walking(host, 4 << 20)
        run_until(host, [vm, other], 1)
        with vm.snapshot():
            assert not host.stock.is_on
            vm.change_paging("eager")
            assert host.stock.is_on, "there is more memory than there is now"
            run_until(host, [vm, other], rounds(vm) + 2)


def test_an_interpreted_guest_has_others_give_frames_between_two_exits() -> None:
    """It has an exit for next to nothing; its neighbor needs all that it has."""
    with made("24M") as host:
        one = walking(host, 16 << 20, min_memory="15M", paging="ept")
        other = walking(host, 16 << 20, execution="emulate", paging="ept")
        run_until(host, [one, other], 1)
        assert swap_of(host).written > 1000


def test_a_loader_writes_more_than_the_host_has() -> None:
    """30 MBytes of a VM that is alone on a host of 24: what it has itself goes for that."""
    data = random.Random(1).randbytes(30 << 20)
    with made("24M") as host:
        vm = host.vm("40M", table_memory="2M")
        Placement(vm.memory).put("the kernel", 2 << 20, data)
        assert swap_of(host).written > 1000
        assert vm.memory.read(2 << 20, len(data)) == data
        words = [vm.memory.read(at, 8) for at in range(2 << 20, 32 << 20, 4096)]
        assert words == [data[at : at + 8] for at in range(0, len(data), 4096)]
        check_owners(host)


def test_a_full_disk_ends_who_misses_a_page_in_words_until_it_is_run_again() -> None:
    with made("24M") as host:
        vms = [walking(host, 16 << 20) for _ in range(2)]
        run_until(host, vms, 1)
        with pytest.MonkeyPatch.context() as patch:

            def pwrite(*given: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "pwrite", pwrite)
            host.run()
            for vm in vms:
                assert vm.ended is not None
                assert "(No space left on device)" in vm.ended.detail.partition("\n")[0]
            assert "(No space left on device)" in host.stock.why
        for vm in vms:
            vm.go(deadline_ns=vm.clock.now() + 1)
        run_until(host, vms, max(map(rounds, vms)) + 1)
        check_owners(host)


def test_a_wish_without_room_is_refused_at_once_and_ends_nobody() -> None:
    """Eager shadow paging needs 8 MBytes for tables; EPT nearly none."""
    with made("24M") as host:
        vm = host.vm(16 << 20, min_memory="15M", table_memory="8M", paging="ept")
        other = walking(host, 16 << 20, min_memory="2M", paging="ept")
        p.start(vm, WALK, rsi=16 << 20, rdx=0)
        run_until(host, [vm, other], 1)
        with pytest.raises(PlanError, match="paging 'eager': "):
            vm.paging = "eager"
        run_until(host, [vm, other], max(rounds(vm), rounds(other)) + 1)
        assert vm.paging == "ept"
