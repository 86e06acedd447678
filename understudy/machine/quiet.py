"""Who is at work on something, and what is to be done when nobody is.

A forgotten object ends whenever Python finds that out: in any thread, and in the middle of whatever
that thread is doing.  What it leaves behind waits here until nobody is at work.

Source: none.  Invariant: what waits is done by whoever was at work, at the latest when he has done.
"""

import threading
from collections import deque
from collections.abc import Callable


class Quiet:
    """`with quiet:` one thread at a time is at work; it may say so again inside."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        self._lock.release()
        if self._waiting:
            self._catch_up()

    def later(self, action: Callable[[], None]) -> None:
        """Do this as soon as nobody is at work; now, if nobody is."""
        self._waiting.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                if self._depth:  # in the middle of something, in this thread
                    return
                action = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            finally:
                self._lock.release()
            action()
