"""A host that has too few frames for a request: nothing of it is lost, and it is carried out once.

What: memory that is away, of which so and so many pieces can be had until the guest goes on.  One
more each time that the VM ends for it; what comes of it is compared with memory that is all there.
Source: docs/reference/overcommit.md.
Invariants: what was asked for stays in its ring until all is there that it takes, the ring and the
tables included; the driver is told once.
"""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.devices.virtio import driver
from tests.unit.devices.virtio.driver import PACKED, VERSION_1, Driver
from tests.unit.devices.virtio.sockets import VsockDriver
from tests.unit.devices.virtio.test_balloon import Noted
from tests.unit.devices.virtio.test_net import ALL, HEADER, Wire, frame
from understudy.backends.frame import Frame
from understudy.backends.medium import Zeros
from understudy.backends.overlay import Overlay
from understudy.devices.virtio import pci
from understudy.devices.virtio.gathering import ALONE
from understudy.devices.virtio.net import MRG_RXBUF
from understudy.devices.virtio.vsock_packet import HOST_CID, LAYOUT, STREAM, Header, Op
from understudy.machine.frames import OutOfFrames

PIECE = 64  # bytes: each part of a ring has some of its own
AT = 0x2_0000  # buffers
TABLE = 0x8_0000
MANY = 400  # pieces, more than any of these takes
EVENT_IDX, INDIRECT = 1 << 29, 1 << 28
RINGS = [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | PACKED, VERSION_1 | PACKED | EVENT_IDX]
Row = tuple[int, int, int]
"""Of a buffer: where, bytes, flags."""
Case = tuple[Driver, Callable[[], object], list[Any]]
"""A driver, what has a device do something, and what it has done outside of memory."""


class Scarce(driver.Memory):
    """So many pieces of it are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[int] = set()
        self.pieces = MANY

    def make_room(self, length: int) -> None:
        self.there.clear()

    def _need(self, gpa: int, size: int) -> None:
        for piece in range(gpa // PIECE, (gpa + size - 1) // PIECE + 1):
            if len(self.there | {piece}) > self.pieces:
                raise OutOfFrames("1 frames wanted, 0 are free")
            self.there.add(piece)

    def read(self, gpa: int, length: int, /) -> bytes:
        self._need(gpa, length)
        return super().read(gpa, length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        self._need(gpa, len(data))
        super().write(gpa, data)

    def expect(self, runs: Any, most: int, /, *, write: bool) -> None:
        for gpa, size in runs:
            self._need(gpa, min(size, most))
            if (most := most - size) <= 0:
                break


@pytest.fixture(autouse=True)
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "Memory", Scarce)
    monkeypatch.setattr(pci, "PATIENCE", 3)


def offer(d: Driver, n: int, head: int, rows: list[Row]) -> None:
    """A buffer of these, which lie in a table if the driver has said that there are some."""
    if d.features & INDIRECT:
        is_packed, parts = d.features & PACKED, []
        for at, (gpa, size, flags) in enumerate(rows, 1):
            more = (0, flags) if is_packed else (flags | (at < len(rows)), at)
            parts.append(struct.pack("<QIHH", gpa, size, *more))
        at = TABLE + 0x1000 * n + 0x100 * head
        d.memory.write(at, b"".join(parts))
        rows = [(at, 16 * len(parts), 4)]
    for at, (gpa, size, flags) in enumerate(rows, head):
        d.describe(n, at, gpa, size, flags | (at + 1 < head + len(rows)), at + 1)
    d.offer(n, head)


def disk(features: int, kind: int) -> Case:
    medium = Overlay(Zeros(1 << 16))
    medium.write(0, bytes(range(256)) * 16)
    d = Driver("virtio_blk", medium=medium)
    d.start(features)
    d.memory.write(AT, struct.pack("<IIQ", kind, 0, 0))
    d.memory.write(AT + 0x1000, b"written!" * 256)
    flags = 0 if kind else 2
    rows = [(AT, 16, 0), (AT + 0x1000, 1024, flags), (AT + 0x2000, 1024, flags)]
    offer(d, 0, 0, [*rows, (AT + 0x3000, 1, 2)])
    done: list[Any] = []
    write = medium.write
    medium.write = lambda *what: (done.append(what), write(*what))[1]  # type: ignore
    return d, d.kick, done


def waiting_disk(features: int, kind: int) -> Case:
    """One whose requests wait for others."""
    d, kick, done = disk(features, kind)
    d.device.state.queues[0].alone = ALONE
    return d, lambda: (kick(), d.clock.hurry()), done


def console(features: int, way: str) -> Case:
    d = Driver("virtio_console")
    d.start(features)
    part: Any = d.device
    done: list[Any] = []
    part.on_output.append(lambda port, data: done.append((port, data)))
    is_out = way == "out"
    offer(d, int(is_out), 0, [(AT + 0x1000 * n, 100, 0 if is_out else 2) for n in range(3)])
    d.memory.write(AT, b"hello")
    return d, (lambda: d.kick(1)) if is_out else lambda: part.send(0, bytes(range(250))), done


def card(features: int, way: str) -> Case:
    """Out: a frame in two pieces.  In: one that takes three buffers."""
    wire = Wire()
    d = Driver("virtio_net", cable=wire)
    d.start(features | ALL | MRG_RXBUF)
    part: Any = d.device
    wire.notify = part.look
    if way == "out":
        d.memory.write(AT, HEADER + frame(size=500))
        offer(d, 1, 0, [(AT, 300, 0), (AT + 300, 212, 0)])
        return d, lambda: d.kick(1), wire.sent
    for n in range(3):
        offer(d, 0, n, [(AT + 0x1000 * n, 1530, 2)])
    return d, lambda: wire.arrive(Frame(frame(size=4000))), []


def sockets(features: int, way: str) -> Case:
    """What goes to a port where nobody is, is refused."""
    d = VsockDriver()
    d.start(features)
    offer(d, 0, 0, [(AT, 44, 2), (AT + 0x1000, 500, 2)])
    header = Header(3, HOST_CID, 1000, 5000, 0, STREAM, Op.REQUEST, 0, 1 << 16, 0)
    d.memory.write(AT + 0x2000, LAYOUT.pack(*header))
    offer(d, 1, 0, [(AT + 0x2000, LAYOUT.size, 0)])
    return d, lambda: d.kick(1), []


def entropy(features: int, way: str) -> Case:
    d = Driver("virtio_rng")
    d.start(features)
    offer(d, 0, 0, [(AT + 0x1000 * n, 200, 2) for n in range(3)])
    return d, d.kick, []


def folder(features: int, way: str) -> Case:
    """A request that is refused: there is no folder."""
    d = Driver("virtio_fs")
    d.start(features)
    d.memory.write(AT, struct.pack("<IIQQIIII", 40, 3, 7, 1, 0, 0, 0, 0))
    offer(d, 1, 0, [(AT, 40, 0), (AT + 0x1000, 8, 2), (AT + 0x2000, 100, 2)])
    return d, lambda: d.kick(1), []


def balloon(features: int, way: str) -> Case:
    d = Driver("virtio_balloon")
    d.start(features)
    part: Any = d.device
    part.pages = noted = Noted()
    d.memory.write(AT, struct.pack("<100I", *range(100)))
    if way == "inflate":
        offer(d, 0, 0, [(AT, 400, 0)])
        return d, d.kick, noted.log
    offer(d, 3, 0, [(AT, 0x8000, 2)])  # a page that is reported is not needed
    return d, lambda: d.kick(3), noted.log


CASES: dict[str, Callable[[int], Case]] = {
    "a disk is read": lambda f: disk(f, 0),
    "a disk is written": lambda f: disk(f, 1),
    "a disk is read, late": lambda f: waiting_disk(f, 0),
    "a console's output": lambda f: console(f, "out"),
    "a console's input": lambda f: console(f, "in"),
    "a frame goes out": lambda f: card(f, "out"),
    "a frame comes in": lambda f: card(f, "in"),
    "a packet is refused": lambda f: sockets(f, ""),
    "entropy": lambda f: entropy(f, ""),
    "a folder": lambda f: folder(f, ""),
    "a balloon": lambda f: balloon(f, "inflate"),
    "pages are reported": lambda f: balloon(f, "report"),
}


def outcome(d: Driver, done: list[Any]) -> Any:
    """All that has come of it."""
    memory: Any = d.memory
    memory.there.clear()
    memory.pieces = MANY
    back = [sorted(d.finished(n)) for n in range(len(d.rings))]
    return bytes(memory.ram), back, len(d.messages), done, d.status


@pytest.mark.parametrize("tables", [0, INDIRECT])
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_done_once_when_there_is_enough(name: str, features: int, tables: int) -> None:
    d, act, done = CASES[name](features | tables)
    memory: Any = d.memory
    memory.there.clear()
    act()
    needed = len(memory.there)
    expected = outcome(d, done)
    assert any(expected[1]) and expected[4] == 15

    d, act, done = CASES[name](features | tables)
    memory = d.memory
    memory.there.clear()
    memory.pieces = stops = 0
    act()
    while True:
        try:
            d.clock.advance(10 * pci.PATIENCE * pci.SOON)
            break
        except OutOfFrames:
            stops += 1
            memory.pieces += 1
    assert stops <= needed and (stops > 3 or name == "pages are reported")
    assert outcome(d, done) == expected


def test_it_waits_a_little_before_the_vm_ends() -> None:
    """And as long again when it goes on, if something was done meanwhile."""
    d, act, done = disk(VERSION_1, 1)
    memory: Any = d.memory
    memory.there.clear()
    memory.pieces = 0
    act()
    d.clock.advance(pci.PATIENCE * pci.SOON - 1)
    with pytest.raises(OutOfFrames, match="0 are free"):
        d.clock.advance(1)
    assert done == []
    with pytest.raises(OutOfFrames, match="0 are free"):
        d.clock.advance(pci.SOON)
    memory.pieces = MANY
    d.clock.advance(pci.SOON)
    assert len(done) == 1 and d.device.starved == 0 and d.clock.next_deadline() is None


def test_what_is_fetched_for_a_request_counts_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of many pieces of which nothing is used costs what its pages cost."""
    d, _, _ = disk(VERSION_1, 4)  # a flush, for which a buffer has room of no use
    monkeypatch.setattr(pci, "QUANTUM", 3 * pci.PAGE_BYTES)
    for head in (4, 6):
        offer(d, 0, head, [(AT, 16, 0), (AT + 0x1000, 1, 2)])
    d.kick()
    assert len(d.finished(0)) == 1
    d.clock.advance(2 * pci.SOON)
    assert len(d.finished(0)) == 2
