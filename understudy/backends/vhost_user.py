"""The front end of vhost-user: a queue of requests that another program answers.

Source: the Vhost-user Protocol, as QEMU's documentation has it, "Message types" and "Front-end
message types"; Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues".

The program does not see the guest: the memory that it maps is one of ours, in which there are
rings of two descriptors, and room for one request and its answer (docs/decisions/0107-*).

Not modeled: more than one request under way, a reconnection, the program's own requests.

Invariants: whatever the program does or does not do ends as a `VhostError`, within the patience
that one had with it, and after one there is no second wait: all that follows fails at once.
"""

import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

# --- The specification ---


class Ask(IntEnum):
    """VHOST_USER_*: the messages that are used."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18


HEADER: Final = struct.Struct("<III")  # request, flags, bytes behind
VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3  # of the flags
FLAGS: Final = 0b1111
U64: Final = struct.Struct("<Q")
VRING_STATE: Final = struct.Struct("<II")  # index, number
VRING_ADDR: Final = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
MEM_TABLE: Final = struct.Struct("<II QQQQ")  # regions, 0; gpa, bytes, our address, offset
PROTOCOL_FEATURES: Final = 1 << 30  # VHOST_USER_F_*
VERSION_1: Final = 1 << 32  # VIRTIO_F_*
REPLY_ACK: Final = 1 << 3  # VHOST_USER_PROTOCOL_F_*

DESCRIPTOR: Final = struct.Struct("<QIHH")
NEXT, WRITE = 1, 2
USED: Final = struct.Struct("<II")

# --- Ours ---

ENTRIES: Final = 2  # of a ring: what is read, and what is written
AVAILABLE, USED_AREA, RING_BYTES = 64, 128, 4096  # where these are in a ring's page
OURS: Final = 1 << 40  # added to an address, "our" one: no program may need to know it
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
EMPTY: Final = (1 << 16) - 1
GONE: Final = "it has ended"


class VhostError(Exception):
    """The program is of no use any more: a few words why."""


class VhostUser:
    """A connection to the program, and the memory that it has."""

    def __init__(
        self, connection: socket.socket, *, queues: int, longest: tuple[int, int], patience_s: float
    ) -> None:
        """`longest`: bytes of a request and of an answer.  VhostError if they cannot agree.

        The connection is its own from now on.
        """
        self.problem = ""
        self._socket, self._patience_s = connection, patience_s
        self._longest = longest
        self._request = queues * RING_BYTES
        self._answer = self._request + _pages(longest[0])
        size = self._answer + _pages(longest[1])
        self._fds = [os.memfd_create("vhost-user", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        os.ftruncate(self._fds[0], size)
        # Whoever could make it smaller could have us read where there is nothing.
        fcntl.fcntl(self._fds[0], fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._fds[0], size)
        self._bytes = memoryview(self._map)
        # A number of 16 bits is stored in one go by this view, by `struct` byte by byte.
        self._words = self._bytes.cast("H")
        self._done = [0] * queues  # requests, modulo 2^16
        self._kicks = [self._event() for _ in range(queues)]
        self._calls = [self._event() for _ in range(queues)]
        try:
            self._agree(size)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise VhostError(_words(error, patience_s)) from None
            raise

    def close(self) -> None:
        """Let go of the program, which ends by that, and of the memory."""
        self._socket.close()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
        if fds:
            self._words.release()
            self._bytes.release()
            self._map.close()
        self.problem = self.problem or "closed"

    # --- requests ---

    def ask(self, queue: int, request: bytes, room: int) -> bytes:
        """The answer to a request, of so many bytes at most."""
        if self.problem:
            raise VhostError(self.problem)
        try:
            return self._ask(queue, request, room)
        except (VhostError, OSError) as error:
            self.problem = str(error) if isinstance(error, VhostError) else (error.strerror or GONE)
            self._socket.close()  # what it still writes, nobody reads
            raise VhostError(self.problem) from None

    def _ask(self, queue: int, request: bytes, room: int) -> bytes:
        if not 0 < len(request) <= self._longest[0] or not 0 <= room <= self._longest[1]:
            raise ValueError(f"a request of {len(request)} bytes with {room} for its answer")
        at, done = queue * RING_BYTES, self._done[queue]
        self._bytes[self._request : self._request + len(request)] = request
        DESCRIPTOR.pack_into(
            self._map, at, self._request, len(request), NEXT if room else 0, 1 if room else 0
        )
        DESCRIPTOR.pack_into(self._map, at + DESCRIPTOR.size, self._answer, room, WRITE, 0)
        self._words[(at + AVAILABLE) // 2 + 2 + done % ENTRIES] = 0  # the chain's head
        # x86 keeps the order of stores: the index is seen last.
        self._words[(at + AVAILABLE) // 2 + 1] = done + 1 & EMPTY
        os.eventfd_write(self._kicks[queue], 1)
        self._wait(queue, done)
        head, size = USED.unpack_from(self._map, at + USED_AREA + 4 + USED.size * (done % ENTRIES))
        if head != 0 or size > room:
            raise VhostError(f"it gave back buffer {head} with {size} bytes, of {room}")
        self._done[queue] = done + 1 & EMPTY
        return bytes(self._bytes[self._answer : self._answer + size])

    def _wait(self, queue: int, done: int) -> None:
        """Until the program has given the request back."""
        index = (queue * RING_BYTES + USED_AREA) // 2 + 1
        call, ends = self._calls[queue], time.monotonic() + self._patience_s
        poll = select.poll()
        poll.register(call, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while True:
            ready = dict(poll.poll(max(0.0, ends - time.monotonic()) * 1000))
            if call in ready:
                os.eventfd_read(call)
            used = self._words[index]
            if used == done + 1 & EMPTY:
                return
            if used != done:
                raise VhostError(f"it has used {used} buffers, and {done + 1 & EMPTY} were there")
            if self._socket.fileno() in ready:
                raise VhostError(GONE)  # or it says something that nobody has asked
            if time.monotonic() >= ends:
                raise VhostError(_late(self._patience_s))

    # --- messages ---

    def _agree(self, size: int) -> None:
        """Features, memory, rings; the program hears kicks from then on."""
        self._socket.settimeout(self._patience_s)
        offered = self._number(Ask.GET_FEATURES)
        wanted = VERSION_1 | PROTOCOL_FEATURES
        if offered & wanted != wanted:
            raise VhostError(f"it has the features {offered:#x} and not all of {wanted:#x}")
        self._tell(Ask.SET_OWNER)
        protocol = self._number(Ask.GET_PROTOCOL_FEATURES) & REPLY_ACK
        self._tell(Ask.SET_PROTOCOL_FEATURES, U64.pack(protocol))
        ack = bool(protocol)
        self._tell(Ask.SET_FEATURES, U64.pack(wanted), ack=ack)
        table = MEM_TABLE.pack(1, 0, 0, size, OURS, 0)
        self._tell(Ask.SET_MEM_TABLE, table, self._fds[:1], ack=ack)
        for queue, (kick, call) in enumerate(zip(self._kicks, self._calls, strict=True)):
            at = OURS + queue * RING_BYTES
            addresses = VRING_ADDR.pack(queue, 0, at, at + USED_AREA, at + AVAILABLE, 0)
            self._tell(Ask.SET_VRING_NUM, VRING_STATE.pack(queue, ENTRIES), ack=ack)
            self._tell(Ask.SET_VRING_BASE, VRING_STATE.pack(queue, 0), ack=ack)
            self._tell(Ask.SET_VRING_ADDR, addresses, ack=ack)
            self._tell(Ask.SET_VRING_CALL, U64.pack(queue), [call], ack=ack)
            self._tell(Ask.SET_VRING_KICK, U64.pack(queue), [kick], ack=ack)
            self._tell(Ask.SET_VRING_ENABLE, VRING_STATE.pack(queue, 1), ack=ack)

    def _tell(
        self, kind: Ask, body: bytes = b"", fds: Sequence[int] = (), *, ack: bool = False
    ) -> None:
        flags = VERSION | (NEED_REPLY if ack else 0)
        message = HEADER.pack(kind, flags, len(body)) + body
        if socket.send_fds(self._socket, [message], fds) != len(message):
            raise VhostError("it does not read what it is told")
        if ack and (refused := self._heard(kind)):
            raise VhostError(f"it refused {kind.name} ({refused:#x})")

    def _number(self, kind: Ask) -> int:
        self._tell(kind)
        return self._heard(kind)

    def _heard(self, kind: Ask) -> int:
        """The number that it answers to a message."""
        said, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        if (said, flags & FLAGS & ~NEED_REPLY, size) != (kind, VERSION | REPLY, U64.size):
            raise VhostError(f"its answer to {kind.name} is one of {size} bytes to {said}")
        return int(U64.unpack(self._exactly(size))[0])

    def _exactly(self, count: int) -> bytes:
        data, ends = b"", time.monotonic() + self._patience_s
        while len(data) < count:
            self._socket.settimeout(max(ends - time.monotonic(), 0.001))
            part = self._socket.recv(count - len(data))
            if not part:
                raise VhostError(GONE)
            data += part
        return data

    def _event(self) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fds.append(fd)
        return fd


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _late(patience_s: float) -> str:
    return f"it did not answer within {patience_s:g} s"


def _words(error: OSError, patience_s: float) -> str:
    if isinstance(error, TimeoutError):
        return _late(patience_s)
    return GONE if isinstance(error, ConnectionError) else error.strerror or str(error)
