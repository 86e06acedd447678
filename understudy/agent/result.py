"""What came of a command in a guest.

Source: ours.
"""

from dataclasses import dataclass
from typing import Self


class LinuxError(RuntimeError):
    """A guest did not do what it was asked to.  `detail` holds its decoded state, if that helps."""

    def __init__(self, line: str, detail: str = "") -> None:
        super().__init__(line)
        self.detail = detail


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it ended.

    `raw` is standard output and standard error together, in the order in which they were written
    (with several processors: nearly so); `output` is that, read as UTF-8; `out` and `error` are the
    two apart.  `status` is as a shell says it: 128 + n after signal n, which is in `signal`, too.
    """

    output: str
    status: int
    raw: bytes
    out: bytes = b""
    error: bytes = b""
    signal: int | None = None

    def check(self) -> Self:
        """Itself if the command succeeded; raises LinuxError if not."""
        if self.status != 0:
            raise LinuxError(f"the command ended with status {self.status}", self.output)
        return self
