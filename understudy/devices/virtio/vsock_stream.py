"""One connection of a virtio socket device: a Unix socket here, a port of the guest there.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Socket Device", "Buffer Space Management" and
"Stream Sockets".

Invariants: nothing waits here; what the guest has sent and the socket has no room for is at most
`BUFFER` bytes, and a guest that sends more is cut off; nothing is read from the socket that the
guest has no room for.
"""

import socket
from enum import Enum
from typing import Final

from understudy.devices.virtio.vsock_packet import BOTH, RECEIVE, SEND, Header, Op

BUFFER: Final = 1 << 18  # ours: bytes on their way out of the guest
MOST: Final = 1 << 16  # ours: bytes of one packet
MASK: Final = 0xFFFF_FFFF

Packet = tuple[Op, int, bytes]
"""Operation, flags, data."""


class Phase(Enum):
    """Of a connection."""

    ASKED = "the guest has not answered yet"
    OPEN = "bytes flow"
    OVER = "refused, or at its end"


class Stream:
    """A connection, by its ports."""

    def __init__(self, own: int, guest: int, end: socket.socket, phase: Phase) -> None:
        self.own, self.guest, self.end, self.phase = own, guest, end, phase
        self.greeting = bytearray()  # for the socket, once the guest has answered
        self.is_readable = self.is_over = self.is_hung = False  # of the socket
        self.out = bytearray()  # from the guest, for the socket
        self.is_shut_by_guest = 0  # RECEIVE, SEND
        self.told_shut = 0  # the same, as the guest has been told
        self.told_first = False  # REQUEST or RESPONSE
        self.wants_update = False  # to be told that there is room again
        self.wants_request = self.has_asked = False  # whether the guest has room again
        self.is_shut = 0  # of the socket, as the guest has wanted it
        self.is_broken = False  # the guest is to be told so
        self.received = self.forwarded = self.told = 0  # bytes, modulo 2^32
        self.sent = self.room = self.taken = 0  # the same of the other way: room and taken are its

    # --- from the guest ---

    def hear(self, header: Header) -> None:
        """What every packet says of the guest's buffer."""
        self.room, self.taken = header.buf_alloc, header.fwd_cnt
        self.wants_request = self.has_asked = False

    def take(self, data: bytes) -> None:
        """The guest sends."""
        free = BUFFER - (self.received - self.forwarded & MASK)
        if self.phase is not Phase.OPEN or len(data) > free or self.is_shut_by_guest & SEND:
            self.is_broken = True
            return
        self.received = self.received + len(data) & MASK
        self.out += data
        self.flush()

    def flush(self) -> None:
        """As much of what the guest has sent as the socket takes now."""
        if self.phase is not Phase.OPEN:
            return
        try:
            while self.greeting:
                del self.greeting[: self.end.send(self.greeting)]
            while self.out:
                count = self.end.send(memoryview(self.out)[:MOST])
                del self.out[:count]
                self.forwarded = self.forwarded + count & MASK
        except BlockingIOError:
            pass
        except OSError:
            self.is_broken = True
        if (self.forwarded - self.told & MASK) >= BUFFER // 2:
            self.wants_update = True
        if not self.out and self.is_shut_by_guest & SEND:
            self._shut(SEND, socket.SHUT_WR)

    def shut(self, flags: int) -> None:
        """The guest will receive or send no more."""
        self.is_shut_by_guest |= flags & BOTH
        if self.is_shut_by_guest & RECEIVE:
            self._shut(RECEIVE, socket.SHUT_RD)
        self.flush()

    def _shut(self, way: int, how: int) -> None:
        if self.is_shut & way:
            return
        self.is_shut |= way
        try:
            self.end.shutdown(how)
        except OSError:
            self.is_hung = True

    @property
    def is_done(self) -> bool:
        """The guest has closed it, and all that it sent has gone."""
        return self.is_shut_by_guest == BOTH and not self.out

    # --- to the guest ---

    def next(self, room: int) -> Packet | None:
        """What the guest is to get next, in so many bytes; None: nothing now."""
        if self.is_broken or self.is_done:
            self.phase = Phase.OVER
            return Op.RST, 0, b""
        if not self.told_first:
            self.told_first = True
            return Op.RESPONSE if self.phase is Phase.OPEN else Op.REQUEST, 0, b""
        if self.phase is not Phase.OPEN:
            return None
        if self.wants_update:
            self.wants_update = False
            return Op.CREDIT_UPDATE, 0, b""
        if data := self._read(room):
            self.sent = self.sent + len(data) & MASK
            return Op.RW, 0, data
        if self.is_broken:
            return self.next(room)
        shut = (SEND if self.is_over else 0) | (BOTH if self.is_hung and self.is_over else 0)
        if shut & ~self.told_shut:
            self.told_shut |= shut
            return Op.SHUTDOWN, self.told_shut, b""
        if self.wants_request:
            self.wants_request, self.has_asked = False, True
            return Op.CREDIT_REQUEST, 0, b""
        return None

    def _read(self, room: int) -> bytes:
        """From the socket, what the guest has room for."""
        if not self.is_readable or self.is_over or self.is_shut_by_guest & RECEIVE:
            return b""
        free = self.room - (self.sent - self.taken & MASK)
        if free <= 0:
            self.wants_request = not self.has_asked
            return b""
        try:
            data = self.end.recv(min(room, free, MOST))
        except BlockingIOError:
            self.is_readable = False
            return b""
        except OSError:
            self.is_broken = True
            return b""
        self.is_over = not data
        return data
