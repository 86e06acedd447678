"""Which sockets can be read or written: one thread waits for all of them.

Source: epoll(7), "EPOLLONESHOT".
Invariants: the thread only waits and tells; each telling is told once, and `watch` asks for the
next; nobody is told after `close`.
"""

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
HUNG = select.EPOLLHUP | select.EPOLLERR  # nobody has the other end any more


class Readiness:
    """The sockets of one owner."""

    def __init__(self) -> None:
        self.notify: Callable[[], None] = lambda: None  # from the thread: something is ready
        self._epoll = select.epoll()
        self._wake, self._woken = socket.socketpair()
        self._epoll.register(self._woken.fileno(), READ)
        self._ready: dict[int, int] = {}
        self._watched: set[int] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._wait, name="vsock", daemon=True)
        self._thread.start()

    def watch(self, end: socket.socket, events: int) -> None:
        """Tell, once, when one of these can be done, or when the other end hangs up."""
        fd = end.fileno()
        with self._lock:
            if fd in self._watched:
                self._epoll.modify(fd, events | select.EPOLLONESHOT)
            else:
                self._watched.add(fd)
                self._epoll.register(fd, events | select.EPOLLONESHOT)

    def forget(self, end: socket.socket) -> None:
        """Before it is closed."""
        fd = end.fileno()
        with self._lock:
            if fd in self._watched:
                self._watched.discard(fd)
                self._epoll.unregister(fd)
            self._ready.pop(fd, None)

    def take(self) -> dict[int, int]:
        """What can be done, by descriptor, since the last time."""
        with self._lock:
            ready, self._ready = self._ready, {}
        return ready

    def _wait(self) -> None:
        while True:
            found = self._epoll.poll()
            with self._lock:
                if any(fd == self._woken.fileno() for fd, _ in found):
                    return
                for fd, events in found:
                    if fd in self._watched:
                        self._ready[fd] = self._ready.get(fd, 0) | events
            self.notify()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self.notify = lambda: None
        with suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        self._epoll.close()
        self._wake.close()
        self._woken.close()
