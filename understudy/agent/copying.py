"""Copies between host and guest, as methods of a session.

Source: ours.
Invariants: what the guest, or the host, refuses is one `LinuxError`; after it the session works.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from understudy.agent import files
from understudy.agent.result import LinuxError
from understudy.agent.steps import Ask

COPY_GUEST_S: Final = 600.0
COPY_WALL_S: Final = 600.0


class Copying:
    """Files into the guest and out of it."""

    @abstractmethod
    def prepared(self, awaited: str, timeout_guest_s: float, timeout_wall_s: float) -> Ask:
        """What asks the agent, which is there and has nothing to do; boots first if need be."""

    def read_file(self, /, path: str, **limits: float) -> bytes:
        """What is in a file of the guest.  `limits`: timeout_guest_s and timeout_wall_s."""
        with self._copying(path, **limits) as ask:
            return b"".join(files.read(ask, path))

    def write_file(
        self, /, path: str, data: bytes | str, *, mode: int = 0o644, **limits: float
    ) -> None:
        """Make a file in the guest, or another of that name."""
        raw = data.encode() if isinstance(data, str) else data
        with self._copying(path, **limits) as ask:
            files.write(ask, path, iter((raw,)), mode)

    def put(self, /, source: str | Path, target: str, **limits: float) -> None:
        """Copy a file or folder to this name in the guest, permissions and links included."""
        with self._copying(target, **limits) as ask:
            files.put(ask, Path(source), target)

    def get(self, /, source: str, target: str | Path, **limits: float) -> None:
        """Copy a file or folder of the guest to this name; a folder must not be there yet."""
        with self._copying(source, **limits) as ask:
            files.get(ask, source, Path(target))

    @contextmanager
    def _copying(
        self,
        path: str,
        *,
        timeout_guest_s: float = COPY_GUEST_S,
        timeout_wall_s: float = COPY_WALL_S,
    ) -> Iterator[Ask]:
        """What asks the agent; an OSError becomes one line."""
        ask = self.prepared(f"the end of copying {path}", timeout_guest_s, timeout_wall_s)
        try:
            yield ask
        except OSError as problem:
            raise LinuxError(f"{problem.filename or path}: {problem.strerror}") from problem
