"""What a request of a disk costs in exits and in calls of Python's functions, counted.

Source: ours.  Times are `python -m bench.guest`'s; the counts are those of virtual time, the same
in each run.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.guests.fetched import fetched
from understudy.arch.exit_reason import Reason
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

REQUESTS, READERS = 1024, 8
ONE = f"dd if=/dev/vda of=/dev/null bs=4k count={REQUESTS} iflag=direct"
EACH = REQUESTS // READERS
MANY = (
    f"for n in $(seq 0 {READERS - 1}); do dd if=/dev/vda of=/dev/null bs=4k skip=$((n * {EACH})) "
    f"count={EACH} iflag=direct 2>/dev/null & done; wait"
)


@pytest.fixture(params=["", "packed", "packed,event-idx"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VM]:
    fetched("cloud-amd64")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(REQUESTS << 12))
    hidden = tuple(filter(None, request.param.split(",")))
    with VM.linux("cloud-amd64", disks=[str(image)], hide_virtio=hidden) as vm:
        vm.run(ONE).check()
        yield vm


BIG, FEW, BIG_BYTES = 64, 16, 1 << 20
LARGE = "dd if=/dev/vda of=/dev/null bs=1M count={} iflag=direct"


@pytest.fixture
def large(tmp_path: Path) -> Iterator[VM]:
    """A larger disk, and ends of interrupts without an exit, as in real time."""
    fetched("cloud-amd64")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(BIG * BIG_BYTES))
    with VM.linux("cloud-amd64", disks=[str(image)], cpu="understudy,+pv_eoi") as vm:
        vm.run(ONE).check()
        yield vm


def cost(vm: VM, line: str, requests: int = REQUESTS) -> tuple[float, float, float]:
    """Exits, those of them that are kicks and the like, and calls, for a request."""
    calls = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = dict(vm.vcpus[0].exits)
    sys.setprofile(count)
    try:
        vm.run(line).check()
    finally:
        sys.setprofile(None)
    exits = {reason: n - before.get(reason, 0) for reason, n in vm.vcpus[0].exits.items()}
    kicks = exits.get(int(Reason.EPT_VIOLATION), 0)
    return sum(exits.values()) / requests, kicks / requests, calls / requests


def test_one_reader_pays_a_kick_and_an_interrupt(vm: VM) -> None:
    exits, kicks, calls = cost(vm, ONE)
    print(f"one at a time: {exits:.2f} exits, {kicks:.2f} at devices, {calls:.0f} calls a request")
    assert exits < 2.5 and kicks < 1.1
    assert calls < 165


def test_many_readers_share_them(vm: VM) -> None:
    exits, kicks, calls = cost(vm, MANY)
    print(f"{READERS} at a time: {exits:.2f} exits, {kicks:.2f} at devices, {calls:.0f} calls")
    assert exits < 0.8
    assert calls < 60


def test_an_end_that_is_said_in_memory_is_no_exit(large: VM) -> None:
    exits, kicks, _ = cost(large, ONE)
    print(f"one at a time, ends in memory: {exits:.2f} exits, {kicks:.2f} at devices a request")
    assert exits < 1.5


def test_the_pages_of_a_large_request_are_no_calls_of_their_own(large: VM) -> None:
    """1 MB is up to 254 pieces of memory, each of which was two or three calls."""
    large.run(LARGE.format(BIG)).check()
    some, more = (cost(large, LARGE.format(n), 1)[2] for n in (FEW, BIG))
    calls = (more - some) / (BIG - FEW)  # of a request; what starting dd takes is in both
    print(f"1 MB: {calls:.0f} calls a request")
    assert calls < 290
