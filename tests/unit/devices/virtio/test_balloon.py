"""Virtio memory balloon device: what its driver says on each queue, and what becomes of it."""

import json
import struct
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, VERSION_1, Driver
from understudy.devices.virtio.balloon import Balloon
from understudy.devices.virtio.pci import QUANTUM, SOON

STATS, OOM, REPORTING, HINT, TELL = 1 << 1, 1 << 2, 1 << 5, 1 << 3, 1 << 0
ALL = VERSION_1 | STATS | OOM | REPORTING


class Noted:
    """Pages that are written down."""

    def __init__(self) -> None:
        self.log: list[tuple[str, list[tuple[int, int]]]] = []

    def inflate(self, runs: Any) -> int:
        self.log.append(("inflate", list(runs)))
        return 0

    def deflate(self, runs: Any) -> int:
        self.log.append(("deflate", list(runs)))
        return 0

    def report(self, runs: Any) -> int:
        self.log.append(("report", list(runs)))
        return 0

    def counts(self) -> dict[str, int]:
        return {}

    def save(self) -> dict[str, Any]:
        return {"entries": len(self.log)}

    def load(self, saved: dict[str, Any]) -> None:
        self.log.append(("load", [(saved["entries"], 0)]))


def balloon(features: int = ALL, **options: Any) -> tuple[Driver, Balloon, Noted]:
    d = Driver("virtio_balloon", **options)
    d.start(features)
    part = d.device
    assert isinstance(part, Balloon)
    part.pages = noted = Noted()
    return d, part, noted


def pfns(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def test_what_it_is_and_what_it_offers() -> None:
    d, _, _ = balloon()
    assert d.config(0) == 0x1045_1AF4
    assert d.offered & ALL == ALL and not d.offered & (HINT | TELL)
    assert not Driver("virtio_balloon", oom=False, reporting=False).offered & (OOM | REPORTING)


def test_the_target_is_told_by_an_interrupt_and_the_driver_says_how_far_it_is() -> None:
    d, part, _ = balloon()
    before = len(d.messages)
    part.target = 1000
    part.target = 1000
    assert d.messages[before:] and len(d.messages) == before + 1
    assert (d.get(0x2000), d.get(0x2004), d.get(0x15, 1)) == (1000, 0, 1)
    d.put(0x2004, 700)
    d.put(0x2000, 5)  # not the driver's to write
    assert (part.target, part.actual) == (1000, 700)
    d.put(0x2005, 1, 1)
    assert part.actual == 700 & 0xFF | 1 << 8
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match="32 bits"):
            part.target = wrong


def test_pages_come_as_runs_each_once() -> None:
    d, part, noted = balloon()
    d.request(0, pfns(9, 7, 8, 8, 0xFFFF_FFFF), 0)
    d.request(1, pfns(8), 0)
    assert noted.log == [("inflate", [(7, 3), (0xFFFF_FFFF, 1)]), ("deflate", [(8, 1)])]
    assert (part.counts()["inflated"], part.counts()["deflated"]) == (5, 1)
    d.request(0, pfns(3) + b"\1\2\3", 0)
    assert noted.log[-1] == ("inflate", [(3, 1)])


def test_a_buffer_names_so_many_pages_at_most() -> None:
    d, _, noted = balloon()
    d.request(0, pfns(*range(5000)), 0)
    assert noted.log == [("inflate", [(0, 1024)])]


@pytest.mark.parametrize("queue", [0, 1], ids=["inflate", "deflate"])
def test_each_page_that_is_named_counts_and_the_rest_comes_a_moment_later(queue: int) -> None:
    """Pages that lie by themselves: as many in one go as other devices' work is."""
    d, part, noted = balloon()
    for n in range(6):
        d.memory.write(BUFFERS + 0x1000 * n, pfns(*range(2048 * n, 2048 * (n + 1), 2)))
        d.describe(queue, n, BUFFERS + 0x1000 * n, 0x1000, 0)
        d.offer(queue, n)
    d.kick(queue)
    for n in range(6):
        assert [head for head, _ in d.finished(queue)] == [n] and len(noted.log) == n + 1
        assert part.moved >= QUANTUM
        d.clock.advance(SOON)
    assert d.finished(queue) == [] and d.clock.next_deadline() is None


def test_a_driver_that_names_as_many_as_linux_does_never_waits() -> None:
    """100 MBytes, 256 pages in a buffer, the next one when that is back."""
    d, part, noted = balloon()
    for n in range(100):
        d.request(0, pfns(*range(512 * n, 512 * (n + 1), 2)), 0)
    assert (part.counts()["inflated"], len(noted.log), d.clock.now()) == (25_600, 100, 0)


def test_each_page_that_is_reported_counts() -> None:
    d, part, noted = balloon()
    for n in range(2):
        d.describe(3, n, 0x400_0000 * n, 0x400_0000, 2)
        d.offer(3, n)
    d.kick(3)
    assert (len(d.finished(3)), noted.log) == (1, [("report", [(0, 0x4000)])])
    d.clock.advance(SOON)
    assert len(d.finished(3)) == 1 and part.state.reported == 0x8000


@pytest.mark.parametrize("queue", [3, 4], ids=["as Linux counts", "as the specification counts"])
def test_only_whole_pages_are_reported(queue: int) -> None:
    d, part, noted = balloon()
    d.describe(queue, 0, 0x2_0000, 0x3000, 3, 1)
    d.describe(queue, 1, 0x3_0001, 0x1FFF, 3, 2)
    d.describe(queue, 2, 0x3_0001, 0x1FFE, 2)
    d.offer(queue, 0)
    d.kick(queue)
    assert d.finished(queue) == [(0, 0)]
    assert noted.log == [("report", [(0x20, 3), (0x31, 1)])] and part.state.reported == 4


def test_statistics_are_told_when_they_are_asked_for() -> None:
    d, part, _ = balloon(ns=7)
    values = struct.pack("<HQHQHQ", 5, 1 << 28, 4, 1 << 20, 99, 1)
    d.memory.write(BUFFERS, values)
    d.describe(2, 0, BUFFERS, len(values), 0)
    d.offer(2, 0)
    d.kick(2)
    assert part.statistics == {"total_memory": 1 << 28, "free_memory": 1 << 20}
    assert d.finished(2) == [] and part.state.told_at == 7
    part.ask()
    assert d.finished(2) == [(0, 0)]
    d.memory.write(BUFFERS, struct.pack("<HQ", 4, 5))
    d.describe(2, 0, BUFFERS, 10, 0)
    d.offer(2, 0)
    d.kick(2)
    assert part.statistics == {"free_memory": 5} and d.finished(2) == []


def test_a_driver_without_statistics_is_not_asked() -> None:
    d, part, _ = balloon(VERSION_1)
    part.ask()
    assert not part.state.is_asked and d.status == 15


def test_a_reset_keeps_the_target_and_what_was_counted() -> None:
    d, part, _ = balloon()
    part.target = 10
    d.request(0, pfns(1, 2), 0)
    d.put(0x2004, 2)
    d.put(0x14, 0, 1)
    assert (part.target, part.actual, part.counts()["inflated"]) == (10, 0, 2)


def test_a_snapshot_has_the_pages_too() -> None:
    d, part, _ = balloon()
    part.target = 3
    saved = json.loads(json.dumps(d.board.save()))
    _, other, noted = balloon()
    other.load(saved["virtio_balloon"])
    assert other.target == 3 and noted.log == [("load", [(0, 0)])]
    del saved["virtio_balloon"]["pages"]
    with pytest.raises(ValueError, match="lacks its pages"):
        other.load(saved["virtio_balloon"])
