"""The host's side of the agent: commands in, output and status out, over a serial port.

A state machine without I/O: give `feed` what the guest sent, send what `request` and `Send`
events say.  The guest's side is rootfs/agent, a shell script.

Lines to the guest (text is base64, at most `LINE` characters of it in a line):

    part NONCE text     a piece of a long command; the next line waits for "more"
    run NONCE text      the last piece: run the command, standard input empty; one that still
                        runs, which the host has given up, is killed with its process group

Frames from the guest, each RS (0x1E), a word, a space, a word, newline:

    understudy-agent 1  the agent is there
    NONCE more          a piece has arrived
    NONCE begin         output follows, as it comes, stdout and stderr in their order
    NONCE status        the command has ended with this exit status

Invariants: output may be any bytes: a frame is known by its nonce, which the command does not
know; what lies between frames of other commands is dropped, so a command that was given up
does not disturb the next; the same commands give the same bytes in every run.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field

MARK = b"\x1e"
HELLO = MARK + b"understudy-agent 1\n"
LINE = 1024
LONGEST_FRAME = 64


@dataclass(frozen=True)
class Ready:
    """The guest's agent has started."""


@dataclass(frozen=True)
class Send:
    """Bytes that must go to the guest now."""

    data: bytes


@dataclass(frozen=True)
class Output:
    """Bytes that the command wrote, stdout and stderr merged."""

    data: bytes


@dataclass(frozen=True)
class Exited:
    """The command has ended: its exit status, 128 + n if signal n ended it."""

    status: int


Event = Ready | Send | Output | Exited


@dataclass
class Agent:
    """One agent, one command at a time."""

    ready: bool = False
    nonce: bytes = b""  # of the command under way; empty when there is none
    running: bool = False  # its output has begun
    lines: list[bytes] = field(default_factory=list)  # not sent yet
    buffer: bytes = b""  # received, not understood yet
    count: int = 0

    @property
    def busy(self) -> bool:
        """Whether a command is under way."""
        return bool(self.nonce)

    def request(self, command: str | bytes) -> bytes:
        """Start a command; returns the bytes to send now (none while the agent is not there)."""
        if self.busy:
            raise RuntimeError("the agent is busy: wait for Exited, or give the command up")
        self.count += 1
        seed = b"understudy agent %d" % self.count
        self.nonce = hashlib.sha256(seed).hexdigest()[:32].encode()
        self.running = False
        text = command.encode("utf-8", "surrogateescape") if isinstance(command, str) else command
        code = base64.b64encode(text)
        pieces = [code[at : at + LINE] for at in range(0, len(code), LINE)] or [b""]
        verbs = [b"part"] * (len(pieces) - 1) + [b"run"]
        self.lines = [
            b"%s %s %s\n" % (verb, self.nonce, piece)
            for verb, piece in zip(verbs, pieces, strict=True)
        ]
        return self.lines.pop(0) if self.ready else b""

    def give_up(self) -> None:
        """Forget the command under way (it goes on in the guest; its output is dropped)."""
        self.nonce, self.running, self.lines = b"", False, []

    def feed(self, data: bytes) -> list[Event]:
        """Take in what the guest sent."""
        self.buffer += data
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def _step(self, events: list[Event]) -> bool:
        """Understand the next frame; False when more bytes are needed first."""
        frame = self._frame()
        if frame is None:
            keep = self._unfinished()
            self._pass_on(self.buffer[: len(self.buffer) - keep], events)
            self.buffer = self.buffer[len(self.buffer) - keep :]
            return False
        self._pass_on(self.buffer[: frame.start()], events)
        self.buffer = self.buffer[frame.end() :]
        word = frame.group(1)
        if frame.group() == HELLO:
            self._hello(events)
        elif word == b"more":
            if self.lines:
                events.append(Send(self.lines.pop(0)))
        elif word == b"begin":
            self.running = True
        else:
            self.give_up()
            events.append(Exited(int(word)))
        return True

    def _hello(self, events: list[Event]) -> None:
        self.ready = True
        events.append(Ready())
        if self.lines:
            events.append(Send(self.lines.pop(0)))

    def _frame(self) -> re.Match[bytes] | None:
        """The first frame in the buffer that matters now."""
        words = rb"\d{1,3}" if self.running else rb"more|begin|\d{1,3}"
        ours = MARK + self.nonce + rb" (" + words + rb")\n" if self.nonce else b"(?!)()"
        pattern = ours if self.ready else re.escape(HELLO) + b"()"
        return re.search(pattern, self.buffer)

    def _unfinished(self) -> int:
        """How many bytes at the end of the buffer may be the beginning of a frame."""
        at = self.buffer.rfind(MARK, max(0, len(self.buffer) - LONGEST_FRAME))
        if at < 0:
            return 0
        tail = self.buffer[at:]
        if not self.ready:
            return len(tail) if HELLO.startswith(tail) else 0
        known = MARK + self.nonce + b" "
        begins = known.startswith(tail[: len(known)]) and b"\n" not in tail
        return len(tail) if self.nonce and begins else 0

    def _pass_on(self, data: bytes, events: list[Event]) -> None:
        if data and self.running:
            events.append(Output(data))
