"""The cable of a network beyond this process, whose frames a thread brings.

Source: ours.
Invariant: what there is no room for waits where it comes from, in the thread; nothing is lost here.
"""

import threading
from typing import ClassVar

from understudy.backends.cable import Cable
from understudy.backends.frame import Frame


class Outside(Cable):
    """A subclass starts the threads, and ends them in `close`."""

    is_outside: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._is_over = False
        self._came = threading.Condition(self._lock)  # the card has taken something

    def take(self) -> Frame | None:
        frame = super().take()
        with self._came:
            self._came.notify()
        return frame

    def arrive_when_there_is_room(self, frame: Frame) -> None:
        """In a thread: a frame for the card, unless all is over before."""
        with self._came:
            while not (self._has_room() or self._is_over):
                self._came.wait()
        self.arrive(frame)
