"""A bell wakes who waits, and a signal's handler may ring it in the middle of a ring."""

import signal
import sys
from threading import Thread
from types import FrameType

from understudy.bell import Bell

LONG_S = 60.0


def test_a_ring_is_heard_once_whether_it_comes_before_the_wait_or_after() -> None:
    bell = Bell()
    assert not bell.wait(0) and not bell.wait(-1)
    bell.ring()
    bell.ring()
    assert bell.wait(None) and not bell.wait(0)
    thread = Thread(target=bell.ring)
    thread.start()
    assert bell.wait(LONG_S)
    thread.join()
    bell.ring()
    bell.clear()
    bell.clear()
    assert not bell.wait(0)
    bell.ring()
    assert bell.wait(1e300)  # more than a lock can be told


def test_a_handler_rings_in_the_middle_of_a_ring() -> None:
    """At each line of it: a handler runs between any two of them."""
    bell, lines = Bell(), list[int]()

    def handler(signum: int, frame: FrameType | None) -> None:
        bell.ring()

    def trace(frame: FrameType, event: str, arg: object) -> object:
        if frame.f_code is Bell.ring.__code__ and event == "line" and not sys.is_finalizing():
            lines.append(frame.f_lineno)
            sys.settrace(None)
            signal.raise_signal(signal.SIGUSR1)
            sys.settrace(trace)  # type: ignore[arg-type]
        return trace

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        sys.settrace(trace)  # type: ignore[arg-type]
        bell.ring()
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGUSR1, before)
    assert lines
    assert bell.wait(LONG_S) and not bell.wait(0)
