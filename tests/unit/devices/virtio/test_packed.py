"""Packed virtqueues: laps, chains, event suppression, and what no driver may do."""

import struct

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, PACKED, QUEUES, RAM, VERSION_1, Driver
from tests.unit.devices.virtio.rings import AVAIL, DEVICE_AREA, DRIVER_AREA, USED, PackedRing
from understudy.devices.virtio.packed import PackedQueue
from understudy.devices.virtio.queue import Chain, Queue, QueueState, RingError
from understudy.machine.physical import PhysicalMemory

INDIRECT, EVENT_IDX = 1 << 28, 1 << 29
TABLE = 0x8000
SIZE = 8


def ready(features: int = 0, size: int = SIZE) -> Driver:
    d = Driver("virtio_rng")
    d.start(VERSION_1 | PACKED | features, size)
    return d


def ring(d: Driver) -> PackedRing:
    found = d.rings[0]
    assert isinstance(found, PackedRing)
    return found


def queue(d: Driver) -> Queue:
    return d.device.queue(0)


def test_a_chain_takes_entries_of_the_ring_and_is_named_by_its_last() -> None:
    d = ready()
    ring(d).write(0, 0x4000, 10, 77, 1 | AVAIL)
    ring(d).write(1, 0x5000, 20, 78, 1 | AVAIL)
    ring(d).write(2, 0x6000, 30, 5, 2 | AVAIL)
    q = queue(d)
    chain = q.pop()
    assert chain == Chain(5, ((0x4000, 10), (0x5000, 20)), ((0x6000, 30),), 3)
    assert q.pop() is None
    q.unpop(chain)
    assert q.pop() == chain


def test_an_indirect_table_takes_one_entry_and_only_says_who_writes() -> None:
    d = ready(INDIRECT)
    rows = [(0x4000, 1, 9, 0xFFFD), (0x5000, 2, 9, 0xFFFF)]
    d.memory.write(TABLE, b"".join(struct.pack("<QIHH", *row) for row in rows))
    ring(d).write(0, TABLE, 32, 3, 4 | AVAIL)
    assert queue(d).pop() == Chain(3, ((0x4000, 1),), ((0x5000, 2),))


@pytest.mark.parametrize("size", [8, 5, 1])
def test_laps(size: int) -> None:
    """Chains of one entry and of two, so that they lie over the end of the ring, too."""
    d = ready(size=size)
    for n in range(40):
        pair = n % 3 == 1 and size > 1
        d.describe(0, 0, BUFFERS, 4, 3 if pair else 2, 1)
        d.describe(0, 1, BUFFERS + 0x100, 4, 2)
        d.offer(0, 0)
        d.kick()
        assert d.finished(0) == [(0, 8 if pair else 4)], n
    assert d.status == 15


def test_a_used_entry_is_first_told_of_when_all_of_them_are_written() -> None:
    """Another processor sees all that is published together, or nothing."""
    d = ready()
    for n in range(3):
        d.describe(0, n, BUFFERS, 4, 2)
        d.offer(0, n)
    q = queue(d)
    for _ in range(3):
        chain = q.pop()
        assert chain is not None
        q.push(chain, 4)
    assert d.finished(0) == []
    assert q.publish() and not q.publish()
    assert d.finished(0) == [(0, 4), (1, 4), (2, 4)]


def test_who_wants_no_interrupt_gets_none() -> None:
    d = ready()
    told = []
    for flags in (1, 0, 1):
        d.memory.write(QUEUES + DRIVER_AREA, struct.pack("<HH", 0, flags))
        d.request(0, b"", 4)
        told.append(len(d.messages))
    assert told == [0, 1, 1]


def test_an_event_says_at_which_entry_of_which_lap_to_interrupt() -> None:
    d = ready(EVENT_IDX, size=4)
    told = []
    for event in (0x8000, 0x8003, 0x8003, 0x8003, 0, 0x0002, 0x0002, 0x0000):
        d.memory.write(QUEUES + DRIVER_AREA, struct.pack("<HH", event, 2))
        before = len(d.messages)
        d.request(0, b"", 4)
        told.append(len(d.messages) - before)
    assert told == [1, 0, 0, 1, 1, 0, 1, 0]


def test_the_next_kick_is_asked_for_by_entry_and_lap() -> None:
    d = ready(EVENT_IDX, size=4)
    for n in range(1, 10):
        d.request(0, b"", 4)
        where, flags = struct.unpack("<HH", d.memory.read(QUEUES + DEVICE_AREA, 4))
        assert (where & 0x7FFF, where >> 15, flags) == (n % 4, 1 - n // 4 % 2, 2)


# --- what no driver may do ---


def test_a_chain_over_what_has_not_come_back() -> None:
    d = ready()
    for n in range(3):
        ring(d).write(n, BUFFERS, 4, n, 2 | AVAIL)
    q = queue(d)
    assert all(q.pop() for _ in range(3))
    for n in range(3, 9):
        lap = AVAIL if n < 8 else USED
        ring(d).write(n % 8, BUFFERS, 4, n, (3 if n < 8 else 2) | lap)
    assert q.pop() is None
    q.ask_for_kicks()
    with pytest.raises(RingError, match="more descriptors than the 8"):
        q.pop()
    assert d.device.state.queues[0].taken == 3


def test_a_chain_without_end() -> None:
    d = ready()
    for n in range(8):
        ring(d).write(n, BUFFERS, 4, n, 3 | AVAIL)
    d.kick()
    assert d.status & 64


@pytest.mark.parametrize(
    "rows",
    [
        [(BUFFERS, 4, 3), (BUFFERS, 4, 0)],
        [(RAM - 2, 4, 2)],
        [((1 << 64) - 2, 4, 2)],
        [(BUFFERS, 4, 3), (TABLE, 16, 4)],
        [(TABLE, 16, 5), (BUFFERS, 4, 2)],
        [(TABLE, 0, 4)],
        [(TABLE, 24, 4)],
        [(TABLE, 0xFFFF_FFF0, 4)],
    ],
)
def test_it_needs_a_reset_and_nothing_was_written(rows: list[tuple[int, int, int]]) -> None:
    d = ready(INDIRECT)
    for n, (gpa, size, flags) in enumerate(rows):
        ring(d).write(n, gpa, size, 0, flags | AVAIL)
    before = bytes(d.memory.ram)
    d.kick()
    assert d.status & 64
    assert d.memory.ram == before


def test_an_indirect_descriptor_must_have_been_negotiated() -> None:
    d = ready()
    ring(d).write(0, TABLE, 16, 0, 4 | AVAIL)
    with pytest.raises(RingError, match="negotiated"):
        queue(d).pop()


@pytest.mark.parametrize(
    ("register", "place"),
    [(0x20, QUEUES + 8), (0x28, QUEUES + 2), (0x30, QUEUES + 2), (0x20, RAM), (0x28, RAM)],
)
def test_rings_outside_memory_or_not_aligned(register: int, place: int) -> None:
    d = ready()
    d.put(0x14, 0, 1)
    assert d.accept(VERSION_1 | PACKED) == 11
    for usual in (0x20, 0x28, 0x30):
        d.put(usual, place if usual == register else QUEUES + 0x400 * (usual - 0x20) // 8, 8)
    d.put(0x18, 8, 2)
    d.put(0x1C, 1, 2)
    d.describe(0, 0, BUFFERS, 4, 2)
    d.offer(0, 0)
    d.put(0x14, 15, 1)
    d.kick()
    assert d.status & 64


def test_a_size_that_is_no_power_of_two_is_for_packed_rings_alone() -> None:
    d = Driver("virtio_rng")
    for features, expected in ((VERSION_1 | PACKED, 5), (VERSION_1, 64)):
        d.accept(features)
        d.put(0x18, 5, 2)
        assert d.get(0x18, 2) == expected


def test_a_ring_of_a_packed_ones_size_is_no_split_one() -> None:
    d = Driver("virtio_rng")
    d.accept(VERSION_1 | PACKED)
    d.put(0x18, 5, 2)
    d.put(0x14, 3, 1)  # FEATURES_OK taken back, which no driver may
    d.put(8, 1)
    d.put(0xC, 1)
    d.put(0x1C, 1, 2)
    d.put(0x14, 15, 1)
    assert d.status & 64


class Changing(PhysicalMemory):
    """Memory that another processor changes between any two reads."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def read(self, gpa: int, length: int, /) -> bytes:
        self.reads.append((gpa, length))
        row = struct.pack("<QIHH", 0x1000 * len(self.reads), 4, 0, 2 | AVAIL)
        return row * (length // len(row))

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        raise AssertionError("nothing is to be written")


def test_each_descriptor_is_read_once_after_its_flags_have_said_that_it_is_there() -> None:
    memory = Changing()
    chain = PackedQueue(memory, QueueState(size=8), PACKED).pop()
    assert chain is not None and chain.writable == ((0x2000, 4),)
    assert memory.reads == [(0, 128), (0, 128)]
