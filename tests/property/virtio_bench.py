"""A hostile virtio driver, and what must hold whatever it does to rings and registers.

Source: ours; the actions are those of a driver that has gone mad, aimed at its own rings.
Nothing here names a device: whatever is a `VirtioPci` is tried.

Invariants of a device: it never raises; each access ends; it writes nowhere but to RAM; a device
that loads its snapshot in the middle of the traffic goes on in the same way; after a reset it
serves a driver that is sane.
"""

import argparse
import json
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tree import ROOT
from tests.unit.devices.virtio.driver import BAR, BUFFERS, PACKED, QUEUES, RAM, Driver
from tests.unit.devices.virtio.rings import DRIVER_AREA, PackedRing, SplitRing
from understudy.backends.folder import Folder
from understudy.backends.frame import BROADCAST, TCPV6, Frame
from understudy.devices import Device
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op
from understudy.devices.virtio.function import NOTIFY
from understudy.devices.virtio.net import Net
from understudy.devices.virtio.pci import VirtioPci
from understudy.devices.virtio.vsock_packet import LAYOUT, Header

PARTS = sorted(name for name, kind in Device.ALL.items() if issubclass(kind, VirtioPci))
READ = ROOT / "docs" / "paging"  # a folder that stays as it is
OPTIONS: dict[str, Callable[[], dict[str, object]]] = {
    "virtio_blk": lambda: {"queues": 2, "rate": 1_000_000_000},
    "virtio_net": lambda: {"pairs": 2},
    "virtio_fs": lambda: {"folder": Folder(READ)},
}
ALL_ONES = (1 << 64) - 1
MOST_READS = 20_000  # pieces of memory that one access may read or write


@dataclass(frozen=True)
class Action:
    """Something that the driver does."""

    kind: str
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0


PLACES = st.sampled_from(
    [BUFFERS, BUFFERS + 1, BUFFERS + 0x800, QUEUES, QUEUES + 0x400, QUEUES + 0x800, QUEUES + 0x804,
     RAM - 16, RAM - 1, RAM, 0, ALL_ONES, ALL_ONES - 15, 1 << 63, 0xFEE0_0000]
)  # fmt: skip
LENGTHS = st.sampled_from(
    [0, 1, 4, 8, 12, 16, 16, 16, 32, 48, 512, 520, 4096, 0xFFFF_FFF0, 0xFFFF_FFFF]
)
FLAGS = st.sampled_from([0, 1, 1, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 0xFFFF])
LAP_FLAGS = st.builds(int.__or__, FLAGS, st.sampled_from([0, 0x80, 0x80, 0x8000, 0x8000, 0x8080]))
SMALL = st.integers(0, 8)
NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 9, 0x7FFF, 0x8000, 0xFFFF, ALL_ONES])


def _of(kind: str, *values: st.SearchStrategy[int]) -> st.SearchStrategy[Action]:
    return st.builds(Action, st.just(kind), *values)


DESCRIBE = _of(
    "describe", SMALL, PLACES, LENGTHS, st.builds(lambda f, n: f | n << 16, FLAGS, SMALL)
)
FUSE = _of("fuse", st.sampled_from([*Op, 21, 0xFFFF]), st.integers(0, 6) | NUMBERS,
           st.integers(0, 9) | NUMBERS, st.integers(0, 9))  # fmt: skip
NAMES = (b"README.md\0", b"..\0", b".\0", b"a/b\0", b"\0", b"x", b"vtlb.md\0eager.md\0", b"e" * 300)
ACTIONS = st.one_of(
    FUSE,
    DESCRIBE,
    DESCRIBE,
    _of("request", st.integers(0, 16), st.sampled_from([0, 1, 2, 7, 100]), LENGTHS),
    _of("request", st.integers(0, 16), st.sampled_from([0, 1, 2, 7, 100]), LENGTHS),
    _of("entry", SMALL, PLACES, LENGTHS, st.builds(lambda f, n: f | n << 16, LAP_FLAGS, SMALL)),
    _of("offer", SMALL),
    _of("index", NUMBERS),
    _of("kick", st.integers(0, 4)),
    _of("kick", st.just(0)),
    _of("event", NUMBERS, st.integers(0, 3)),
    _of("poke", st.integers(QUEUES, QUEUES + 0x900), st.integers(0, 255)),
    _of("put", st.integers(0, 0x40) | st.integers(0x1FF0, 0x2050), st.sampled_from([1, 2, 4, 8]),
        NUMBERS | PLACES),
    _of("get", st.integers(0, 0x40) | st.integers(0xFF0, 0x3010), st.sampled_from([1, 2, 4, 8])),
    _of("ring", st.sampled_from([0x20, 0x28, 0x30]), PLACES),
    _of("status", st.sampled_from([0, 1, 3, 11, 15, 64, 128, 255])),
    _of("start", st.booleans(), st.integers(0, 3), st.integers(0, 1)),
    _of("start", st.booleans(), st.integers(0, 3), st.integers(0, 1)),
    _of("config", st.integers(4, 0xFF), st.sampled_from([1, 2, 4]), NUMBERS | PLACES),
    _of("master", st.booleans()),
    _of("frame", st.sampled_from([14, 60, 1514, 1519, 3000, 65_549]),
        st.sampled_from([0, 0, 0, 14, 34, 54]), st.sampled_from([0, 0, 1, 4]),
        st.sampled_from([48, 500, 1440, 65_535])),
    FUSE,
    _of("packet", SMALL, SMALL, st.sampled_from([0, 1, 100]), SMALL),
    _of("time", st.sampled_from([1, 1000, 1_000_000, 1_000_000_000])),
    _of("alone", st.sampled_from([0, 31, 32, 255])),
    _of("halt"),
)  # fmt: skip
SCRIPT = st.lists(ACTIONS, max_size=60)


class Hostile(Driver):
    """A driver with the actions above."""

    def __init__(self, part: str, ns: int = 0) -> None:
        super().__init__(part, ns, **OPTIONS.get(part, dict)())
        self.features, self.size = 1 << 32, 8
        self.steps = 0
        memory = self.memory
        read, write = memory.read, memory.write
        self.accesses = 0

        def counted(call: Callable[..., bytes | None]) -> Callable[..., bytes | None]:
            def access(*given: object) -> bytes | None:
                self.accesses += 1
                assert self.accesses < MOST_READS, "an access that does not end"
                return call(*given)

            return access

        memory.read, memory.write = counted(read), counted(write)  # type: ignore[method-assign,assignment]
        self.sent: list[tuple[bool, Frame]] = []
        if isinstance(self.device, Net):
            self.device.rate = 1_000_000_000
            self.device.cable.notify = self.device.look
            self.device.cable.on_frame.append(lambda is_out, one: self.sent.append((is_out, one)))
        self.rings = [
            SplitRing(memory, QUEUES + 0x1000 * n, self.size) for n in range(len(self.device.sizes))
        ]

    def do(self, action: Action) -> int | None:
        a, b, c, d = action.a, action.b, action.c, action.d
        self.accesses = 0
        queue = self.steps % len(self.device.sizes)
        self.steps += 1
        match action.kind:
            case "describe":
                self.describe(queue, a, b, c, d & 0xFFFF, d >> 16)
            case "request":  # one that begins as a device may want it, in its shape at least
                self.memory.write(BUFFERS, struct.pack("<IIQ", a, 0, b) + bytes(64))
                self.describe(queue, 0, BUFFERS, 16, 1, 1)
                self.describe(queue, 1, BUFFERS + 0x800, min(c, 4096), 1 | (2 if a % 2 else 0), 2)
                self.describe(queue, 2, BUFFERS + 0x700, 1, 2)
                self.offer(queue, 0)
                self.kick(queue)
            case "fuse":  # to whom it means something
                self.fuse(queue, a, b, c, d)
            case "packet":  # to a socket device
                header = Header(3, 2, b, a, c, 1, d, 0, a, b)
                self.memory.write(BUFFERS, LAYOUT.pack(*header))
                self.describe(queue, 0, BUFFERS, LAYOUT.size + c, 0)
                self.offer(queue, 0)
                self.kick(queue)
            case "offer":
                self.offer(queue, a)
            case "entry":  # of a packed ring, or of a split one's table, as it is
                row = struct.pack("<QIHH", b, c, d >> 16, d & 0xFFFF)
                self.memory.write(QUEUES + 0x1000 * queue + 16 * a, row)
            case "index":
                self.rings[queue].available = a & 0xFFFF
                if isinstance(self.rings[queue], SplitRing):
                    at = QUEUES + 0x1000 * queue + DRIVER_AREA + 2
                    self.memory.write(at, (a & 0xFFFF).to_bytes(2, "little"))
            case "event":
                at = QUEUES + 0x1000 * queue + DRIVER_AREA
                if isinstance(self.rings[queue], PackedRing):
                    self.memory.write(at, struct.pack("<HH", a & 0xFFFF, b))
                else:
                    at += 4 + 2 * self.size
                    self.memory.write(at, (a & 0xFFFF).to_bytes(2, "little"))
            case "kick":
                self.put(NOTIFY + 4 * a, a, 2)
            case "poke":
                self.memory.write(a, bytes([b]))
            case "put":
                self.put(a, c & (1 << 8 * b) - 1, b)
            case "get":
                return self.fits(self.get(a, b), b)
            case "ring":
                self.put(0x14, 0, 1)
                self.accept(1 << 32)
                self.put(0x18, 8, 2)
                for usual, offset in ((0x20, 0), (0x28, 0x400), (0x30, 0x800)):
                    self.put(usual, b if usual == a else QUEUES + offset, 8)
                self.put(0x1C, 1, 2)
                self.put(0x14, 15, 1)
            case "status":
                self.put(0x14, a, 1)
            case "start":
                self.set_config(4, 6, 2)
                self.set_config(0x10, BAR)
                hidden = b << 28 | (0 if c else PACKED)
                self.start(self.device.offered & ~hidden, msix=bool(a))
            case "config":
                self.set_config(a, c & (1 << 8 * b) - 1, b)
            case "master":
                self.set_config(4, 6 if a else 2, 2)
            case "frame":
                self.arrive(a, b, c, d)
            case "time":
                self.clock.advance(a)
            case "alone":  # as after so many kicks
                self.device.state.queues[queue].alone = a
            case "halt":
                self.clock.hurry()
        return None

    def fuse(self, queue: int, op: int, node: int, word: int, kind: int) -> None:
        """A request for a file system, with a number and a name or something else behind it."""
        body = struct.pack("<QQII", word, 0 if kind < 5 else node, 512, 0) + bytes(16)
        if kind < len(NAMES):
            body = (struct.pack("<Q", word) * (kind % 3)) + NAMES[kind]
        header = fuse.IN_HEADER.pack(40 + len(body), op, 7, node, 0, 0, 0, 0, 0)
        self.memory.write(BUFFERS, header + body)
        self.describe(queue, 0, BUFFERS, len(header + body), 1, 1)
        self.describe(queue, 1, BUFFERS + 0x400, 0x700, 2)
        self.offer(queue, 0)
        self.kick(queue)

    def arrive(self, size: int, start: int, kind: int, segment: int) -> None:
        """A frame comes for a network card, with something to do if that can be done."""
        if isinstance(self.device, Net):
            protocol = b"\x86\xdd" if kind == TCPV6 else b"\x08\0"
            data = (BROADCAST + bytes(6) + protocol + b"\x45" + bytes(5)).ljust(23, b"\6")
            data = (data + bytes(23) + b"\x50").ljust(size, b"x")[:size]
            frame = Frame(data, start, 16 if start else 0, kind, segment if kind else 0)
            self.device.cable.arrive(frame if frame.is_sound else Frame(data))

    @staticmethod
    def fits(value: int, size: int) -> int:
        assert 0 <= value < 1 << 8 * size
        return value

    def reborn(self) -> "Hostile":
        """A fresh one that loads this one's snapshot, with the same memory."""
        other = Hostile(self.device.name, self.clock.ns)
        other.board.load(json.loads(json.dumps(self.board.save())))
        assert other.messages == [] and other.irqs == [], "loading may not reach outside"
        other.memory.ram[:] = self.memory.ram
        other.messages[:], other.irqs[:] = self.messages, self.irqs
        other.sent[:] = self.sent
        if isinstance(self.device, Net) and isinstance(other.device, Net):
            waiting = list(iter(self.device.cable.take, None))  # a snapshot has them not
            for frame in waiting:
                self.device.cable.arrive(frame)
                other.device.cable.arrive(frame)
        other.rings = self.rings_in(other.memory)
        other.steps = self.steps
        return other


def survives(part: str, **options: object) -> Callable[[], None]:
    """No script makes it raise, nor shows that it was replaced by its snapshot on the way."""

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], **options)  # type: ignore[arg-type]
    @given(SCRIPT, st.integers(0, 60), st.integers(0, 1))
    def run(script: list[Action], cut: int, is_packed: int) -> None:
        one = Hostile(part)
        one.do(Action("start", 1, 0, is_packed))
        for action in script[:cut]:
            one.do(action)
        other = one.reborn()
        with closing(one.board), closing(other.board):
            compared(one, other, script[cut:], is_packed)

    return run


def compared(one: Hostile, other: Hostile, script: list[Action], is_packed: int) -> None:
    """Both go the same way, and serve a driver that is sane afterwards."""
    part = one.device.name
    for action in script:
        assert one.do(action) == other.do(action), action
    assert one.memory.ram == other.memory.ram
    assert (one.irqs, one.messages) == (other.irqs, other.messages)
    assert one.sent == other.sent and all(frame.is_sound for _, frame in one.sent)
    saved, again = one.board.save(), other.board.save()
    assert saved[part]["state"] == again[part]["state"]
    for d in (one, other):
        d.accesses = 0
        d.do(Action("start", 1, 0, is_packed))
        assert d.status == 15


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A hostile driver for each virtio device.")
    parser.add_argument("--scripts", type=int, default=10_000, help="of 30 steps on average")
    count = parser.parse_args().scripts
    for name in PARTS:
        survives(name, max_examples=count, database=None)()
        print(f"{name}: {count} scripts", flush=True)
