"""A driver of a virtio socket device for the tests: packets out, packets in.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Socket Device".
"""

import time
from collections.abc import Callable
from pathlib import Path

from tests.unit.devices.virtio.driver import BUFFERS, Driver
from understudy.backends.unix_ports import UnixPorts
from understudy.devices.virtio.vsock import EVENT, RX, TX, Vsock
from understudy.devices.virtio.vsock_packet import HOST_CID, LAYOUT, STREAM, Header, Op, header_of

CID = 3
ROOM = 1 << 16  # that the guest says it has
HELD = BUFFERS + 0x1_0000  # its buffers for packets that come
HELD_BYTES = 0x800
PATIENCE_S = 60.0


class VsockDriver(Driver):
    """One whose device has this path, if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        ports = UnixPorts(path) if path is not None else None
        super().__init__("virtio_vsock", cid=CID, ports=ports)
        assert isinstance(self.device, Vsock)
        self.part = self.device
        self.part.listen(lambda: None)
        self.start(size=8)
        self.alloc, self.taken = ROOM, 0
        self.behind: list[tuple[Header, bytes]] = []  # came, and nobody has asked for it yet

    def give(self, count: int = 4, n: int = RX) -> None:
        """So many empty buffers."""
        for slot in range(count):
            self.describe(n, slot, HELD + HELD_BYTES * (slot + 8 * n), HELD_BYTES, 2)
            self.offer(n, slot)
        self.kick(n)

    def say(
        self, op: int, own: int, port: int, data: bytes = b"", *, flags: int = 0,
        kind: int = STREAM, src: int = CID, dst: int = HOST_CID, size: int | None = None,
    ) -> None:  # fmt: skip
        """A packet from the guest's port `own` to the port of its host's."""
        length = len(data) if size is None else size
        header = Header(src, dst, own, port, length, kind, op, flags, self.alloc, self.taken)
        assert self.request(TX, LAYOUT.pack(*header) + data, 0) == b""

    def heard(self) -> list[tuple[Header, bytes]]:
        """What came since the last time; its buffers are given back."""
        found = []
        for slot, written in self.finished(RX):
            packet = self.memory.read(HELD + HELD_BYTES * slot, written)
            found.append((header_of(packet), packet[LAYOUT.size :]))
            self.describe(RX, slot, HELD + HELD_BYTES * slot, HELD_BYTES, 2)
            self.offer(RX, slot)
        self.kick(RX)
        return found

    def wait(self, done: Callable[[], bool]) -> None:
        """Let the device look at its sockets until it is so."""
        ends = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < ends, "it does not come"
            self.part.look()
            time.sleep(0.001)

    def next(self, op: Op) -> tuple[Header, bytes]:
        """The next packet of this kind; others before it are passed over."""
        found: list[tuple[Header, bytes]] = []

        def came() -> bool:
            self.behind += self.heard()
            while self.behind and not found:
                if (one := self.behind.pop(0))[0].op == op:
                    found.append(one)
            return bool(found)

        self.wait(came)
        return found[0]

    def events(self) -> list[bytes]:
        """What the event queue has told."""
        at = HELD + HELD_BYTES * 8 * EVENT
        return [
            self.memory.read(at + HELD_BYTES * slot, size) for slot, size in self.finished(EVENT)
        ]

    def close(self) -> None:
        """The board is gone, and its sockets with it."""
        self.board.close()
