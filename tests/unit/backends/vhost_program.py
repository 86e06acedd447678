"""The other end of vhost-user for the tests: a thread with rings of its own, obedient or not.

Source: the Vhost-user Protocol; VIRTIO 1.2, "Split Virtqueues".  The numbers are written down here
again, so that a wrong one of ours is not agreed on.
"""

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

FEATURES: Final = 1 << 32 | 1 << 30
MEMORY, KICK, CALL, ENABLE = 5, 12, 13, 18
ASKED: Final = (1, 15)  # whoever sends these waits for a number

Answer = Callable[[bytes, int], bytes]


@dataclass
class Ring:
    """What was said about one."""

    size: int = 0
    base: int = 0
    descriptors: int = 0
    used: int = 0
    available: int = 0
    kick: int = -1
    call: int = -1
    is_enabled: bool = False


@dataclass
class Program:
    """Answers what comes on a socket pair, of which `ours` is for who is tested."""

    answer: Answer = lambda request, room: request[:room]
    numbers: dict[int, int] = field(default_factory=dict)
    """What is said to a message instead of what is right."""
    message: Callable[[int, bytes], bytes] = lambda kind, reply: reply
    """The last word about a reply, as bytes."""
    give: Callable[["Program", Ring, bytes, int], None] | None = None
    """How a request is given back, instead of what is right."""
    ends_at: int = 0
    """A message at which it ends."""

    def __post_init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.rings: dict[int, Ring] = {}
        self.heard: list[tuple[int, int]] = []  # messages, and whether they wanted a reply
        self.fds: list[int] = []
        self.memory: mmap.mmap | None = None
        self.gpa = self.address = self.bytes = 0
        self.quit = os.eventfd(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End, if it has not."""
        os.eventfd_write(self.quit, 1)
        self.thread.join()
        for fd in (*self.fds, self.quit):
            os.close(fd)
        if self.memory is not None:
            self.memory.close()
        self.ours.close()

    # --- the thread ---

    def _run(self) -> None:
        # Who is tested may hang up at any time.
        with self.theirs, suppress(ConnectionError):
            while True:
                kicks = {ring.kick: ring for ring in self.rings.values() if ring.is_enabled}
                watched: list[int | socket.socket] = [self.theirs, self.quit, *kicks]
                ready, _, _ = select.select(watched, [], [])
                if self.quit in ready or (self.theirs in ready and not self._message()):
                    return
                for fd, ring in kicks.items():
                    if fd in ready:
                        os.eventfd_read(fd)
                        self._serve(ring)

    def _message(self) -> bool:
        head, fds, _, _ = socket.recv_fds(self.theirs, 12, 8)
        self.fds += fds
        if not head:
            return False
        kind, flags, size = struct.unpack("<III", head)
        body = self.theirs.recv(size) if size else b""
        assert flags & 3 == 1 and not flags & 4 and len(body) == size
        self.heard.append((kind, flags >> 3 & 1))
        if kind == self.ends_at:
            return False
        self._learn(kind, body, fds)
        if kind in ASKED or flags & 8:
            usual = {1: FEATURES, 15: 1 << 3}.get(kind, 0)
            reply = struct.pack("<IIIQ", kind, 5, 8, self.numbers.get(kind, usual))
            self.theirs.sendall(self.message(kind, reply))
        return True

    def _learn(self, kind: int, body: bytes, fds: list[int]) -> None:
        if kind == MEMORY:
            count, _, self.gpa, self.bytes, self.address, offset = struct.unpack("<IIQQQQ", body)
            assert (count, offset, len(fds)) == (1, 0, 1)
            self.memory = mmap.mmap(fds[0], self.bytes)
        elif kind in (8, 10, ENABLE):
            index, number = struct.unpack("<II", body)
            ring = self.rings.setdefault(index, Ring())
            if kind == 8:
                ring.size = number
            elif kind == 10:
                ring.base = number
            else:
                ring.is_enabled = bool(number)
        elif kind == 9:
            index, _, descriptors, used, available, _ = struct.unpack("<IIQQQQ", body)
            ring = self.rings[index]
            places = (descriptors, used, available)
            assert [place % unit for place, unit in zip(places, (16, 4, 2), strict=True)] == [0] * 3
            ring.descriptors, ring.used, ring.available = (p - self.address for p in places)
        elif kind in (KICK, CALL):
            (index,) = struct.unpack("<Q", body)
            assert len(fds) == 1
            setattr(self.rings[index], "kick" if kind == KICK else "call", fds[0])

    # --- requests ---

    def _serve(self, ring: Ring) -> None:
        assert self.memory is not None
        index = struct.unpack_from("<H", self.memory, ring.available + 2)[0]
        while ring.base != index:
            at = ring.available + 4 + 2 * (ring.base % ring.size)
            head = struct.unpack_from("<H", self.memory, at)[0]
            request, room, place, flags, number = b"", 0, 0, 1, head
            while flags & 1:  # NEXT
                gpa, size, flags, following = struct.unpack_from(
                    "<QIHH", self.memory, ring.descriptors + 16 * number
                )
                at = gpa - self.gpa
                assert 0 <= at <= at + size <= self.bytes and number < ring.size
                if flags & 2:  # WRITE
                    room, place = size, at
                else:
                    request += self.memory[at : at + size]
                number = following
            ring.base = ring.base + 1 & 0xFFFF
            answer = self.answer(request, room)
            self.memory[place : place + len(answer)] = answer
            if self.give is not None:
                self.give(self, ring, answer, head)
            else:
                self.give_back(ring, head, len(answer))

    def give_back(self, ring: Ring, head: int, size: int, count: int = 1) -> None:
        """A buffer, and the index goes on by so many."""
        assert self.memory is not None
        at = ring.used + 4 + 8 * ((ring.base - 1) % ring.size)
        struct.pack_into("<II", self.memory, at, head, size)
        struct.pack_into("<H", self.memory, ring.used + 2, ring.base - 1 + count & 0xFFFF)
        os.eventfd_write(ring.call, 1)
