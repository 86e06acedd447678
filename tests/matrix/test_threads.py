"""In real time each processor of a VM has a thread: they compute at once, and all can be stopped.

Under shadow paging they take turns; all that does not ask for two at once holds there, too.

Source: ours.  What is asserted is what they did, never how long it took.
"""

import threading
from collections.abc import Iterator

import pytest

from tests.guests.fetched import fetched
from understudy.linux import VM
from understudy.threads import Threads
from understudy.turns import Turns
from understudy.verdict import StopKind

pytestmark = [pytest.mark.real_guest, pytest.mark.timeout(300)]

BUSY = "(while :; do :; done) & echo $! > /1; (while :; do :; done) & echo $! > /2; sleep 0.1"
CALM = "kill $(cat /1 /2)"
ONLINE = "/sys/devices/system/cpu/cpu1/online"


@pytest.fixture(scope="module", params=["ept", "lazy"])
def vm(request: pytest.FixtureRequest) -> Iterator[VM]:
    """A Debian of two processors, in threads."""
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", cpus=2, clock="wall", paging=request.param) as vm:
        yield vm


def retired(vm: VM) -> list[int]:
    return [vcpu.retired for vcpu in vm.vcpus]


def left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vCPU")]


def test_only_several_processors_in_real_time_have_threads() -> None:
    kinds = {(1, "wall"): Turns, (2, "wall"): Threads, (2, "virtual"): Turns}
    for (cpus, clock), kind in kinds.items():
        with VM("16M", cpus=cpus, clock=clock) as vm:
            assert type(vm.turns) is kind


def test_both_compute_and_a_run_leaves_no_thread(vm: VM) -> None:
    vm.run(BUSY)
    before = retired(vm)
    for _ in range(5):
        assert vm.go(wall_seconds=0.2).kind is StopKind.WALL
        assert left() == []
    after = retired(vm)
    assert all(now - then > 1_000_000 for now, then in zip(after, before, strict=True))
    vm.run(CALM)
    assert vm.run("nproc; dmesg | grep -c -e stall -e BUG").output == "2\n0\n"


def others_inside(vm: VM) -> int:
    """Of 100 exits: at how many another processor was in the guest as well."""
    seen: list[bool] = []

    def look() -> bool:
        seen.append(any(door.is_in for door in vm.turns.house.doors))  # type: ignore[attr-defined]
        return len(seen) == 100

    assert vm.go(until=look).kind is StopKind.UNTIL
    return sum(seen)


def test_both_are_in_the_guest_at_once(vm: VM) -> None:
    vm.run(BUSY)
    inside = others_inside(vm)
    vm.run(CALM)
    assert (inside > 0) == (vm.paging == "ept")


def test_the_technique_changes_while_both_compute(vm: VM) -> None:
    """Also in the middle of a run, which goes on."""
    before = vm.paging
    vm.run(BUSY)
    for paging in ("vtlb", "ept", "lazy", "ept", "eager", before):
        vm.post(lambda paging=paging: setattr(vm, "paging", paging))  # type: ignore[misc]
        assert vm.go(wall_seconds=0.2).kind is StopKind.WALL
        assert vm.pages.name == paging
        assert (others_inside(vm) > 0) == (paging == "ept")
    vm.run(CALM)
    assert vm.run("nproc; dmesg | grep -c -e stall -e BUG").output == "2\n0\n"


@pytest.mark.parametrize("clock", ["wall", "virtual"])
def test_who_asks_for_a_stop_is_told_once(clock: str) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", cpus=3, clock=clock) as vm:
        vm.wait_for_prompt()
        vm.stop()
        assert vm.go(wall_seconds=60).kind is StopKind.STOPPED
        assert vm.go(budget=100_000).kind is StopKind.BUDGET
        vm.post(vm.stop)
        assert vm.go(wall_seconds=60).kind is StopKind.STOPPED
        assert vm.run("nproc").output == "3\n"
        vm.send("poweroff -f\n")
        assert vm.go(wall_seconds=60).kind is StopKind.POWEROFF


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
def test_an_exception_in_a_callback_ends_the_run_and_nothing_else(
    vm: VM, kind: type[BaseException]
) -> None:
    vm.run(BUSY)
    callers: set[str] = set()

    def fail() -> bool:
        callers.add(threading.current_thread().name)
        if vm.paging != "ept" or {"vCPU 0", "vCPU 1"} <= callers:
            raise kind("ours")
        return False

    with pytest.raises(kind, match="ours"):
        vm.go(until=fail)
    assert left() == []
    vm.run(CALM)
    assert vm.run("echo still here").output == "still here\n"


def test_memory_is_one_for_both(vm: VM) -> None:
    """Pipes, futexes and page tables of programs on both: no sum is wrong."""
    sums = "for i in 1 2 3 4 5; do ls -lR /bin /sys/devices/system/cpu | md5sum; done"
    found = vm.run(f"(({sums}) & ({sums}) & wait) | sort | uniq -c").output
    assert len(found.splitlines()) == 1 and found.split()[0] == "10"


def test_processors_go_and_come(vm: VM) -> None:
    for _ in range(3):
        assert vm.run(f"echo 0 > {ONLINE}; nproc; echo 1 > {ONLINE}; nproc").output == "1\n2\n"


def test_a_snapshot_of_both_at_work_goes_on(vm: VM) -> None:
    vm.run(BUSY)
    vm.go(wall_seconds=0.1)
    image = vm.snapshot()
    vm.run(CALM)
    with image.restore() as again:
        assert again.run(f"{CALM}; nproc; dmesg | grep -c warp").output == "2\n0\n"
