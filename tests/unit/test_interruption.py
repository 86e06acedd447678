"""Ctrl-C is asked for, and raised at the end."""

import signal
import threading

import pytest

from understudy.interruption import interruptible


def test_it_is_raised_when_the_block_is_done() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: steps.append("asked")):
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")
    assert steps == ["asked", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_is_raised_at_once() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: steps.append("asked")):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("not reached")
    assert steps == ["asked"]


def test_nothing_changes_in_other_threads_or_for_other_handlers() -> None:
    found: list[object] = []

    def look() -> None:
        with interruptible(lambda: None):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    mine = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    try:
        look()
        assert found[1] is mine
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
