"""System calls of Linux that Python does not have.

Source: openat2(2), getdents64(2), renameat2(2); their numbers are those of x86-64.
Invariant: an error is an OSError with its number, as in `os`.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

GETDENTS64, RENAMEAT2, OPENAT2 = 217, 316, 437
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 1, 2, 4, 8  # RESOLVE_*
HOW: Final = struct.Struct("<QQQ")  # struct open_how: flags, mode, resolve
ENTRY: Final = struct.Struct("<QqHB")  # struct linux_dirent64, up to its name
WITHIN: Final = BENEATH | NO_SYMLINKS | NO_MAGICLINKS | NO_XDEV
"""Not out of the folder, whatever links, dots and mounts there are."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Entry(NamedTuple):
    """One name in a folder."""

    name: bytes
    ino: int
    kind: int
    """DT_*."""
    offset: int
    """Where the next one is."""


def open_within(folder: int, path: bytes, flags: int, mode: int = 0) -> int:
    """openat2: a descriptor of what is at the path, from a folder on and not outside of it."""
    how = HOW.pack(flags | os.O_CLOEXEC, mode, WITHIN)
    return _checked(OPENAT2, folder, path, how, HOW.size)


def entries(folder: int, offset: int, room: int) -> Iterator[Entry]:
    """Names in an open folder from an offset on, as many as have room in so many bytes."""
    os.lseek(folder, offset, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(room)
    count = _checked(GETDENTS64, folder, buffer, room)
    data, at = buffer.raw[:count], 0
    while at < count:
        ino, following, size, kind = ENTRY.unpack_from(data, at)
        name = data[at + ENTRY.size : at + size].split(b"\0", 1)[0]
        yield Entry(name, ino, kind, following)
        at += size


def rename(old: int, name: bytes, new: int, to: bytes, flags: int) -> None:
    """renameat2: from one folder to another."""
    _checked(RENAMEAT2, old, name, new, to, flags)


def _checked(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    found = int(_syscall(ctypes.c_long(number), *words))
    if found < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return found
