"""How much of a virtio file system's work one kick does, by counts.

Source: docs/reference/bounds.md; ours.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.devices.virtio.driver import BUFFERS
from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.backends import folder_names
from understudy.backends.folder_names import Node
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio import fs_requests, pci
from understudy.devices.virtio.fs import HIGH_PRIORITY, REQUEST
from understudy.devices.virtio.fs_messages import Op
from understudy.devices.virtio.fs_requests import (
    ONE_FORGOTTEN,
    ONE_FOUND,
    ONE_NAME,
    ONE_REQUEST,
    ONE_STEP,
    ONE_SYNC,
)

ENTRIES, FILES = 8, 40


@pytest.fixture
def d(tmp_path: Path) -> Iterator[FuseDriver]:
    for number in range(FILES):
        (tmp_path / f"{number}").touch()
    with closing(FuseDriver(tmp_path)) as made:
        yield made


def ring(d: FuseDriver, op: Op, body: bytes, room: int, queue: int = REQUEST) -> int:
    """All entries of a queue are the same request; how many of them one kick carried out."""
    header = fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), op, 1, ROOT, 0, 0, 0, 0, 0)
    d.memory.write(BUFFERS, header + body)
    d.describe(queue, 0, BUFFERS, len(header + body), 1 if room else 0, 1)
    d.describe(queue, 1, BUFFERS + len(header + body), room, 2)
    for _ in range(ENTRIES):
        d.offer(queue, 0)
    d.kick(queue)
    return len(d.finished(queue))


@pytest.mark.parametrize("op", [Op.READDIR, Op.READDIRPLUS])
def test_names_of_a_folder_count_and_the_rest_comes_a_moment_later(
    d: FuseDriver, monkeypatch: pytest.MonkeyPatch, op: Op
) -> None:
    handle = d.open(ROOT, op=Op.OPENDIR)
    each = ONE_NAME if op is Op.READDIR else ONE_FOUND
    monkeypatch.setattr(pci, "QUANTUM", 2 * (ONE_REQUEST + (FILES + 2) * each))
    body = fuse.READ_IN.pack(handle, 0, 1 << 14, 0, 0, 0, 0)
    assert ring(d, op, body, 1 << 14) == 2
    d.clock.advance(pci.SOON)
    assert len(d.finished(REQUEST)) == 2
    d.clock.advance(2 * pci.SOON)
    assert len(d.finished(REQUEST)) == ENTRIES - 4


def test_each_request_counts(d: FuseDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pci, "QUANTUM", 3 * ONE_REQUEST)
    assert ring(d, Op.LOOKUP, b"7\0", 1 << 10) == 3


def test_a_request_that_fails_counts(d: FuseDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pci, "QUANTUM", 3 * ONE_REQUEST)
    assert ring(d, Op.LOOKUP, b"none\0", 1 << 10) == 3


def test_each_row_that_is_forgotten_counts(d: FuseDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [fuse.FORGET_ONE.pack(77, 1)] * 1000
    monkeypatch.setattr(pci, "QUANTUM", 2 * (ONE_REQUEST + len(rows) * ONE_FORGOTTEN))
    body = fuse.BATCH_FORGET_IN.pack(len(rows), 0) + b"".join(rows)
    assert ring(d, Op.BATCH_FORGET, body, 0, HIGH_PRIORITY) == 2


@pytest.mark.parametrize("op", [Op.FSYNC, Op.FSYNCDIR])
def test_a_kick_waits_for_the_disk_once(d: FuseDriver, op: Op) -> None:
    assert ONE_SYNC == pci.QUANTUM
    handle = d.open(d.look("7").node)
    assert ring(d, op, fuse.FSYNC_IN.pack(handle, 0, 0), 1 << 10) == 1


def test_each_step_to_a_deep_folder_counts(tmp_path: Path) -> None:
    depth, files = 20, 30
    deep = tmp_path.joinpath(*["x"] * depth)
    deep.mkdir(parents=True)
    for number in range(files):
        (deep / f"{number}").touch()
    with closing(FuseDriver(tmp_path)) as d:
        node = d.look(*["x"] * depth).node
        handle = d.open(node, op=Op.OPENDIR)
        d.ask(Op.LOOKUP, node, b"7\0")
        assert d.device.moved >= ONE_REQUEST + depth * ONE_STEP
        body = fuse.READ_IN.pack(handle, 0, 1 << 13, 0, 0, 0, 0)
        d.ask(Op.READDIRPLUS, node, body)
        assert d.device.moved >= ONE_REQUEST + files * (ONE_FOUND + depth * ONE_STEP)


def test_names_that_cost_too_much_come_in_pieces(
    d: FuseDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, offset, pieces = d.open(ROOT, op=Op.OPENDIR), 0, []
    monkeypatch.setattr(fs_requests, "QUANTUM", ONE_REQUEST + 10 * ONE_FOUND)
    row = fuse.ENTRY_BYTES + fuse.DIRENT.size + 8  # each name has one or two bytes
    while data := d.wants(
        Op.READDIRPLUS, ROOT, fuse.READ_IN.pack(handle, offset, 1 << 13, 0, 0, 0, 0)
    ):
        pieces.append(len(data) // row)
        offset = fuse.DIRENT.unpack_from(data, len(data) - row + fuse.ENTRY_BYTES)[1]
    assert pieces == [10, 10, 10, 10, FILES + 2 - 40]


class Ordered(OrderedDict[int, Node]):
    """Names, of which it is counted how many are looked at in order."""

    looked_at = 0

    def __iter__(self) -> Iterator[int]:
        for number in super().__iter__():
            self.looked_at += 1
            yield number


def test_a_name_that_goes_costs_no_look_at_all_others(
    d: FuseDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_names, "MOST_NODES", FILES)
    for number in range(FILES - 1):
        d.look(f"{number}")
    d.folder.names.nodes = nodes = Ordered(d.folder.names.nodes)
    d.look(f"{FILES - 1}")
    assert len(nodes) == FILES and nodes.looked_at <= 2, "the folder, and the oldest"


def test_each_name_that_is_passed_over_counts(
    d: FuseDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_names, "MOST_NODES", FILES)
    for number in range(FILES - 1):
        node = d.look(f"{number}").node
        if number < 3:
            d.open(node)  # what is open stays
    d.look(f"{FILES - 1}")
    assert d.folder.names.steps == 3
    assert d.device.moved >= ONE_REQUEST + 3 * ONE_STEP
