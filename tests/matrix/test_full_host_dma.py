"""A request to a disk that needs more frames than a host has free.

What: a disk is asked to fill pages that are swapped out, or to read them, more than are free in the
middle of an exit, when nobody but the asking VM could give any: several small requests, and one as
large as there may be.  Source: docs/reference/overcommit.md.
Invariants: the VM does not end; the request is carried out, once, when there are frames again.
"""

import struct
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.test_overcommit import WALK
from understudy.devices.virtio.blk import MOST, SEGMENT_BYTES, Blk
from understudy.host import Host
from understudy.machine.words import Flag
from understudy.overcommit.terms import Terms

MEMORY, EACH, REQUESTS = 32 << 20, 80, 2
TABLE, AVAILABLE, USED, HEAD, STATUS = range(0x18_0000, 0x19_4000, 0x4000)
US = 1000
WAIT = "eb fe | here: jmp here"
FIRST = 8 << 20  # of what a large request fills or reads
VERSION_1, PACKED = 1 << 32, 1 << 34


def full(host: Host, image: Path) -> Any:
    """A VM of this host that has written more memory than there is, and does nothing any more."""
    vm = host.vm(MEMORY, name="one", disks=(str(image),))
    p.start(vm, WALK, rsi=MEMORY, rdx=1 << 40)
    now = host.schedule.time.now
    while not vm.vcpus[0].registers()["rbx"]:
        host.run(deadline_ns=now() + 100 * US)
    p.start(vm, WAIT)
    vm.pc.part("disk0", Blk).function.reach = lambda: vm.memory
    return vm


def ask(disk: Any, memory: Any, frames: list[int]) -> None:
    """Requests to read into these frames."""
    queue = disk.state.queues[0]
    queue.size, queue.is_enabled = 256, True
    queue.descriptors, queue.driver, queue.device = TABLE, AVAILABLE, USED
    disk.state.driver_features, disk.state.status = 1 << 32, 15
    table, heads = b"", []
    for number in range(REQUESTS):
        heads.append(at := len(table) // 16)
        table += struct.pack("<QIHH", HEAD, 16, 1, at + 1)
        for n, gfn in enumerate(frames[number * EACH : (number + 1) * EACH], at + 2):
            table += struct.pack("<QIHH", gfn << 12, 4096, 3, n)
        table += struct.pack("<QIHH", STATUS + number, 1, 2, 0)
    memory.write(HEAD, bytes(16))
    memory.write(STATUS, b"\xff" * REQUESTS)
    memory.write(TABLE, table)
    memory.write(AVAILABLE, struct.pack(f"<HH{REQUESTS}H", 0, REQUESTS, *heads))
    memory.write(USED, bytes(8))


def test_it_waits_and_is_carried_out(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"disk" * (EACH << 10))
    with Host(pcpus=1, ram="12M", overcommit=Terms(read_ns=0)) as host:
        vm, now = full(host, image), host.schedule.time.now
        disk = vm.pc.part("disk0", Blk)
        out = [
            frame for gfn, word, frames in vm.memory.p2m.pieces() if word & Flag.SWAPPED
            for frame in range(gfn, gfn + frames) if frame > 0x300
        ]  # fmt: skip
        wanted = out[:: len(out) // (EACH * REQUESTS)][: EACH * REQUESTS]
        assert len(wanted) > host.frames.free_count
        ask(disk, vm.memory, wanted)
        queue = disk.state.queues[0]
        vm.vcpus[0].is_running = True  # an exit of its: nothing that it has goes meanwhile
        disk.kick(0)
        vm.vcpus[0].is_running = False
        assert disk.state.waiting and vm.ended is None
        for _ in range(20):
            host.run(deadline_ns=now() + 100 * US)
            if queue.given == REQUESTS:
                break
        assert (queue.taken, queue.given) == (REQUESTS, REQUESTS)
        assert vm.memory.read(STATUS, REQUESTS) == bytes(REQUESTS)


def ask_for_all(disk: Any, memory: Any, kind: int, size: int, features: int) -> None:
    """One request, in descriptors as long as there may be."""
    queue = disk.state.queues[0]
    queue.size, queue.is_enabled = 256, True
    queue.descriptors, queue.driver, queue.device = TABLE, AVAILABLE, USED
    disk.state.driver_features, disk.state.status = features, 15
    runs = [(HEAD, 16, 0)]
    runs += [
        (at, SEGMENT_BYTES, 0 if kind else 2) for at in range(FIRST, FIRST + size, SEGMENT_BYTES)
    ]
    runs.append((STATUS, 1, 2))
    table = b""
    for n, (gpa, count, flags) in enumerate(runs, 1):
        flags |= n < len(runs)
        more = (0, flags | 1 << 7) if features & PACKED else (flags, n)
        table += struct.pack("<QIHH", gpa, count, *more)
    memory.write(HEAD, struct.pack("<IIQ", kind, 0, 0))
    memory.write(STATUS, b"\xff")
    memory.write(TABLE, table)
    memory.write(AVAILABLE, struct.pack("<HHH", 0, 1, 0))
    memory.write(USED, bytes(8))


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("kind", [0, 1], ids=["read", "written"])
@pytest.mark.parametrize("size", [4 << 20, MOST], ids=["4 MBytes", "as large as may be"])
def test_one_that_is_large(size: int, kind: int, features: int, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"disk" * (size >> 2))
    with Host(pcpus=1, ram="24M", overcommit=Terms(read_ns=0)) as host:
        vm, now = full(host, image), host.schedule.time.now
        disk, memory = vm.pc.part("disk0", Blk), vm.memory
        ask_for_all(disk, memory, kind, size, features)
        away = memory.p2m.absent
        assert away > host.frames.free_count
        disk.kick(0)
        for _ in range(20):
            host.run(deadline_ns=now() + 100 * US)
            if not disk.state.waiting:
                break
        queue = disk.state.queues[0]
        assert vm.ended is None and queue.taken == queue.given == queue.published != 0
        assert memory.read(STATUS, 1) == b"\0"
        for at in range(0, size, 1 << 20):
            count = min(size - at, 1 << 20)
            assert memory.read(FIRST + at, count) == disk.medium.read(at, count)
