"""Ctrl-C while a guest runs: between two instructions, never inside a device.

What: Python raises KeyboardInterrupt wherever it happens to be; in the middle of an exit that
leaves a device that has seen an access and a guest that makes it again.  While a guest runs, Ctrl-C
therefore asks the run to end, and is raised when it has.

Source: Python's `signal`: handlers run in the main thread, between two bytecodes.
Invariants: nothing is changed in other threads, nor where somebody else handles SIGINT (asyncio, a
notebook's server); a second Ctrl-C is raised at once, in case the first is not answered.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `ask`, and KeyboardInterrupt is raised at the end of the block."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        ask()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
