"""Files of a shared folder that a guest has open, and how it changes them.

Source: ours; inode(7), "the set-user-ID bit": the kernel clears it as well, but not for root.
Invariant: a file gives nobody rights (setuid, setgid) once a guest has changed it.
"""

import errno
import os
from dataclasses import dataclass
from typing import Final

from understudy.backends.folder_names import Node, error

PERMISSIONS: Final = 0o1777  # and no setuid, no setgid
RIGHTS: Final = 0o6000  # setuid and setgid


@dataclass(slots=True)
class Handle:
    """An open file, or an open folder."""

    fd: int
    node: Node
    flags: int
    """Of open(2)."""

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """How many bytes were written; OSError if it was not opened for that, too."""
        if not self.flags & os.O_ACCMODE:
            raise error(errno.EBADF)
        _take_rights(self.fd)
        return os.pwrite(self.fd, data, offset)


def resize(fd: int, size: int) -> None:
    """Cut off or lengthen a file, in bytes; OSError as of ftruncate(2)."""
    _take_rights(fd)
    os.ftruncate(fd, size)


def _take_rights(fd: int) -> None:
    """Before it has other content: whoever runs it would run what a guest wrote."""
    mode = os.fstat(fd).st_mode
    if mode & RIGHTS:
        os.fchmod(fd, mode & PERMISSIONS)
