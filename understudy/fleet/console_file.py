"""What a VM prints, in a file that does not grow for ever.

Source: ours.  Invariants: a file that cannot be written disturbs no VM; of what was printed the
last `CONSOLE_FILE_KEPT` bytes at least are there, in NAME.old and NAME.
"""

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

CONSOLE_FILE_KEPT: Final = 1 << 20


class ConsoleFile:
    """One VM's."""

    def __init__(self, path: Path) -> None:
        self.path, self._size = path, 0
        self._file: BinaryIO | None = None
        with suppress(OSError):
            self._file = path.open("wb", buffering=0)

    def heard(self, data: bytes) -> None:
        """Keep this."""
        if self._file is None:
            return
        try:
            if self._size >= CONSOLE_FILE_KEPT:
                self._file.close()
                self.path.replace(self.path.with_name(f"{self.path.name}.old"))
                self._file, self._size = self.path.open("wb", buffering=0), 0
            self._file.write(data)
            self._size += len(data)
        except OSError:  # a full disk: the console is still to be watched
            self.close()

    def close(self) -> None:
        """Nothing more comes."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
