"""A hostile guest at the ends of real sockets: packets of all kinds, sizes and credits.

Source: ours.  Invariants: nothing raises; what is kept is bounded; the program here gets nothing
but what the guest has sent to it, in order; a sane driver is served afterwards.
"""

import socket
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.devices.virtio.driver import BUFFERS
from tests.unit.devices.virtio.sockets import CID, VsockDriver
from understudy.devices.virtio.pci import NEEDS_RESET
from understudy.devices.virtio.vsock import FIRST_PORT, MOST_RESETS, MOST_STREAMS, RX, TX
from understudy.devices.virtio.vsock_packet import LAYOUT, Header, Op
from understudy.devices.virtio.vsock_stream import BUFFER

NUMBER = st.sampled_from([0, 1, 3, 10, 4096, 1 << 18, 1 << 31, (1 << 32) - 1])
OWN = st.sampled_from([99, 98, 0, FIRST_PORT, FIRST_PORT + 1, FIRST_PORT + 2])
PACKET = st.tuples(
    st.just("packet"), st.sampled_from([*Op, Op.RW, Op.RW, 8, 0xFFFF]), OWN,
    st.sampled_from([80, 81, 0, (1 << 32) - 1]), st.integers(0, 3000), st.integers(0, 7), NUMBER,
    NUMBER,
)  # fmt: skip
OTHER = st.sampled_from(["connect", "say", "read", "shut", "close", "look", "give", "reset"])
STEPS = st.lists(st.one_of(PACKET, PACKET, st.tuples(OTHER, st.integers(0, 3))), max_size=60)


class Game:
    """A guest, and programs of this computer."""

    def __init__(self, path: Path) -> None:
        self.d = VsockDriver(path)
        self.ends: list[socket.socket] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}_99")
        self.listener.listen(64)
        self.listener.setblocking(False)

    def packet(
        self, op: int, own: int, port: int, size: int, flags: int, alloc: int, taken: int
    ) -> None:
        header = Header(CID, 2, port, own, size, 1, op, flags, alloc, taken)
        self.d.memory.write(BUFFERS, LAYOUT.pack(*header) + b"g" * size)
        self.d.describe(TX, 0, BUFFERS, LAYOUT.size + size, 0)
        self.d.offer(TX, 0)
        self.d.kick(TX)

    def other(self, what: str, which: int) -> None:
        d, end = self.d, self.ends[which % len(self.ends)] if self.ends else None
        with suppress(OSError):
            match what:
                case "connect":
                    ours, theirs = socket.socketpair()
                    ours.setblocking(False)
                    self.ends.append(ours)
                    d.part.open(80 + which, theirs)
                case "say" if end:
                    end.send(b"h" * 5000)
                case "read" if end:
                    assert end.recv(1 << 16).strip(b"g") == b""
                case "shut" if end:
                    end.shutdown((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)[which % 3])
                case "close" if end:
                    self.ends.remove(end)
                    end.close()
                case "look":
                    with suppress(BlockingIOError):
                        while True:
                            self.ends.append(self.listener.accept()[0])
                            self.ends[-1].setblocking(False)
                    d.part.look()
                case "give":
                    ring = d.rings[RX]  # what it cannot hold, no driver gives
                    d.give(min(which, ring.size - (ring.available - ring.used & 0xFFFF)))
                case "reset":
                    d.put(0x14, 0, 1)
                    d.start(size=8)

    def check(self) -> None:
        part = self.d.part
        assert len(part.streams) <= MOST_STREAMS and len(part.state.resets) <= MOST_RESETS
        assert all(len(stream.out) <= BUFFER for stream in part.streams.values())
        assert not self.d.status & NEEDS_RESET
        self.d.heard()

    def close(self) -> None:
        for end in (self.listener, *self.ends):
            end.close()
        self.d.close()


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_a_hostile_guest_harms_nobody(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as base, closing(Game(Path(base) / "v")) as game:
        for what, *more in steps:
            if what == "packet":
                game.packet(*more)  # type: ignore[arg-type]
            else:
                game.other(str(what), *more)  # type: ignore[arg-type]
            game.check()
        game.other("reset", 0)
        game.d.give()
        game.d.say(Op.REQUEST, 1024, 97)
        assert game.d.next(Op.RST)[0].dst_port == 1024
