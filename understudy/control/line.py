"""A VM's console, for all who watch it through a socket, and for the one of them who types.

Source: ours; poll(2), eventfd(2).
Invariants: the VM waits for nobody: what a watcher has not read when his share of memory is full is
lost, and he is told; what is typed is taken as fast as the guest reads; one types, any number read.
"""

import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

WATCHED_KEPT: Final = 1 << 18  # bytes of output for each watcher
UNREAD: Final = 1 << 12  # bytes that the guest has not read when no more is taken
CHUNK: Final = 1 << 12
LOOK_MS: Final = 20  # how often a guest that does not read is looked at


class Line:
    """One console.  All but `Watcher.carry` is called on the VM's thread."""

    def __init__(self, type_: Callable[[bytes], None], unread: Callable[[], int]) -> None:
        """`type_`: give this to the guest.  `unread`: how much it has not read."""
        self.type_, self.unread = type_, unread
        self.watchers: list[Watcher] = []
        self.is_over = False

    def heard(self, data: bytes) -> None:
        """The guest has printed this."""
        for watcher in list(self.watchers):
            watcher.hear(data)

    def attach(
        self, first: dict[str, Any], shown: bytes, post: Callable[[Callable[[], None]], None],
        *, wants_to_type: bool,
    ) -> "Watcher":  # fmt: skip
        """One more; `first` answers his request, `shown` is what he sees first.

        `post`: have something done on the VM's thread.
        """
        types = wants_to_type and not any(one.types for one in self.watchers)
        watcher = Watcher(self, first | {"types": types}, post, types=types)
        self.watchers.append(watcher)
        watcher.hear(shown)
        if self.is_over:
            watcher.end()
        return watcher

    def close(self) -> None:
        """Nothing more comes; who has not read all of it may do so."""
        self.is_over = True
        for watcher in list(self.watchers):
            watcher.end()


class Watcher:
    """One connection: a `Stream` of the console's bytes, both ways."""

    def __init__(
        self, line: Line, first: dict[str, Any], post: Callable[[Callable[[], None]], None],
        *, types: bool,
    ) -> None:  # fmt: skip
        self.line, self.first, self.post, self.types = line, first, post, types
        self._lock = threading.Lock()
        self._waiting, self._lost = bytearray(), 0
        self._is_over = False
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._typed = 0  # bytes on their way to the VM's thread

    # --- on the VM's thread ---

    def hear(self, data: bytes) -> None:
        """Send this, if there is room for it."""
        with self._lock:
            room = 0 if self._lost else WATCHED_KEPT - len(self._waiting)
            self._waiting += data[:room]
            self._lost += max(0, len(data) - room)
            self._rouse()

    def end(self) -> None:
        """Nothing more comes."""
        with self._lock:
            self._is_over = True
            self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _give(self, typed: bytes) -> None:
        try:
            if not self.line.is_over:
                self.line.type_(typed)
        finally:
            self._typed = 0

    def _leave(self) -> None:
        with suppress(ValueError):
            self.line.watchers.remove(self)

    # --- on the connection's ---

    def carry(self, connection: socket.socket) -> None:
        """Until the VM ends and all of it is read, or the other end is gone."""
        assert self._wake is not None
        connection.setblocking(False)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        listens = True
        while True:
            ready = listens and not self._typed and self.line.unread() < UNREAD
            waiting, is_over = self._peek()
            if is_over and not waiting:
                return
            wanted = select.POLLIN * ready | select.POLLOUT * bool(waiting)
            poll.register(connection, wanted)
            found = dict(poll.poll(LOOK_MS if listens and not ready else None))
            events = found.get(connection.fileno(), 0)
            if events & (select.POLLERR | select.POLLNVAL | select.POLLHUP):
                return
            if self._wake in found:
                os.eventfd_read(self._wake)
            if events & select.POLLOUT:
                self._sent(connection.send(waiting))
            if events & select.POLLIN:
                listens = self._hear_typed(connection.recv(CHUNK))

    def _hear_typed(self, typed: bytes) -> bool:
        """Whether more may come."""
        if typed and self.types:
            self._typed = len(typed)
            self.post(lambda: self._give(typed))
            self._rouse()
        return bool(typed)

    def _peek(self) -> tuple[bytes, bool]:
        with self._lock:
            return bytes(self._waiting[:CHUNK]), self._is_over

    def _sent(self, count: int) -> None:
        with self._lock:
            del self._waiting[:count]
            if self._lost and not self._waiting:
                self._waiting += (
                    b"\r\n[understudy: %d bytes were not read in time]\r\n" % self._lost
                )
                self._lost = 0

    def give_up(self) -> None:
        """It is not carried any more."""
        with self._lock:
            if self._wake is not None:
                os.close(self._wake)
                self._wake = None
        with suppress(RuntimeError):  # the host is no more, and the line neither
            self.post(self._leave)
