"""What a program says while it runs, and when: the lines S, E CHECKSUM and X STATUS.

Invariant: time is the host's alone, taken when the newline of a marker arrives.
"""

from dataclasses import dataclass, field


class Failed(Exception):
    """A program or a guest did not do what was asked; the message says what came instead."""


@dataclass(frozen=True)
class Sample:
    """One run of one row."""

    seconds: float
    checksum: str


@dataclass
class Markers:
    """Collects the lines of one run as they arrive."""

    ready: float | None = None
    started: float | None = None
    ended: float | None = None
    checksum: str = ""
    status: int | None = None
    other: list[str] = field(default_factory=list)
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes that arrived at `now`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace").strip(), now)

    def _line(self, line: str, now: float) -> None:
        match line.split():
            case ["R"]:
                self.ready = now
            case ["S"]:
                self.started = now
            case ["E", checksum]:
                self.ended, self.checksum = now, checksum
            case ["X", status] if status.isdigit():
                self.status = int(status)
            case _:
                self.other.append(line)

    def sample(self) -> Sample:
        """The finished run; `Failed` if it was not a good one."""
        if self.status != 0:
            raise Failed(f"ended with status {self.status}{self._heard()}")
        if self.started is None or self.ended is None:
            raise Failed(f"printed no S or no E line{self._heard()}")
        return Sample(self.ended - self.started, self.checksum)

    def _heard(self) -> str:
        return f" (it said: {' / '.join(self.other[-3:])})" if self.other else ""
