"""A host without a free frame, and a guest whose disk needs some to write into.

What: a VM that shares all its memory rings its disk's bell; whenever its run ends for want of a
frame the host gets one more.  In the end it is where one with enough room is.
Source: docs/reference/bounds.md.
Invariants: those of `test_full_host.py`.
"""

import struct
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.programs import start
from tests.walls.test_full_host import TECHNIQUES, full, run_frame_by_frame
from understudy.devices.virtio import pci
from understudy.devices.virtio.blk import Blk
from understudy.devices.virtio.function import NOTIFY
from understudy.machine.host import Host
from understudy.verdict import StopKind
from understudy.vm import VM

PROGRAM = """
    66 c7 07 00 00       | mov word [rdi], 0       ; the bell
    66 83 3e 02          | wait: cmp word [rsi], 2 ; requests that came back
    75 fa                | jne wait
    e6 f4                | out 0xf4, al
"""
BELL = 0xC000_0000 + NOTIFY
HEADS, OUT, IN, STATUSES = 0x31_0000, 0x32_0000, 0x33_0800, 0x34_0000
TABLE, AVAILABLE, USED = 0x35_0000, 0x36_0000, 0x37_0000
SIZE = 1 << 15


def ask(vm: VM) -> None:
    """To write two pages of the disk, and to read others: by one bell."""
    table = b""
    for kind, data in ((1, OUT), (0, IN)):
        at, head = len(table) // 16, HEADS + 0x1000 * kind
        vm.memory.write(head, struct.pack("<IIQ", kind, 0, 0 if kind else 16))
        table += struct.pack("<QIHH", head, 16, 1, at + 1)
        table += struct.pack("<QIHH", data, 0x2000, 1 if kind else 3, at + 2)
        table += struct.pack("<QIHH", STATUSES + 0x1000 * kind, 1, 2, 0)
    vm.memory.write(OUT, b"written!" * 1024)
    vm.memory.write(TABLE, table)
    vm.memory.write(AVAILABLE, struct.pack("<4H", 0, 2, 0, 3))
    disk = vm.pc.part("disk0", Blk)
    disk.function.config_write(4, 2, 6)  # answers in memory, is bus master
    queue = disk.state.queues[0]
    queue.descriptors, queue.driver, queue.device = TABLE, AVAILABLE, USED
    queue.is_enabled, disk.state.driver_features, disk.state.status = True, 1 << 32, 15
    start(vm, PROGRAM, rdi=BELL, rsi=USED + 2)


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_frames_that_come_one_by_one(
    paging: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pci, "PATIENCE", 2)
    (path := tmp_path / "disk").write_bytes(b"disk" * (SIZE >> 2))
    with Host("64M") as host, VM("4M", host=host) as neighbor:
        vm = VM("16M", host=host, paging=paging, disks=(f"{path},overlay",))
        ask(vm)
        image = vm.snapshot()
        ends: list[Any] = []
        for is_full in (False, True):
            one = image.restore(host=host)
            room: AbstractContextManager[list[int]] = full(host) if is_full else nullcontext([])
            with room as taken:
                stop, stops = run_frame_by_frame(one, host, taken, neighbor)
            assert (stops > 4) == is_full
            disk = one.pc.part("disk0", Blk).medium.read(0, SIZE)
            ends.append((stop.kind, disk, one.memory.read(0, one.memory.size)))
            one.close()
        assert ends[0] == ends[1] and ends[0][0] is StopKind.DEBUG_EXIT
        assert ends[0][1].startswith(b"written!" * 1024) and b"disk" * 2048 in ends[0][2]
        image.close()
        vm.close()
