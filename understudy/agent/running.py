"""A command under way in a guest: listened to, fed, signalled, and ended.

Source: ours; Linux's pipe(7), pty(7), pidfd_open(2).

Standard output and standard error are two pipes (with a terminal: one pseudo-terminal).  The agent
has a real-time priority, so on one processor it has read what a program wrote before that writes
more: the two come in the order in which they were written.  After the first byte it waits for
`GATHER_MS`, but not if there is something on standard error: long outputs come in long runs.

Invariants: a command has ended when its first process has, by the kernel's word and no program's;
what it had written until then has been taken; what programs in the background write later goes
nowhere, and they live.
"""

import errno
import struct
from collections.abc import Callable, Iterator
from enum import Enum
from types import TracebackType
from typing import Final, NamedTuple, Self

from understudy.agent.calls import O_CLOEXEC, O_RDWR, Argument, Call, Request
from understudy.agent.calls import Result as Of
from understudy.agent.command import (
    AGENT_PORT,
    AT_ONCE,
    CLOSED,
    F_SETFL,
    PIECE,
    SIG_SETMASK,
    SIGKILL,
    TIOCSWINSZ,
    Job,
    Terminal,
    close,
)
from understudy.agent.result import LinuxError
from understudy.agent.steps import Ask, Steps, carried_out
from understudy.guests.agent_program import SCRATCH_GVA

ERROR_AT_ONCE: Final = 1 << 16  # as many as a pipe holds
ERROR_GVA: Final = SCRATCH_GVA + AT_ONCE
GATHER_MS: Final = 8
LOOK_UP_MS: Final = 20

POLLIN, POLLOUT, POLLHUP = 1, 4, 0x10
POLLFD: Final = struct.Struct("<Ihh")
CHANNEL, PROCESS, ERROR, OUT, INPUT = range(5)  # what is waited for
END_OF_FILE: Final = b"\x04"  # typed at a terminal


class Stream(Enum):
    """Where a command has written something."""

    OUT = "out"
    ERROR = "error"


class Chunk(NamedTuple):
    """Bytes that a command has written."""

    stream: Stream
    data: bytes


class Command:
    """One command.  Iterate over it for what it writes; when that ends, `status` is known.

    >>> with vm.start("make") as command:  # doctest: +SKIP
    ...     for stream, data in command:
    ...         show(stream, data)
    >>> command.status  # doctest: +SKIP
    0

    ask: runs the guest until the agent has answered, within the command's limits.  at_last: the
    same, with a little time to clear up.  over: called once; with True if nothing is left of it.
    """

    def __init__(
        self,
        job: Job,
        ask: Ask,
        at_last: Ask,
        over: Callable[[bool], None],
        *,
        has_terminal: bool = False,
    ) -> None:
        self.job = job
        self.status: int | None = None
        self.signal_number: int | None = None
        self._ask, self._at_last, self._over = ask, at_last, over
        self._has_terminal = has_terminal
        self._input = bytearray()
        self._input_ends = self._is_left = False
        self.looks_up = False
        """Whether `listen` comes back now and then, for more input."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or has been ended, or its guest does not answer any more."""
        return self.job.process == CLOSED or self._is_left

    @property
    def takes_input(self) -> bool:
        """Whether more may be sent: it has standard input, which has not ended."""
        return self.job.input != CLOSED and not self._input_ends

    @property
    def unsent(self) -> int:
        """Bytes of standard input that it has not been given yet."""
        return len(self._input)

    # --- to the command ---

    def send(self, data: bytes | str) -> None:
        """Standard input, when it is listened to next.  ValueError if it has none, or no more."""
        if not self.takes_input:
            raise ValueError("the command has no standard input, or has it no more")
        self._input += data.encode() if isinstance(data, str) else data

    def close_input(self) -> None:
        """Nothing more will be sent."""
        if self._has_terminal and not self._input_ends:
            self._input += END_OF_FILE
        self._input_ends = True

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group, now.  LinuxError if it is over."""
        if self.is_over:
            raise LinuxError("the command has ended: nobody takes a signal")
        request = Request()
        request.call(Call.KILL, -self.job.pid, number)
        self._ask(request)

    def resize(self, rows: int, columns: int) -> None:
        """The window of its terminal has this size now.  ValueError if it has no terminal."""
        if not self._has_terminal:
            raise ValueError("the command has no terminal")
        if self.job.out != CLOSED:
            request = Request()
            window = request.keep(bytes(Terminal(rows, columns)))
            request.call(Call.IOCTL, self.job.out, TIOCSWINSZ, window)
            self._ask(request)

    # --- from the command ---

    def __iter__(self) -> Iterator[Chunk]:
        while not self.is_over:
            yield from self.listen()

    def listen(self) -> list[Chunk]:
        """Run the guest until the command has written something, has read, or has ended."""
        try:
            return carried_out(self.listening(), self._ask)
        except BaseException:
            self.end()
            raise

    def listening(self) -> Steps[list[Chunk]]:
        """The steps of that."""
        job, request = self.job, Request()
        wrote = None
        if job.input != CLOSED and self._input:
            piece = bytes(self._input[:PIECE])
            wrote = request.call(Call.WRITE, job.input, request.data(piece), len(piece))
        elif job.input != CLOSED and self._input_ends and not self._has_terminal:
            request.call(Call.CLOSE, job.input)
            job.input = CLOSED
        files = [0, job.process, job.error, job.out, job.input]
        events = [POLLIN] * 4 + [POLLOUT if wrote is not None else 0]
        polled = request.keep(
            b"".join(POLLFD.pack(file, event, 0) for file, event in zip(files, events, strict=True))
        )
        may_get_more = self.looks_up and self.takes_input
        request.call(Call.POLL, polled, len(files), LOOK_UP_MS if may_get_more else -1)
        request.call(Call.POLL, polled, OUT, GATHER_MS)
        reads = self._reads(request)
        answer = yield request
        if wrote is not None and (answer[wrote] > 0 or answer[wrote] == -errno.EPIPE):
            del self._input[: answer[wrote] if answer[wrote] > 0 else None]
        chunks = self._chunks(answer.spans)
        revents = [
            one[2] for one in POLLFD.iter_unpack(answer.kept(polled, POLLFD.size * len(files)))
        ]
        if revents[PROCESS]:
            return chunks + (yield from self._finish())
        ended = [
            file
            for file, read in zip((job.out, job.error), reads, strict=True)
            if answer[read] in (0, -errno.EIO)
        ]
        yield from self._close(ended)
        return chunks

    def _reads(self, request: Request) -> tuple[Of, Of]:
        """Take what there is."""
        out = request.call(Call.READ, self.job.out, SCRATCH_GVA, AT_ONCE)
        error = request.call(Call.READ, self.job.error, ERROR_GVA, ERROR_AT_ONCE)
        request.answer(out, AT_ONCE)
        request.answer(error, ERROR_AT_ONCE, ERROR_GVA)
        return out, error

    @staticmethod
    def _chunks(spans: list[bytes]) -> list[Chunk]:
        return [Chunk(one, data) for one, data in zip(Stream, spans, strict=True) if data]

    def _close(self, files: list[int]) -> Steps[None]:
        job = self.job
        for name in ("out", "error", "input"):
            if getattr(job, name) in files:
                setattr(job, name, CLOSED)
        yield from close(files)

    # --- the end ---

    def _finish(self) -> Steps[list[Chunk]]:
        """Its first process has ended: how, and what else it has written."""
        job, request = self.job, Request()
        status = request.words(0)
        request.call(Call.WAIT4, job.pid, status, 0, 0)
        self._reads(request)
        polled = request.keep(POLLFD.pack(job.out, 0, 0) + POLLFD.pack(job.error, 0, 0))
        request.call(Call.POLL, polled, 2, 0)
        answer = yield request
        (code,) = answer.words(status, 1)
        if code & 0x7F:
            self.signal_number, self.status = code & 0x7F, 128 + (code & 0x7F)
        else:
            self.status = code >> 8 & 0xFF
        request = Request()
        for file, _, revents in POLLFD.iter_unpack(answer.kept(polled, 2 * POLLFD.size)):
            if file != CLOSED and not revents & POLLHUP and not self._has_terminal:
                _sink(request, file)
        for file in sorted(job.files):
            request.call(Call.CLOSE, file)
        self._is_over()
        yield request
        return self._chunks(answer.spans)

    def _is_over(self) -> None:
        job = self.job
        job.process = job.out = job.error = job.input = CLOSED
        self._over(True)

    def end(self) -> None:
        """End it with its whole process group, if it has not ended; nothing of it is left then."""
        if self.is_over:
            return
        request = Request()
        request.call(Call.KILL, -self.job.pid, SIGKILL)
        request.call(Call.KILL, self.job.pid, SIGKILL)  # it may not lead its group yet
        try:
            self._at_last(request)
            carried_out(self._finish(), self._at_last)
        except LinuxError:  # the guest is gone, or does not answer: the next one clears up
            self._is_left = True
            self._over(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def _sink(request: Request, file: int) -> None:
    """A process, of nobody's, that reads a pipe to its end."""
    request.call(Call.FCNTL64, file, F_SETFL, 0)  # it may wait
    null = request.call(Call.OPEN, request.text("/dev/null"), O_RDWR | O_CLOEXEC)
    grandchild: list[tuple[Argument, ...]] = [
        (Call.SETSID,),
        (Call.IOPERM, AGENT_PORT, 8, 0),
        (Call.DUP2, file, 0),
        (Call.DUP2, null, 1),
        (Call.DUP2, null, 2),
        (Call.RT_SIGPROCMASK, SIG_SETMASK, request.data(bytes(8)), 0, 8),
        (Call.EXECVE, request.text("/bin/cat"), request.table([b"cat"]), request.table([])),
        (Call.EXIT, 127),
    ]
    child = request.fork([(Call.FORK, len(grandchild)), *grandchild, (Call.EXIT, 0)])
    request.call(Call.WAIT4, child, 0, 0, 0)
    request.call(Call.CLOSE, null)


def clear_up(ask: Ask, job: Job) -> None:
    """End a command that nobody listens to any more."""
    Command(job, ask, ask, lambda is_gone: None).end()
