"""Split virtqueues: chains, indirect tables, event indices, and what no driver may do."""

import struct
from collections.abc import Callable

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, QUEUES, RAM, VERSION_1, Driver
from understudy.devices.virtio.queue import (
    Chain,
    Queue,
    QueueState,
    RingError,
    cut,
)
from understudy.devices.virtio.split import SplitQueue
from understudy.machine.physical import PhysicalMemory

INDIRECT, EVENT_IDX = 1 << 28, 1 << 29
TABLE = 0x8000


def queue(d: Driver) -> Queue:
    return d.device.queue(0)


def ready(features: int = 0) -> Driver:
    d = Driver("virtio_rng")
    d.start(VERSION_1 | features)
    return d


def test_a_chain_is_what_is_read_and_then_what_is_written() -> None:
    d = ready()
    d.describe(0, 3, 0x4000, 10, 1, 1)
    d.describe(0, 1, 0x5000, 20, 1, 0)
    d.describe(0, 0, 0x6000, 30, 2)
    d.offer(0, 3)
    q = queue(d)
    chain = q.pop()
    assert chain == Chain(3, ((0x4000, 10), (0x5000, 20)), ((0x6000, 30),))
    assert q.pop() is None
    q.unpop(chain)
    assert q.pop() == chain


def test_an_indirect_table_is_a_chain_of_its_own() -> None:
    d = ready(INDIRECT)
    rows = [(0x4000, 1, 1, 2), (0xDEAD, 9, 0, 0), (0x5000, 2, 2, 0)]
    d.memory.write(TABLE, b"".join(struct.pack("<QIHH", *row) for row in rows))
    d.describe(0, 5, TABLE, 48, 4 | 2)
    d.offer(0, 5)
    assert queue(d).pop() == Chain(5, ((0x4000, 1),), ((0x5000, 2),))


def test_indices_wrap() -> None:
    d = ready()
    state = d.device.state.queues[0]
    state.taken = state.given = state.published = 0xFFFE
    d.rings[0].available = d.rings[0].used = 0xFFFE
    assert [len(d.request(0, b"", 4)) for _ in range(5)] == [4] * 5
    assert (state.taken, state.given) == (3, 3)


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    d = ready()
    d.memory.write(QUEUES + 0x400, b"\1")
    d.request(0, b"", 4)
    assert d.messages == []
    d.memory.write(QUEUES + 0x400, b"\0")
    d.request(0, b"", 4)
    assert len(d.messages) == 1


def test_event_index_says_at_which_buffer_to_interrupt() -> None:
    d = ready(EVENT_IDX)
    told = []
    for event in (0, 2, 2, 2, 3):
        d.memory.write(QUEUES + 0x400 + 4 + 2 * 8, event.to_bytes(2, "little"))
        before = len(d.messages)
        d.request(0, b"", 4)
        told.append(len(d.messages) - before)
    assert told == [1, 0, 1, 0, 0]


def test_event_index_asks_for_the_next_kick() -> None:
    d = ready(EVENT_IDX)
    for n in range(1, 4):
        d.request(0, b"", 4)
        assert d.memory.read(QUEUES + 0x800 + 4 + 8 * 8, 2) == n.to_bytes(2, "little")


def test_one_interrupt_for_all_that_one_kick_brings() -> None:
    d = ready()
    for n in range(5):
        d.describe(0, n, BUFFERS + 16 * n, 16, 2)
        d.offer(0, n)
    d.kick()
    assert d.finished(0) == [(n, 16) for n in range(5)] and len(d.messages) == 1


# --- what no driver may do ---


def loop(d: Driver) -> None:
    d.describe(0, 0, BUFFERS, 4, 1, 1)
    d.describe(0, 1, BUFFERS, 4, 1, 0)


def itself(d: Driver) -> None:
    d.describe(0, 0, BUFFERS, 4, 3, 0)


def beyond_the_table(d: Driver) -> None:
    d.describe(0, 0, BUFFERS, 4, 1, 8)


def read_after_write(d: Driver) -> None:
    d.describe(0, 0, BUFFERS, 4, 3, 1)
    d.describe(0, 1, BUFFERS, 4, 0)


def outside_memory(d: Driver) -> None:
    d.describe(0, 0, RAM - 2, 4, 2)


def end_of_all_addresses(d: Driver) -> None:
    d.describe(0, 0, (1 << 64) - 2, 4, 2)


def too_long(d: Driver) -> None:
    for n in range(8):
        d.describe(0, n, 0, 0xFFFF_FFFF, 3 if n < 7 else 2, n + 1)


def indirect(
    *rows: tuple[int, int, int, int], size: int | None = None, flags: int = 4
) -> Callable[[Driver], None]:
    def put(d: Driver) -> None:
        table = b"".join(struct.pack("<QIHH", *row) for row in rows)
        d.memory.write(TABLE, table)
        d.describe(0, 0, TABLE, len(table) if size is None else size, flags)

    return put


LEAF = (BUFFERS, 4, 2, 0)
HOSTILE = {
    "loop": loop,
    "itself": itself,
    "beyond the table": beyond_the_table,
    "read after write": read_after_write,
    "outside memory": outside_memory,
    "end of all addresses": end_of_all_addresses,
    "too long": too_long,
    "indirect and next": indirect(LEAF, flags=5),
    "indirect in indirect": indirect((TABLE, 16, 4, 0)),
    "indirect after the first": indirect((BUFFERS, 4, 3, 1), (TABLE, 16, 4, 0)),
    "indirect loop": indirect((BUFFERS, 4, 3, 0)),
    "indirect beyond": indirect((BUFFERS, 4, 3, 1)),
    "indirect of nothing": indirect(LEAF, size=0),
    "indirect of a half": indirect(LEAF, size=24),
    "indirect of gigabytes": indirect(LEAF, size=0xFFFF_FFF0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_needs_a_reset_and_nothing_was_written(name: str) -> None:
    d = ready(INDIRECT)
    hostile: Callable[[Driver], None] = HOSTILE[name]
    hostile(d)
    d.offer(0, 0)
    before = bytes(d.memory.ram)
    d.kick()
    assert d.status & 64
    assert d.memory.ram == before


def test_what_was_done_before_is_given_back() -> None:
    d = ready()
    d.describe(0, 0, BUFFERS, 4, 2)
    loop_at = 1
    d.describe(0, loop_at, BUFFERS, 4, 3, loop_at)
    d.offer(0, 0)
    d.offer(0, loop_at)
    d.kick()
    assert d.finished(0) == [(0, 4)] and d.status & 64


def test_an_indirect_descriptor_must_have_been_negotiated() -> None:
    d = ready()
    indirect(LEAF)(d)
    d.offer(0, 0)
    with pytest.raises(RingError, match="negotiated"):
        queue(d).pop()


def test_more_available_than_the_queue_has() -> None:
    d = ready()
    d.memory.write(QUEUES + 0x402, (9).to_bytes(2, "little"))
    with pytest.raises(RingError, match="9 available buffers in a queue of 8"):
        queue(d).pop()


@pytest.mark.parametrize(
    ("register", "place"),
    [(0x20, QUEUES + 8), (0x28, QUEUES + 1), (0x30, QUEUES + 2),
     (0x20, RAM), (0x28, RAM), (0x30, RAM), (0x28, (1 << 64) - 2), (0x20, (1 << 64) - 16)],
)  # fmt: skip
def test_rings_outside_memory_or_not_aligned(register: int, place: int) -> None:
    d = ready()
    d.accept(VERSION_1)
    for usual, offset in ((0x20, 0), (0x28, 0x400), (0x30, 0x800)):
        d.put(usual, QUEUES + offset, 8)
    d.put(register, place, 8)
    d.put(0x18, 8, 2)
    d.put(0x1C, 1, 2)
    d.describe(0, 0, BUFFERS, 4, 2)
    d.offer(0, 0)
    d.put(0x14, 15, 1)
    assert d.status & 64


class Changing(PhysicalMemory):
    """Memory that another processor changes between any two reads."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, gpa: int, length: int, /) -> bytes:
        self.reads.append(gpa)
        if gpa < 0x400:  # first a leaf, then, if it is read again, a loop
            again = self.reads.count(gpa) > 1
            return struct.pack("<QIHH", 0x1000, 4, 3 if again else 2, 0)
        return (1).to_bytes(2, "little") * (length // 2)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        raise AssertionError("nothing is to be written")


def test_each_descriptor_is_read_once() -> None:
    memory = Changing()
    q = SplitQueue(memory, QueueState(size=8, driver=0x400, device=0x800), INDIRECT)
    chain = q.pop()
    assert chain is not None and chain.writable == ((0x1000, 4),)
    assert len(memory.reads) == len(set(memory.reads)) == 3


# --- pieces ---


def test_cut_gather_scatter() -> None:
    d = Driver("virtio_rng")
    parts = [(0, 4), (10, 0), (20, 4)]
    assert cut(parts, 2, 4) == [(2, 2), (20, 2)]
    assert cut(parts, 4, 100) == [(20, 4)]
    assert cut(parts, 8, 1) == cut(parts, 0, 0) == []
    assert d.memory.scatter(parts, b"abcdefghij") == 8
    assert d.memory.gather(parts) == b"abcdefgh"
