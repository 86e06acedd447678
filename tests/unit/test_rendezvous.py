"""The lock that all who execute Python code of a VM have in turn."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import pytest

from understudy.rendezvous import FairLock

LONG_S = 60.0  # never reached


@pytest.mark.parametrize("is_handed_over", [False, True])
def test_who_is_interrupted_while_it_waits_stands_in_nobodys_way(is_handed_over: bool) -> None:
    """Also if it has been given the lock in the same moment."""
    lock, asked, gone = FairLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock.held():
            asked.set()
            while not lock._queue:
                gone.wait(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)
            gone.wait()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_handed_over:
            gone.set()
            holder.join()
        raise InterruptedError

    holder = threading.Thread(target=hold)
    old = signal.signal(signal.SIGUSR1, interrupt)
    try:
        holder.start()
        asked.wait()
        with pytest.raises(InterruptedError):
            lock.acquire()
    finally:
        gone.set()
        signal.signal(signal.SIGUSR1, old)
        holder.join()
    assert can(lock.acquire)


def can(act: Callable[[], None]) -> bool:
    """Whether it comes back."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(LONG_S)
    return not thread.is_alive()
