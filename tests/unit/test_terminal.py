"""The terminal is always given back, the escape key parts wishes from bytes, input never blocks."""

import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from understudy.terminal import (
    AHEAD,
    CHUNK,
    EscapeKey,
    Input,
    Output,
    Terminated,
    Wish,
    ending_signals,
    window_sizes,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ([b"ls\r"], [b"ls\r"]),
        ([b"ab\x1dqcd"], [b"ab", Wish.QUIT, b"cd"]),
        ([b"ab\x1d", b"H"], [b"ab", Wish.HELP]),
        ([b"\x1d\x1d"], [b"\x1d"]),
        ([b"a\x1d\x1db"], [b"a\x1db"]),
        ([b"\x1dc\x1dz"], [Wish.COUNTS, Wish.HELP]),
        ([b"\x1dl"], [Wish.LINE]),
        ([b"\x1d"], []),
        ([b"\xff\x00\x03"], [b"\xff\x00\x03"]),
    ],
)
def test_escape_key(typed: list[bytes], parts: list[bytes | Wish]) -> None:
    key = EscapeKey()
    assert [part for chunk in typed for part in key.feed(chunk)] == parts


def test_input_arrives_in_order_and_ends() -> None:
    read, write = os.pipe()
    arrivals: list[None] = []
    with Input(read, lambda: arrivals.append(None)) as keyboard:
        assert keyboard.take() == b""
        os.write(write, b"one")
        os.write(write, b"two")
        taken = b""
        deadline = time.monotonic() + 10
        while taken != b"onetwo" and time.monotonic() < deadline:
            taken += keyboard.take()
        assert taken == b"onetwo"
        os.close(write)
        while not keyboard.ended and time.monotonic() < deadline:
            time.sleep(0.001)
        assert keyboard.ended
        assert not keyboard.waiting()
    assert arrivals
    os.close(read)


def test_input_is_read_ahead_so_far_and_goes_on_when_it_was_taken() -> None:
    read, write = os.pipe()
    with Input(read) as keyboard:
        data = os.urandom(CHUNK)
        left = 2 * AHEAD
        os.set_blocking(write, False)
        deadline = time.monotonic() + 60

        def feed() -> None:
            nonlocal left
            with suppress(BlockingIOError):
                while left:
                    os.write(write, data)
                    left -= 1

        while len(keyboard._chunks) < AHEAD and time.monotonic() < deadline:
            feed()
        time.sleep(0.2)
        feed()
        assert len(keyboard._chunks) == AHEAD and left > 0, "and no more"
        taken = 0
        while taken < 2 * AHEAD * CHUNK and time.monotonic() < deadline:
            feed()
            taken += len(keyboard.take())
        assert taken == 2 * AHEAD * CHUNK
    os.close(read)
    os.close(write)


def test_input_can_be_left_while_nobody_types() -> None:
    read, write = os.pipe()
    with Input(read):
        pass
    os.close(read)
    os.close(write)


def test_output_writes_everything_to_a_slow_reader() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    data = os.urandom(300_000)
    child = os.fork()
    if child == 0:
        os.close(write)
        with os.fdopen(read, "rb") as file:
            os._exit(0 if file.read() == data else 1)
    os.close(read)
    screen = Output(write)
    screen(data)
    os.close(write)
    assert screen.wrote
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_become_exceptions_and_are_put_back(
    number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    # Under nohup SIGHUP is ignored, and stays so: that is not the case that is tested.
    found = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, found))
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as caught, ending_signals():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_the_size_of_the_window_is_told_now_and_when_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = iter([(80, 24), (120, 50), (0, 0)])
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd: os.terminal_size(next(sizes)))
    before, told = signal.getsignal(signal.SIGWINCH), []
    with window_sizes(lambda rows, columns: told.append((rows, columns))):
        signal.raise_signal(signal.SIGWINCH)
        signal.raise_signal(signal.SIGWINCH)
    assert told == [(24, 80), (50, 120)]
    assert signal.getsignal(signal.SIGWINCH) is before


_CHILD = textwrap.dedent(
    """
    import os, signal, sys, time
    from understudy.terminal import RawMode, ending_signals
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with ending_signals(), RawMode(0):
        os.write(1, b"raw")
        how = sys.argv[1]
        if how == "raise":
            raise RuntimeError("boom")
        if how == "exit":
            sys.exit(3)
        if how != "return":
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(10)
    """
)


@pytest.mark.parametrize(
    ("how", "status"), [("return", 0), ("raise", 1), ("exit", 3), ("SIGTERM", 143), ("SIGHUP", 129)]
)
def test_the_terminal_is_always_given_back(how: str, status: int) -> None:
    """However the program ends, the terminal's settings are what they were."""
    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, how],
        stdin=inner,
        stdout=inner,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert os.read(outer, 3) == b"raw"
    assert child.wait(20) == status
    assert termios.tcgetattr(inner) == before
    os.close(outer)
    os.close(inner)
