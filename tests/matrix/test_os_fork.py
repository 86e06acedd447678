"""A process that is forked has no VM of the one it came from: never is one guest run twice.

What: the child asks and tells everything that a VM, its image and its host have; it is refused,
makes one of its own, and closes them all; the parent's go on as if nothing had been.
Source: fork(2): memory that is mapped shared stays shared.
"""

import os
from collections.abc import Callable

import pytest

from understudy.guests import hello, loader
from understudy.machine.host import Host
from understudy.vm import VM

REFUSED = "this VM is in the process that made it"


def started(host: Host | None = None) -> VM:
    vm = VM("4M", host=host)
    vm.enter(loader.load(vm.memory, hello.image()))
    return vm


def in_a_child(act: Callable[[], None]) -> int:
    """The status of a child that acts; 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as problem:
            print(f"in the child: {problem!r}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_child_is_refused_and_harms_nothing() -> None:
    with Host("64M") as host:
        vm = started(host)
        vm.go(budget=100)
        image = vm.snapshot()
        [clone] = image.fork(1)
        attempts: list[Callable[[], object]] = [
            vm.go, vm.save, vm.counts, clone.go, lambda: vm.memory.read(0, 4),
            lambda: vm.memory.write(0, b"child"), lambda: vm.vcpus[0].registers(),
            lambda: image.fork(1), lambda: VM("1M", host=host), lambda: memoryview(host.memory),
            host.memory.resident_bytes,
        ]  # fmt: skip

        def child() -> None:
            for attempt in attempts:
                with pytest.raises(RuntimeError, match=REFUSED):
                    attempt()
            with started() as own:
                assert own.go(budget=1 << 20).kind == "poweroff"
            for thing in (clone, image, vm, host):
                thing.close()

        before = vm.memory.read(0, 4 << 20)
        assert in_a_child(child) == 0
        assert vm.memory.read(0, 4 << 20) == before
        for one in (vm, clone):
            assert one.go(budget=1 << 20).kind == "poweroff"
            one.close()
        image.close()


def test_a_grandchild_is_refused_as_well() -> None:
    with started() as vm:

        def refused() -> None:
            with pytest.raises(RuntimeError, match=REFUSED):
                vm.go()

        def child() -> None:
            refused()
            assert in_a_child(refused) == 0

        assert in_a_child(child) == 0
        assert vm.go(budget=1 << 20).kind == "poweroff"
