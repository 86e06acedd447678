"""What is closed is given back at once, and says that it is closed.

What: descriptors, address space and memory of this process, and frames of a host, over VMs, images
and clones that come and go without a garbage collection.  Source: /proc/self.
Invariant: sizes are compared with what the first VMs have cost, not with numbers of a computer.
"""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy import linux
from understudy.guests import hello, loader
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.machine import Machine
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

TECHNIQUES = sorted(Paging.ALL)


def cost() -> dict[str, int]:
    """What this process has: descriptors; KBytes of memory and of address space."""
    text = Path("/proc/self/status").read_text()
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if "kB" in line}
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return {"fds": descriptors, "rss": int(sizes["VmRSS"]), "size": int(sizes["VmSize"])}


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(machine: Machine) -> loader.Entry:
    return loader.load(machine.memory, hello.image())


def live(number: int) -> list[weakref.ref[object]]:
    """A VM that runs, is cloned, saved and restored, and closed, with all that came of it."""
    with linux.VM("16M", paging=TECHNIQUES[number % len(TECHNIQUES)]) as vm:
        vm.boot(load)
        image = vm.snapshot()
        assert vm.go().kind is StopKind.POWEROFF
        (clone,) = image.fork()
        again = linux.VM.restore(image.to_bytes())
        assert clone.go().kind is again.go().kind is StopKind.POWEROFF
        found = [vm, vm.pc, vm.vcpus[0], vm.host, image, clone, again, again.memory, vm.session]
        marks: list[weakref.ref[object]] = [weakref.ref(one) for one in found]
    for one in (image, clone, again):
        one.close()
    return marks


@pytest.mark.usefixtures("no_collection")
def test_three_hundred_vms_leave_nothing() -> None:
    for number in range(12):
        live(number)
    before = cost()
    for number in range(100):  # three VMs each
        marks = live(number)
        assert [mark() for mark in marks] == [None] * len(marks)
    after = cost()
    assert after["fds"] == before["fds"]
    assert after["size"] - before["size"] < 2048
    assert after["rss"] - before["rss"] < 2048


# --- Whose host it is ---


def test_a_host_of_its_own_ends_with_the_last_that_uses_it() -> None:
    vm = VM("16M")
    vm.boot(load)
    host, image = vm.host, vm.snapshot()
    (clone,) = image.fork()
    vm.close()
    image.close()
    assert not host.is_closed
    assert clone.go().kind is StopKind.POWEROFF
    image = clone.snapshot()
    clone.close()
    assert not host.is_closed
    (clone,) = image.fork()
    del image
    assert clone.go().kind is StopKind.STUCK  # it had powered off
    clone.close()
    assert host.is_closed


def test_a_host_that_was_given_stays_until_its_user_closes_it() -> None:
    with Host("256M") as host:
        free = host.frames.free_count
        for _ in range(2):
            with VM("16M", host=host) as vm, vm.snapshot() as image:
                image.fork()[0].close()
            assert not host.is_closed
            assert host.frames.free_count == free
            assert host.processors == []
    assert host.is_closed
    host.close()


def test_a_host_closed_first_leaves_vms_that_can_be_closed() -> None:
    with Host("256M") as host:
        vm = VM("16M", host=host)
        vm.boot(load)
        image = vm.snapshot()
    for use in (vm.go, image.to_bytes, image.fork, vm.save, lambda: VM("16M", host=host)):
        with pytest.raises(RuntimeError, match=r"^this (host|memory|processor) is closed") as error:
            use()
        assert "\n" not in str(error.value)
    image.close()
    vm.close()


def test_who_looks_at_the_memory_keeps_it() -> None:
    with VM("16M") as vm:
        view, host = memoryview(vm.host.memory), vm.host
    assert not host.is_closed
    assert view[0] == 0
    with pytest.raises(BufferError):
        host.close()
    view.release()
    host.close()


# --- What is closed says so ---


def test_a_closed_host_says_so() -> None:
    host = Host("16M")
    host.close()
    for use in (host.frame, host.inspect, host.join, lambda: host.plug("dbt", "virtual")):
        with pytest.raises(RuntimeError, match=r"^this host is closed$"):
            use()


def test_the_parts_of_a_closed_vm_say_so_and_others_are_none() -> None:
    vm = VM("16M", name="gone")
    vm.close()
    for part in ("vcpus", "memory", "pages", "pc", "clock", "machine", "bus"):
        with pytest.raises(RuntimeError, match=r"^gone is closed$"):
            getattr(vm, part)
    with pytest.raises(AttributeError, match="VM has no 'colour'"):
        vm.colour  # noqa: B018
    assert vm.host.is_closed
    assert vm.config.name == "gone"


def test_a_callback_cannot_close_the_vm_that_runs() -> None:
    with VM("16M") as vm:
        vm.boot(load)
        vm.console.on_output.append(lambda data: vm.close())
        with pytest.raises(RuntimeError, match="vm is running: a callback cannot close it"):
            vm.go()
        vm.console.on_output.clear()
        assert vm.go().kind is StopKind.POWEROFF


# --- What could not be made leaves nothing ---


@pytest.mark.parametrize("options", [{"devices": [("nothing", {})]}, {"cpu": "baseline,+vmx"}])
def test_a_vm_that_cannot_be_made_leaves_nothing(options: dict[str, object]) -> None:
    with Host("256M") as host:
        free = host.frames.free_count
        with pytest.raises(ValueError):
            VM("16M", host=host, **options)
        assert host.frames.free_count == free
        assert host.processors == []


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_nor_does_one_that_a_full_host_has_no_room_for(paging: str) -> None:
    with Host("16M") as host:
        for frames in range(1, 2000):
            taken = host.frames.allocate(host.frames.free_count - 256 - frames)
            free = host.frames.free_count
            try:
                VM("1M", host=host, paging=paging, table_memory="2M").close()
                made = True
            except OutOfFrames:
                made = False
            assert (host.frames.free_count, host.processors) == (free, [])
            host.frames.free(taken, 4095 - free)
            if made:
                break
        assert 3 < frames < 1000
