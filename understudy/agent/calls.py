"""System calls that the guest's agent is to make, and what came of them.

    request = Request()
    file = request.call(Call.OPEN, request.text("/etc/hosts"), O_RDONLY)
    request.call(Call.READ, file, SCRATCH, 4096)

Source: Linux's system calls for i386 (arch/x86/entry/syscalls/syscall_32.tbl); guests/agent.s for
how a request lies in the agent's memory.

Invariants: a call's argument that is the result of an earlier one is taken by the agent, so a
request needs no answer in between; an answer comes from a guest: its lengths are checked.
"""

import errno
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from understudy.guests.agent_program import (
    REQUEST_BYTES,
    REQUEST_GVA,
    SCRATCH_BYTES,
    SCRATCH_GVA,
)


class Call(IntEnum):
    """Numbers of system calls."""

    EXIT = 1
    FORK = 2
    READ = 3
    WRITE = 4
    OPEN = 5
    CLOSE = 6
    EXECVE = 11
    CHMOD = 15
    MOUNT = 21
    SYNC = 36
    KILL = 37
    MKDIR = 39
    IOCTL = 54
    DUP2 = 63
    SETSID = 66
    SYMLINK = 83
    READLINK = 85
    REBOOT = 88
    FCHMOD = 94
    IOPERM = 101
    WAIT4 = 114
    FCHDIR = 133
    SCHED_SETSCHEDULER = 156
    POLL = 168
    RT_SIGPROCMASK = 175
    GETDENTS64 = 220
    FCNTL64 = 221
    PIPE2 = 331
    MEMFD_CREATE = 356
    STATX = 383
    PIDFD_OPEN = 434


O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_NOCTTY, O_TRUNC = 0, 1, 2, 0x40, 0x80, 0x100, 0x200
O_NONBLOCK, O_LARGEFILE, O_DIRECTORY, O_NOFOLLOW = 0x800, 0x8000, 0x1_0000, 0x2_0000
O_CLOEXEC, O_PATH = 0x8_0000, 0x20_0000
EAGAIN: Final = -errno.EAGAIN

HEADER: Final = struct.Struct("<IIII")
RECORD: Final = struct.Struct("<iI6I")
CALLS_GVA: Final = REQUEST_GVA + HEADER.size
ROOM: Final = REQUEST_BYTES - 0x1_0000  # bytes that one request may carry beside its calls


@dataclass(frozen=True)
class Result:
    """What the call of this number gives."""

    number: int


@dataclass(frozen=True)
class Place:
    """Bytes that lie in the agent's memory; the answer has those that are `kept`."""

    offset: int
    is_kept: bool

    def word(self, index: int = 0) -> "Word":
        """What stands there as the agent comes to it, not where that is."""
        return Word(self, 4 * index)


@dataclass(frozen=True)
class Word:
    """A word in the agent's memory, by its value."""

    place: Place
    offset: int


Argument = int | Result | Place | Word


class Span(NamedTuple):
    """Bytes that the answer is to have: from `gva` on as many as a call gave."""

    gva: int
    length: Result
    most: int


class Shape(NamedTuple):
    """What an answer looks like: all that one must know to find its end."""

    head: int  # bytes
    spans: tuple[tuple[int, int], ...]  # where in the head the length is, and the most it can be

    def total(self, head: bytes | bytearray) -> int:
        """Bytes of the whole answer.  ValueError for one that no agent gives."""
        total = self.head
        for at, most in self.spans:
            length = max(0, int.from_bytes(head[at : at + 4], "little", signed=True))
            if length > most:
                raise ValueError(f"the agent has read {length} bytes, where {most} were asked for")
            total += length
        return total


class Answer:
    """What came of a request."""

    def __init__(self, shape: Shape, base: int, data: bytes) -> None:
        self._base, self._data = base, data
        self.spans: list[bytes] = []
        at = shape.head
        for where, _ in shape.spans:
            length = max(0, int.from_bytes(data[where : where + 4], "little", signed=True))
            self.spans.append(data[at : at + length])
            at += length

    def __getitem__(self, result: Result) -> int:
        """What a call gave; less than 0 is an error's number."""
        return int(RECORD.unpack_from(self._data, RECORD.size * result.number)[0])

    def kept(self, place: Place, size: int) -> bytes:
        """What stands in the agent's memory now."""
        return self._data[self._base + place.offset :][:size]

    def words(self, place: Place, count: int) -> tuple[int, ...]:
        """The same, as numbers of 32 bits with a sign."""
        return struct.unpack(f"<{count}i", self.kept(place, 4 * count))

    def checked(self, result: Result, what: str) -> int:
        """What a call gave.  OSError if that is an error; `what` it was meant for."""
        value = self[result]
        if value < 0:
            raise OSError(-value, os.strerror(-value), what)
        return value


class Request:
    """Calls to be made, one after the other, whatever they give."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, tuple[Argument, ...]]] = []
        self._spans: list[Span] = []
        self._kept, self._more = bytearray(), bytearray()
        self._tables: list[tuple[Place, list[Place]]] = []  # whose words are addresses

    def call(self, number: Call, *arguments: Argument) -> Result:
        """One more."""
        self._calls.append((number, arguments))
        return Result(len(self._calls) - 1)

    def fork(self, child: "list[tuple[Argument, ...]]") -> Result:
        """A child makes these calls, of which the last ends it; the agent goes on behind them."""
        forked = self.call(Call.FORK, len(child))
        for number, *arguments in child:
            assert isinstance(number, Call)
            self.call(number, *arguments)
        return forked

    def keep(self, data: bytes) -> Place:
        """Bytes that calls read or change; the answer has them."""
        place = Place(len(self._kept), is_kept=True)
        self._kept += data + bytes(-len(data) % 4)
        return place

    def words(self, *values: int) -> Place:
        """The same, of numbers of 32 bits."""
        return self.keep(struct.pack(f"<{len(values)}i", *values))

    def data(self, data: bytes | memoryview) -> Place:
        """Bytes that calls only read."""
        place = Place(len(self._more), is_kept=False)
        self._more += data
        self._more += bytes(-len(data) % 4)
        return place

    def text(self, text: str | bytes) -> Place:
        """A string, with the zero that ends it.  ValueError if it has one inside."""
        raw = os.fsencode(text) if isinstance(text, str) else text
        if b"\0" in raw:
            raise ValueError(f"{text!r:.60} has a zero in it: no string of a system call has")
        return self.data(raw + b"\0")

    def table(self, texts: list[bytes]) -> Place:
        """The addresses of strings, as execve takes them."""
        places = [self.text(text) for text in texts]
        self._tables.append((table := self.data(bytes(4 * len(places) + 4)), places))
        return table

    def answer(self, length: Result, most: int, gva: int = SCRATCH_GVA) -> None:
        """The answer is to have as many bytes from `gva` on as this call gives, `most` at most."""
        assert gva + most <= SCRATCH_GVA + SCRATCH_BYTES
        self._spans.append(Span(gva, length, most))

    # --- as bytes ---

    @property
    def _base(self) -> int:
        """Where the data begins, from the first call on."""
        return RECORD.size * len(self._calls) + 8 * len(self._spans)

    @property
    def shape(self) -> Shape:
        """What its answer looks like."""
        spans = tuple((RECORD.size * span.length.number, span.most) for span in self._spans)
        return Shape(self._base + len(self._kept), spans)

    def read(self, data: bytes) -> Answer:
        """The bytes of its answer, which have its shape."""
        return Answer(self.shape, self._base, data)

    def __bytes__(self) -> bytes:
        """As the agent takes it."""
        for table, places in self._tables:
            gvas = struct.pack(f"<{len(places)}I", *map(self._gva, places))
            self._more[table.offset : table.offset + len(gvas)] = gvas
        header = HEADER.pack(len(self._calls), self.shape.head, len(self._spans), 0)
        calls = b"".join(self._record(number, *arguments) for number, arguments in self._calls)
        spans = b"".join(
            struct.pack("<II", span.gva, self._gva(span.length)) for span in self._spans
        )
        blob = b"".join((header, calls, spans, self._kept, self._more))
        if len(blob) > REQUEST_BYTES:
            raise ValueError(f"a request of {len(blob)} bytes, expected {REQUEST_BYTES} at most")
        return len(blob).to_bytes(4, "little") + blob

    def _gva(self, what: Result | Place) -> int:
        if isinstance(what, Result):
            return CALLS_GVA + RECORD.size * what.number
        return CALLS_GVA + self._base + what.offset + (0 if what.is_kept else len(self._kept))

    def _record(self, number: int, *arguments: Argument) -> bytes:
        mask, values = 0, [0] * 6
        for at, argument in enumerate(arguments):
            match argument:
                case int():
                    values[at] = argument & 0xFFFF_FFFF
                case Result():
                    values[at], mask = self._gva(argument), mask | 1 << at
                case Word(place, offset):
                    values[at], mask = self._gva(place) + offset, mask | 1 << at
                case Place():
                    values[at] = self._gva(argument)
        return RECORD.pack(number, mask, *values)
