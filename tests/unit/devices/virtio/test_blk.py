"""Virtio block device: each request, each refusal, and errors of the computer."""

import errno
import json
import struct
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, VERSION_1, Driver
from understudy.backends.medium import Medium, Zeros
from understudy.backends.overlay import Overlay
from understudy.devices.virtio.blk import MOST

SIZE = 1 << 20
FLUSH, RO, DISCARD, WRITE_ZEROES, MQ = 1 << 9, 1 << 5, 1 << 13, 1 << 14, 1 << 12
ALL = VERSION_1 | FLUSH | DISCARD | WRITE_ZEROES


class Recorded(Overlay):
    """A disk that writes down what is done to it, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(Zeros(SIZE))
        self.log: list[Any] = []
        self.fails: int | None = None

    def _note(self, *what: Any) -> None:
        if self.fails is not None:
            raise OSError(self.fails, "it cannot")
        self.log.append(what)

    def read(self, offset: int, length: int) -> bytes:
        self._note("read", offset, length)
        return super().read(offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._note("write", offset, len(data))
        super().write(offset, data)

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self._note("zero", offset, length, may_unmap)


def disk(features: int = ALL, medium: Medium | None = None, **options: Any) -> Driver:
    d = Driver("virtio_blk", medium=medium or Recorded(), **options)
    d.start(features)
    return d


def ask(d: Driver, kind: int, sector: int, out: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """(status, data) of one request."""
    found = d.request(0, struct.pack("<IIQ", kind, 0, sector) + out, room + 1)
    status = d.memory.read(BUFFERS + 16 + len(out) + room, 1)[0]
    assert len(found) in (0, 20, room + 1)
    return status, found[:room]


def log(d: Driver) -> list[Any]:
    return list(d.device.medium.log)  # type: ignore[attr-defined]


def test_the_configuration_says_how_large_it_is_and_what_it_takes() -> None:
    d = disk()
    assert d.get(0x2000, 8) == SIZE // 512
    assert (d.get(0x2008), d.get(0x200C)) == (1 << 16, 254)
    assert d.get(0x2014) == 512
    assert (d.get(0x2024), d.get(0x2028), d.get(0x2030)) == (1 << 15, 16, 1 << 15)
    assert d.config(0) == 0x1042_1AF4
    assert d.offered & ALL == ALL and not d.offered & (RO | MQ)


def test_what_is_written_is_read() -> None:
    d = disk()
    assert ask(d, 1, 3, b"ab" * 512) == (0, b"")
    assert ask(d, 0, 3, room=1024) == (0, b"ab" * 512)
    assert ask(d, 0, 2, room=512) == (0, bytes(512))
    assert log(d)[0] == ("write", 3 * 512, 1024)


def test_header_and_data_may_lie_in_any_descriptors() -> None:
    d = disk()
    d.memory.write(BUFFERS, struct.pack("<IIQ", 1, 0, 0) + b"q" * 512)
    for n, (at, size) in enumerate([(0, 7), (7, 100), (107, 421)]):
        d.describe(0, n, BUFFERS + at, size, 1, n + 1)
    d.describe(0, 3, BUFFERS + 0x800, 1, 2)
    d.offer(0, 0)
    d.kick()
    assert d.finished(0) == [(0, 1)] and d.memory.read(BUFFERS + 0x800, 1) == b"\0"
    assert ask(d, 0, 0, room=512) == (0, b"q" * 512)


def test_a_flush_reaches_the_medium_and_without_it_each_write_does() -> None:
    d = disk()
    assert ask(d, 1, 0, bytes(512))[0] == 0 and ask(d, 4, 0) == (0, b"")
    assert log(d) == [("write", 0, 512), ("flush",)]
    plain = disk(VERSION_1)
    ask(plain, 1, 0, bytes(512))
    assert log(plain) == [("write", 0, 512), ("flush",)]


def test_discard_and_zeros_of_several_ranges() -> None:
    d = disk()
    ranges = struct.pack("<QIIQII", 8, 8, 0, 100, 2, 0)
    assert ask(d, 11, 0, ranges) == (0, b"")
    assert ask(d, 13, 0, struct.pack("<QIIQII", 0, 1, 1, 5, 1, 0)) == (0, b"")
    assert log(d) == [
        ("discard", 4096, 4096),
        ("discard", 51200, 1024),
        ("zero", 0, 512, True),
        ("zero", 2560, 512, False),
    ]


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (11, struct.pack("<QII", 0, 8, 1), 2),  # a discard does not unmap
        (13, struct.pack("<QII", 0, 8, 2), 2),  # a reserved flag
        (11, struct.pack("<QII", SIZE // 512, 1, 0), 1),
        (13, struct.pack("<QII", (1 << 64) - 1, 1, 0), 1),
        (13, struct.pack("<QII", 0, (1 << 15) + 1, 0), 1),
        (11, b"", 1),
        (11, bytes(15), 1),
        (11, bytes(16 * 17), 1),
        (11, struct.pack("<QIIQII", 0, 1, 0, SIZE, 1, 0), 1),  # then not the first one either
    ],
)
def test_ranges_that_are_refused(kind: int, ranges: bytes, status: int) -> None:
    d = disk()
    assert ask(d, kind, 0, ranges) == (status, b"") and log(d) == []


@pytest.mark.parametrize(
    ("kind", "sector", "count", "status"),
    [
        (0, SIZE // 512, 512, 1),
        (0, SIZE // 512 - 1, 1024, 1),
        (1, SIZE // 512, 512, 1),
        (0, (1 << 64) - 1, 512, 1),
        (0, 0, 100, 1),
        (1, 0, 513, 1),
        (2, 0, 0, 2),
        (11 + 3, 0, 512, 2),
    ],
)
def test_requests_that_are_refused(kind: int, sector: int, count: int, status: int) -> None:
    d = disk()
    out, room = (bytes(count), 0) if kind == 1 else (b"", count)
    assert ask(d, kind, sector, out, room) == (status, b"") and log(d) == []


def test_a_request_of_more_than_there_may_be() -> None:
    d = disk(VERSION_1, Zeros(1 << 30))
    d.memory.write(BUFFERS, struct.pack("<IIQ", 0, 0, 0))
    d.describe(0, 0, BUFFERS, 16, 1, 1)
    for n in range(1, 7):  # the same half of the memory again and again would do for gigabytes
        d.describe(0, n, 0, MOST // 8 & -512 if n < 6 else MOST, 3, n + 1)
    d.describe(0, 7, BUFFERS + 0x100, 1, 2)
    d.offer(0, 0)
    d.kick()
    assert d.status == 15 and d.memory.read(BUFFERS + 0x100, 1) == b"\1"


def test_features_that_were_not_accepted_are_not_there() -> None:
    d = disk(VERSION_1)
    assert ask(d, 11, 0, bytes(16)) == ask(d, 13, 0, bytes(16)) == (2, b"")


def test_a_read_only_disk() -> None:
    d = disk(VERSION_1, Zeros(SIZE))
    assert d.offered & RO and not d.offered & DISCARD
    assert ask(d, 1, 0, bytes(512)) == (1, b"") and ask(d, 0, 0, room=512)[0] == 0


def test_the_serial_number() -> None:
    d = disk(serial="ABC-1")
    assert ask(d, 8, 0, room=20) == (0, b"ABC-1" + bytes(15))
    assert ask(d, 8, 0, room=3) == (0, b"ABC")


@pytest.mark.parametrize("lacks", ["header", "status"])
def test_a_request_that_is_none_breaks_the_ring(lacks: str) -> None:
    d = disk()
    d.describe(0, 0, BUFFERS, 15 if lacks == "header" else 16, 1, 1)
    d.describe(0, 1, BUFFERS, 1 if lacks == "header" else 0, 2)
    d.offer(0, 0)
    d.kick()
    assert d.status & 64


def test_a_buffer_outside_memory_breaks_it_before_anything_is_written() -> None:
    d = disk()
    d.memory.write(BUFFERS, struct.pack("<IIQ", 1, 0, 0))
    d.describe(0, 0, BUFFERS, 16, 1, 1)
    d.describe(0, 1, BUFFERS, 512, 1, 2)
    d.describe(0, 2, 1 << 40, 512, 1, 3)
    d.describe(0, 3, BUFFERS, 1, 2)
    d.offer(0, 0)
    d.kick()
    assert d.status & 64 and log(d) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_computer_is_an_io_error(error: int) -> None:
    d = disk()
    d.device.medium.fails = error  # type: ignore[attr-defined]
    assert ask(d, 0, 0, room=512) == ask(d, 1, 0, bytes(512)) == ask(d, 4, 0) == (1, b"")
    d.device.medium.fails = None  # type: ignore[attr-defined]
    assert ask(d, 1, 0, bytes(512)) == (0, b"")


def test_or_stops_the_vm_and_is_tried_again_when_it_goes_on() -> None:
    said: list[str] = []
    d = disk(stop=said.append)
    medium = d.device.medium  # type: ignore[attr-defined]
    medium.fails = errno.ENOSPC
    d.memory.write(BUFFERS, struct.pack("<IIQ", 1, 0, 1) + b"z" * 512)
    d.describe(0, 0, BUFFERS, 528, 1, 1)
    d.describe(0, 1, BUFFERS + 0x800, 1, 2)
    d.offer(0, 0)
    d.kick()
    assert len(said) == 1 and "it cannot" in said[0]
    assert d.finished(0) == [] and d.messages == []
    other = Driver("virtio_blk", d.clock.ns, medium=Recorded(), stop=said.append)
    other.board.load(d.board.save())
    other.memory.ram[:] = d.memory.ram
    d.clock.advance(10_000)
    assert len(said) > 1 and d.finished(0) == []  # it still cannot
    medium.fails = None
    for one in (d, other):
        one.clock.advance(10_000)
        assert one.memory.read(BUFFERS + 0x800, 1) == b"\0"
        assert one.device.medium.read(512, 512) == b"z" * 512  # type: ignore[attr-defined]
    assert d.finished(0) == [(0, 1)]


def test_several_queues() -> None:
    d = disk(VERSION_1 | MQ, queues=3)
    assert d.get(0x2022, 2) == 3 and d.get(0x12, 2) == 3
    for n in range(3):
        found = d.request(n, struct.pack("<IIQ", 0, 0, n), 513, gpa=BUFFERS + 0x1000 * n)
        assert found == bytes(513)
    assert [message.vector for message in d.messages] == [0x41, 0x42, 0x43]


def test_so_much_at_once_and_the_rest_a_moment_later() -> None:
    d = disk()
    d.device.moved = 0
    d.memory.write(BUFFERS, struct.pack("<IIQ", 0, 0, 0))
    for n in range(8):
        d.describe(0, n, BUFFERS, 16, 1, n + 1 if n < 7 else 0)
    for n in range(0, 6, 2):
        d.describe(0, n, BUFFERS, 16, 1, n + 1)
        d.describe(0, n + 1, BUFFERS + 0x1000, 513, 2)
        d.offer(0, n)
    real, d.device.serve = d.device.serve, None  # type: ignore[method-assign,assignment]

    def large(number: int, chain: Any) -> int:
        d.device.moved += 64 << 20
        return real(number, chain)

    d.device.serve = large  # type: ignore[method-assign]
    d.kick()
    assert d.finished(0) == [(0, 513)]
    d.clock.advance(5000)
    assert d.finished(0) == [(2, 513), (4, 513)]


def test_a_limit_of_speed_lets_requests_wait_and_a_little_through_at_once() -> None:
    d = Driver("virtio_blk", medium=Overlay(Zeros(SIZE)), rate=1_000_000)  # a byte a microsecond
    d.start(ALL)
    started, done = d.clock.now(), []
    for _ in range(30):
        d.memory.write(BUFFERS, struct.pack("<IIQ", 0, 0, 0))
        d.describe(0, 0, BUFFERS, 16, 1, 1)
        d.describe(0, 1, BUFFERS + 0x100, 1024, 3, 2)
        d.describe(0, 2, BUFFERS + 0x700, 1, 2)
        d.offer(0, 0)
        d.kick()
        while not d.finished(0):
            d.clock.advance(1000)
        done.append((d.clock.now() - started) // 1000)
    assert done[:10] == [0] * 10, "10 ms ahead"
    assert done[-1] == 29 * 1024 - 10_000, "and then a byte a microsecond"
    d.clock.advance(1_000_000_000)
    assert ask(d, 0, 1 << 30, room=512)[0] == 1
    assert d.device.state.free_at - started == 30 * 1024 * 1000, "what was refused does not count"


def test_a_limit_of_speed_outlives_a_reset_and_a_snapshot() -> None:
    d = Driver("virtio_blk", medium=Overlay(Zeros(SIZE)), rate=1_000_000)
    d.start(ALL)
    assert ask(d, 1, 0, bytes(4096))[0] == 0
    free = d.device.state.free_at
    d.start(ALL)
    assert d.device.state.free_at == free > 0
    other = Driver("virtio_blk", medium=Overlay(Zeros(SIZE)), rate=1_000_000)
    other.board.load(json.loads(json.dumps(d.board.save())))
    assert other.device.state.free_at == free
