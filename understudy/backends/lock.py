"""A lock on an image: who may write it, and what others may do meanwhile.

Source: QEMU's block/file-posix.c, "File locking", whose protocol this is, so that QEMU and its
tools respect our locks and we theirs.  A user of an image holds, shared, byte 100 + n for each
thing n that it does, and byte 200 + n for each that no other may do.  Before that it asks whether
anybody holds the opposite byte.

Locks belong to the open file ("open file description locks", fcntl(2)): two VMs of one process
find each other, too, and whatever ends a process ends its locks.
Invariant: two who write, or one who writes and one who reads, never both hold an image.
"""

import errno
import fcntl
import struct
from typing import Final

READS, WRITES, WRITES_THE_SAME, RESIZES = 1, 2, 4, 8  # BLK_PERM_*
DOES, FORBIDS = 100, 200  # RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE
FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, process
UNKNOWN: Final = (errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class InUse(Exception):
    """Somebody else has the image."""


def lock(fd: int, *, writes: bool) -> None:
    """Hold the image until the file is closed; InUse if another's use forbids that.

    On a file system without such locks nothing is held.
    """
    does = READS | WRITES | RESIZES if writes else READS
    forbids = WRITES | RESIZES
    try:
        for bit in (READS, WRITES, WRITES_THE_SAME, RESIZES):
            n = bit.bit_length() - 1
            if does & bit:
                _hold(fd, DOES + n)
            if forbids & bit:
                _hold(fd, FORBIDS + n)
        for bit in (READS, WRITES, WRITES_THE_SAME, RESIZES):
            n = bit.bit_length() - 1
            if (does & bit and _is_held(fd, FORBIDS + n)) or (
                forbids & bit and _is_held(fd, DOES + n)
            ):
                raise InUse
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise


def _hold(fd: int, byte: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    except (BlockingIOError, PermissionError):  # somebody, not QEMU, has it for himself
        raise InUse from None


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file holds it."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
