"""A command in a guest is started: its process, its pipes or its terminal.

Source: ours; Linux's pipe(7), pty(7), pidfd_open(2), execve(2).
Invariant: a command that cannot be started leaves nothing open in the agent.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from understudy.agent.calls import (
    O_CLOEXEC,
    O_DIRECTORY,
    O_NOCTTY,
    O_NONBLOCK,
    O_PATH,
    O_RDWR,
    Answer,
    Argument,
    Call,
    Request,
    Word,
)
from understudy.agent.calls import Result as Of
from understudy.agent.result import LinuxError
from understudy.agent.steps import Steps
from understudy.state import U32

SHELL: Final = "/bin/sh"
LONGEST_ARGUMENT: Final = (1 << 17) - 1  # of execve, MAX_ARG_STRLEN
AT_ONCE: Final = 1 << 20  # bytes of output, which its pipe holds
PIECE: Final = 1 << 16  # bytes of input
AGENT_PORT: Final = 0x5A0

SIGKILL: Final = 9
F_SETFL, F_SETPIPE_SZ = 4, 1031
SIG_SETMASK: Final = 2
TIOCSCTTY, TIOCSWINSZ, TIOCSPTLCK, TIOCGPTPEER = 0x540E, 0x5414, 0x4004_5431, 0x5441
CLOSED: Final = 0xFFFF_FFFF


@dataclass
class Job:
    """What the agent holds of a command: its process, and file descriptors."""

    pid: U32
    process: U32 = CLOSED  # a pidfd
    out: U32 = CLOSED
    error: U32 = CLOSED
    input: U32 = CLOSED

    @property
    def files(self) -> set[int]:
        """What is open."""
        return {self.process, self.out, self.error, self.input} - {CLOSED}


@dataclass(frozen=True)
class Terminal:
    """A pseudo-terminal's window."""

    rows: int = 24
    columns: int = 80

    def __bytes__(self) -> bytes:
        return struct.pack("<4H", self.rows, self.columns, 0, 0)


@dataclass(frozen=True)
class Wanted:
    """What is to be run, and in what."""

    command: bytes
    environment: list[bytes]
    directory: str | None = None
    terminal: Terminal | None = None
    has_input: bool = False


def with_changes(environment: list[bytes], changes: Mapping[str, str]) -> list[bytes]:
    """An environment with these variables in it."""
    own = {one.partition(b"=")[0]: one for one in environment}
    for name, value in changes.items():
        if not name or "=" in name:
            raise ValueError(f"{name!r} is no name of a variable")
        own[name.encode()] = f"{name}={value}".encode("utf-8", "surrogateescape")
    return list(own.values())


def start(wanted: Wanted) -> Steps[Job]:
    """Start it.  LinuxError if the guest cannot."""
    opened: list[int] = []
    try:
        directory = script = None
        if wanted.directory is not None:
            directory = yield from _directory(wanted.directory)
            opened.append(directory)
        if len(wanted.command) > LONGEST_ARGUMENT:
            script = yield from _script(wanted.command)
            opened.append(script)
        return (yield from _started(wanted, directory, script))
    except OSError as problem:
        raise LinuxError(f"the guest cannot start a command: {problem}") from None
    finally:
        yield from close(opened)


def _directory(path: str) -> Steps[int]:
    request = Request()
    found = request.call(Call.OPEN, request.text(path), O_PATH | O_DIRECTORY | O_CLOEXEC)
    return (yield request).checked(found, path)


def _script(command: bytes) -> Steps[int]:
    """A file in memory with the command, which is too long for an argument."""
    request = Request()
    made = request.call(Call.MEMFD_CREATE, request.text("command"), 0)
    file = (yield request).checked(made, "memfd_create")
    for at in range(0, len(command), PIECE):
        request, piece = Request(), command[at : at + PIECE]
        wrote = request.call(Call.WRITE, file, request.data(piece), len(piece))
        (yield request).checked(wrote, "the command")
    return file


def _started(wanted: Wanted, directory: int | None, script: int | None) -> Steps[Job]:
    request = Request()
    streams: list[Argument]  # of the child: 0, 1 and 2
    ours: dict[str, Of | Word]
    theirs: list[Argument]
    needed: list[Of]
    if wanted.terminal is not None:
        master = request.call(Call.OPEN, request.text("/dev/ptmx"), O_RDWR | O_NOCTTY | O_CLOEXEC)
        request.call(Call.IOCTL, master, TIOCSPTLCK, request.words(0))
        flags = O_RDWR | O_NOCTTY | O_CLOEXEC
        peer = request.call(Call.IOCTL, master, TIOCGPTPEER, flags)
        size = request.keep(bytes(wanted.terminal))
        request.call(Call.IOCTL, master, TIOCSWINSZ, size)
        streams, theirs, needed = [peer] * 3, [peer], [master, peer]
        ours = {"out": master, "input": master}
    else:
        out, error = request.words(-1, -1), request.words(-1, -1)
        needed = [request.call(Call.PIPE2, pipe, O_CLOEXEC) for pipe in (out, error)]
        ours = {"out": out.word(), "error": error.word()}
        theirs = [out.word(1), error.word(1)]
        first: Argument
        if wanted.has_input:
            given = request.words(-1, -1)
            needed.append(request.call(Call.PIPE2, given, O_CLOEXEC))
            first, ours["input"] = given.word(), given.word(1)
        else:
            null = request.call(Call.OPEN, request.text("/dev/null"), O_RDWR | O_CLOEXEC)
            needed.append(null)
            first = null
        theirs.append(first)
        streams = [first, *theirs[:2]]
    forked = request.fork(_child(request, wanted, streams, directory, script))
    process = request.call(Call.PIDFD_OPEN, forked, 0)
    for file in theirs:
        request.call(Call.CLOSE, file)
    for file in ours.values():
        request.call(Call.FCNTL64, file, F_SETFL, O_NONBLOCK)
    if wanted.terminal is None:
        request.call(Call.FCNTL64, ours["out"], F_SETPIPE_SZ, AT_ONCE)
    answer = yield request
    files = {name: _value(answer, file) for name, file in ours.items()}
    problems = [answer[one] for one in (*needed, forked, process) if answer[one] < 0]
    if problems:
        if answer[forked] > 0:
            yield from kill(answer[forked])
        yield from close([file for file in (*files.values(), answer[process]) if file >= 0])
        raise OSError(-problems[0], os.strerror(-problems[0]))
    return Job(answer[forked], answer[process], **files)


def _child(
    request: Request,
    wanted: Wanted,
    streams: list[Argument],
    directory: int | None,
    script: int | None,
) -> list[tuple[Argument, ...]]:
    """The calls that turn a copy of the agent into the command's first process."""
    calls: list[tuple[Argument, ...]] = [(Call.SETSID,), (Call.IOPERM, AGENT_PORT, 8, 0)]
    calls += [(Call.DUP2, file, number) for number, file in enumerate(streams)]
    if wanted.terminal is not None:
        calls.append((Call.IOCTL, 0, TIOCSCTTY, 0))
    if directory is not None:
        calls.append((Call.FCHDIR, directory))
    said = [b"-c", wanted.command] if script is None else [f"/proc/self/fd/{script}".encode()]
    calls += [
        (Call.RT_SIGPROCMASK, SIG_SETMASK, request.data(bytes(8)), 0, 8),
        (
            Call.EXECVE,
            request.text(SHELL),
            request.table([b"sh", *said]),
            request.table(wanted.environment),
        ),
        (Call.EXIT, 127),
    ]
    return calls


def _value(answer: Answer, file: Of | Word) -> int:
    if isinstance(file, Of):
        return answer[file]
    return answer.words(file.place, 2)[file.offset // 4]


def close(files: "list[int] | set[int]") -> Steps[None]:
    """The agent is to close these."""
    if files:
        request = Request()
        for file in sorted(files):
            request.call(Call.CLOSE, file)
        yield request


def kill(pid: int) -> Steps[None]:
    """End a process, and its group, and wait for it."""
    request = Request()
    request.call(Call.KILL, -pid, SIGKILL)
    request.call(Call.KILL, pid, SIGKILL)  # it may not lead its group yet
    request.call(Call.WAIT4, pid, 0, 0, 0)
    yield request
