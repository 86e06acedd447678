"""A disk does the same whatever ring its driver has: split or packed, tables or none, any size.

The oracle is a bytearray.  Requests are cut into descriptors as it comes, wait for a common kick,
and the ring goes around many times.

Source: ours.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.devices.virtio.driver import PACKED, VERSION_1, Driver
from understudy.backends.medium import Zeros
from understudy.backends.overlay import Overlay
from understudy.devices.virtio.gathering import ALONE

SECTOR, SECTORS = 512, 16
AT = 0x2_0000  # the buffers of a request, 16 KiB each
TABLES = 0xE_0000
INDIRECT, EVENT_IDX = 1 << 28, 1 << 29
IN, OUT = 0, 1


@dataclass(frozen=True)
class Request:
    """One for the disk, and how it is laid out."""

    kind: int
    sector: int
    count: int
    fill: int
    cuts: tuple[int, ...]
    is_table: bool


REQUESTS = st.builds(
    Request,
    st.sampled_from([IN, OUT]),
    st.integers(0, SECTORS),
    st.integers(1, 3),
    st.integers(0, 255),
    st.lists(st.integers(1, 1535), max_size=2).map(tuple),
    st.booleans(),
)
BATCHES = st.lists(st.lists(REQUESTS, min_size=1, max_size=3), min_size=1, max_size=12)


def rows_of(d: Driver, slot: int, one: Request) -> list[tuple[int, int, int]]:
    """Its descriptors: (gpa, bytes, flags), with their content in memory."""
    at, size = AT + 0x4000 * slot, SECTOR * one.count
    d.memory.write(at, struct.pack("<IIQ", one.kind, 0, one.sector))
    d.memory.write(at + 0x1000, bytes([one.fill]) * size if one.kind == OUT else b"\xee" * size)
    d.memory.write(at + 0x3000, b"\xee")
    edges = [0, *sorted({cut for cut in one.cuts if cut < size}), size]
    way = 0 if one.kind == OUT else 2
    data = [(at + 0x1000 + a, b - a, way) for a, b in pairwise(edges)]
    return [(at, 16, 0), *data, (at + 0x3000, 1, 2)]


def hand_over(d: Driver, slot: int, one: Request, features: int) -> int:
    """Make it available; the head by which it comes back."""
    rows = rows_of(d, slot, one)
    head = 6 * slot
    if one.is_table and features & INDIRECT:
        table = [
            (gpa, size, flags | (n < len(rows) - 1), n + 1)
            for n, (gpa, size, flags) in enumerate(rows)
        ]
        if features & PACKED:
            table = [(gpa, size, 0, flags) for gpa, size, flags in rows]
        at = TABLES + 0x100 * slot
        d.memory.write(at, b"".join(struct.pack("<QIHH", *row) for row in table))
        d.describe(0, head, at, 16 * len(table), 4)
    else:
        for n, (gpa, size, flags) in enumerate(rows):
            d.describe(0, head + n, gpa, size, flags | (n < len(rows) - 1), head + n + 1)
    d.offer(0, head)
    return head


def result(d: Driver, slot: int, one: Request) -> tuple[int, bytes]:
    at = AT + 0x4000 * slot
    return d.memory.read(at + 0x3000, 1)[0], d.memory.read(at + 0x1000, SECTOR * one.count)


@pytest.mark.parametrize("features", [0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX])
@pytest.mark.parametrize(("ring", "size"), [(0, 32), (PACKED, 32), (PACKED, 19), (PACKED, 64)])
def test_a_disk_is_the_same_by_each_ring(ring: int, size: int, features: int) -> None:
    @settings(max_examples=15, deadline=None)
    @given(BATCHES, st.booleans())
    def run(batches: list[list[Request]], waits: bool) -> None:
        medium: Any = Overlay(Zeros(SECTORS * SECTOR))
        d = Driver("virtio_blk", medium=medium)
        chosen = VERSION_1 | ring | features
        d.start(chosen, size)
        content = bytearray(SECTORS * SECTOR)
        for batch in batches:
            heads = [hand_over(d, slot, one, chosen) for slot, one in enumerate(batch)]
            if waits:  # each batch as after many kicks, until the driver halts
                d.device.state.queues[0].alone = ALONE
                d.kick()
                assert d.finished(0) == []
            d.kick()
            d.clock.hurry()
            assert [head for head, _ in d.finished(0)] == heads
            for slot, one in enumerate(batch):
                start, end = SECTOR * one.sector, SECTOR * (one.sector + one.count)
                status, data = result(d, slot, one)
                if end > len(content):
                    assert status == 1, "an I/O error"
                elif one.kind == OUT:
                    assert status == 0
                    content[start:end] = bytes([one.fill]) * (end - start)
                else:
                    assert (status, data) == (0, bytes(content[start:end]))
        assert medium.read(0, len(content)) == content and d.status == 15

    run()
