"""Files that are named to us, opened to be read, if they are plain ones.

Whoever opens a FIFO waits until somebody writes to it, for ever if nobody does.
Source: open(2), "O_NONBLOCK".
Invariants: opening waits for nobody; what is no plain file is an OSError that says so, as one that
is not there is.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def opened(file: Path) -> BufferedReader:
    """To be read and closed."""
    return open(file, "rb", opener=_descriptor)


def read(file: Path) -> bytes:
    """All that is in it."""
    with opened(file) as data:
        return data.read()


def _descriptor(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        return fd
    os.close(fd)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "no plain file", path)
