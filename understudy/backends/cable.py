"""The cable of a network card: what the card sends goes in here, and what comes waits here.

Who has the other end calls `arrive`, from any thread; the card hears of it on its VM's thread, and
takes what waits when its driver has room.

Source: ours.
Invariants: what waits is bounded, in frames and in bytes, and what is beyond is counted as lost;
nobody waits for anybody here; the card is told once of whatever waits.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

from understudy.backends.frame import Frame

MOST_FRAMES: Final = 1024
MOST_BYTES: Final = 4 << 20


class NetworkError(Exception):
    """There can be no such network: one line that says what to do."""


class Cable:
    """One that leads nowhere.  A subclass says where, by `send`."""

    is_outside: ClassVar[bool] = False
    """Whether what comes, and when, depends on more than VMs of this process."""

    def __init__(self) -> None:
        self.notify: Callable[[], None] = lambda: None  # from any thread: something waits
        self.on_frame: list[Callable[[bool, Frame], None]] = []  # whether it goes out, and what
        self.on_close: list[Callable[[], None]] = []
        self.lost = 0  # frames that came, and for which there was no room
        self.is_gone = False  # nobody has the other end any more
        self._waiting: deque[Frame] = deque()
        self._bytes = 0
        self._is_told = False
        self._lock = threading.Lock()

    def send(self, frame: Frame) -> bool:
        """The card sends; False: there is no room now, try again."""
        return True

    def arrive(self, frame: Frame) -> bool:
        """A frame for the card; False: it is lost."""
        with self._lock:
            if not self._has_room():
                self.lost += 1
                return False
            self._waiting.append(frame)
            self._bytes += len(frame.data)
            told, self._is_told = self._is_told, True
        if not told:
            self.notify()
        return True

    def _has_room(self) -> bool:
        return len(self._waiting) < MOST_FRAMES and self._bytes < MOST_BYTES

    def take(self) -> Frame | None:
        """The frame that has waited longest, or None: of the next one the card is told."""
        with self._lock:
            if not self._waiting:
                self._is_told = False
                return None
            frame = self._waiting.popleft()
            self._bytes -= len(frame.data)
            return frame

    def put_back(self, frames: Iterable[Frame]) -> None:
        """These were taken, and are the next ones again."""
        with self._lock:
            for frame in reversed(list(frames)):
                self._waiting.appendleft(frame)
                self._bytes += len(frame.data)

    def passed(self, is_out: bool, frame: Frame) -> None:
        """The card has sent this, or its driver has it."""
        for listener in self.on_frame:
            listener(is_out, frame)

    def inspect(self) -> dict[str, Any]:
        """What waits and what was lost, as plain values."""
        return {"waiting": len(self._waiting), "lost": self.lost}

    def close(self) -> None:
        """The card is gone."""
        self.notify = lambda: None
        for listener in self.on_close:
            listener()
        self.on_frame.clear()
        self.on_close.clear()
