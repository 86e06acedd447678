"""A bell that wakes one thread, and may be rung by anybody at any moment.

`threading.Event` must not be set by a signal's handler while the thread that it interrupts sets it:
it holds a lock inside, which nobody gets twice.  Here a ring is one operation of the interpreter.

Source: ours.  Invariants: no ring is lost between `clear` and `wait`; a wait that hears one has
used it up.
"""

from _thread import allocate_lock
from contextlib import suppress
from threading import TIMEOUT_MAX


class Bell:
    """For one thread that waits at a time."""

    def __init__(self) -> None:
        self._silence = allocate_lock()  # who waits, waits for it; a ring is that it is free
        self._silence.acquire()

    def ring(self) -> None:
        """From any thread, and from a signal's handler."""
        with suppress(RuntimeError):  # it has been rung, and nobody has heard it yet
            self._silence.release()

    def clear(self) -> None:
        """Forget that it was rung."""
        self._silence.acquire(blocking=False)

    def wait(self, seconds: float | None = None) -> bool:
        """Until it is rung, or for so long; whether it was.  For ever if None."""
        if seconds is None:
            return self._silence.acquire()
        return self._silence.acquire(timeout=min(max(seconds, 0.0), TIMEOUT_MAX))
