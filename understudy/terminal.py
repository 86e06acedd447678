"""The user's terminal, lent to a guest.

What: raw mode that is always given back, the escape key, and a reader that never blocks the guest.
Source: termios(3); the escape key is that of telnet, Ctrl-].
Invariants: however `Terminal` is left (return, exception, SIGTERM, SIGHUP), the terminal is as it
was found.
"""

import os
import select
import signal
import sys
import termios
import threading
import tty
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from types import FrameType
from typing import Self

from understudy.visible import visible

ESCAPE = 0x1D  # Ctrl-]
ESCAPE_NAME = "Ctrl-]"
CHUNK, AHEAD = 1 << 12, 256  # bytes that are read at once, and how many times ahead
FULL_S = 0.02  # how often is looked whether somebody has taken them


class Wish(Enum):
    """What the user can ask for with the escape key; the value is the key to press after it."""

    QUIT = b"q"
    HELP = b"h"
    COUNTS = b"c"
    LINE = b"l"


HELP_TEXT = f"""\
{ESCAPE_NAME} q   end the guest now
{ESCAPE_NAME} c   show what was counted so far
{ESCAPE_NAME} l   keep showing it in the last line, or stop that
{ESCAPE_NAME} h   show this help
{ESCAPE_NAME} {ESCAPE_NAME}   send {ESCAPE_NAME} to the guest
"""


class EscapeKey:
    """Parts what the user types into bytes for the guest and wishes for us."""

    def __init__(self) -> None:
        self._armed = False

    def feed(self, typed: bytes) -> Iterator[bytes | Wish]:
        """Yield, in order, runs of bytes for the guest and wishes; keeps a lone escape in mind."""
        plain = bytearray()
        for byte in typed:
            if not self._armed:
                if byte == ESCAPE:
                    self._armed = True
                else:
                    plain.append(byte)
                continue
            self._armed = False
            if byte == ESCAPE:
                plain.append(byte)
                continue
            if plain:
                yield bytes(plain)
                plain.clear()
            try:
                yield Wish(bytes([byte]).lower())
            except ValueError:
                yield Wish.HELP  # not a key we know: say which there are
        if plain:
            yield bytes(plain)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived: unwind, then end with the shell's status for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def is_interactive() -> bool:
    """Whether a person sits before standard input and output, and we are in the foreground."""
    try:
        if not (os.isatty(0) and os.isatty(1)):
            return False
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def ending_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that everything is put back on the way out."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled((signal.SIGTERM, signal.SIGHUP), end):
        yield


@contextmanager
def handled(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Have these signals handled so, but those that are ignored; in the main thread."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextmanager
def window_sizes(tell: Callable[[int, int], None]) -> Iterator[None]:
    """Call `tell(rows, columns)` now, and again whenever the user resizes the window."""

    def look(_number: int = 0, _frame: FrameType | None = None) -> None:
        with suppress(OSError):
            size = os.get_terminal_size(0)
            if size.lines and size.columns:  # some terminals do not know
                tell(size.lines, size.columns)

    look()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGWINCH, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


class RawMode:
    """A terminal that hands over every key as typed, until it is left."""

    def __init__(self, fd: int, mode: Callable[[int, int], object] = tty.setraw) -> None:
        """`mode`: `tty.setcbreak` leaves Ctrl-C, and what is printed, as they are."""
        self._fd, self._mode = fd, mode
        self._before: list[object] = []

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        self._mode(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the terminal back as it was found; harmless when called again."""
        with suppress(termios.error, OSError):  # it may be gone: that is what SIGHUP says
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]


class Input:
    """Reads a file descriptor on a thread of its own; `take` never waits.

    It reads `AHEAD` chunks ahead, and goes on when they have been taken.
    """

    def __init__(self, fd: int, arrived: Callable[[], None] | None = None) -> None:
        self._fd = fd
        self._arrived = arrived
        self._chunks: deque[bytes] = deque()
        self._wake_read, self._wake_write = os.pipe()
        self.ended = False
        self._thread = threading.Thread(target=self._read, name="console-input", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _read(self) -> None:
        while True:
            try:
                is_full = len(self._chunks) >= AHEAD
                files = [self._wake_read] if is_full else [self._fd, self._wake_read]
                ready, _, _ = select.select(files, [], [], FULL_S if is_full else None)
                if self._wake_read in ready:
                    return
                if is_full:
                    continue
                data = os.read(self._fd, CHUNK)
            except (OSError, ValueError):
                data = b""
            if not data:
                self.ended = True
                if self._arrived is not None:
                    self._arrived()
                return
            self._chunks.append(data)
            if self._arrived is not None:
                self._arrived()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: the end of input has been seen, and all is taken."""
        return self.ended and not self._chunks

    def waiting(self) -> bool:
        """Whether `take` would return something."""
        return bool(self._chunks)

    def take(self) -> bytes:
        """Everything that has been typed since the last call."""
        taken = bytearray()
        while self._chunks:
            taken += self._chunks.popleft()
        return bytes(taken)


class Output:
    """Writes the guest's bytes to a file descriptor, whole, in order."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.wrote = False

    def __call__(self, data: bytes) -> None:
        """Write all of `data`; raises BrokenPipeError when nobody reads any more."""
        view = memoryview(data)
        self.wrote = self.wrote or bool(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                error.filename = error.filename or "standard output"  # it is what nobody named
                raise


def note(text: str) -> None:
    """A line from understudy itself, on standard error, that also looks right in raw mode."""
    for line in visible(text).splitlines():
        sys.stderr.write(f"\r[understudy] {line}\r\n")
    sys.stderr.flush()
