"""The file of an image, open and locked.

Source: ours.  Invariant: every failure is an `ImageError`, one line that says what to do.
"""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from understudy.backends.lock import InUse, lock


class ImageError(ValueError):
    """An image that cannot be used, and what to do."""


def opened(path: Path, *, writes: bool) -> int:
    """A file descriptor, locked as long as it is open; ImageError says why not."""
    try:
        fd = os.open(path, os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writes else os.O_RDONLY))
    except OSError as error:
        raise ImageError(_why(path, error)) from None
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise ImageError(f"{path} is no file and no block device: a disk needs an image")
        lock(fd, writes=writes)
    except InUse:
        os.close(fd)
        raise ImageError(
            f"{path} is in use by another virtual machine or program: end that first, or open it "
            "with ,ro or ,overlay in all of them"
        ) from None
    except OSError as error:
        os.close(fd)
        raise ImageError(f"{path}: {error.strerror}") from None
    except ImageError:
        os.close(fd)
        raise
    return fd


def close_all(fds: Iterable[int]) -> None:
    """Close them, which lets their locks go."""
    for fd in fds:
        os.close(fd)


def _why(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"{path}: no such file; `truncate -s 1G {path}` makes an empty disk"
        case errno.EISDIR:
            return f"{path} is a folder: a disk needs an image"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{path}: {error.strerror}; to read it is enough with ,ro or ,overlay"
    return f"{path}: {error.strerror}"
