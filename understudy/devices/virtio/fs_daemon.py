"""A file system's requests that another program answers, and what of them it is told.

The guest does not speak with the program: it is asked what the functions of `fs_requests.py` are
asked, in the version of FUSE that is spoken there, and a few requests more that they do not know.

Source: Linux, include/uapi/linux/fuse.h.
Invariants: nobody is asked to make a device, or a file that gives rights to whoever runs it
(setuid); all that is asked is asked by the guest's root; an answer that is none is EIO.
"""

import errno
import os
import stat
import struct
from typing import Final, Protocol

from understudy.backends.folder import MADE, ShareError
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op
from understudy.devices.virtio.fs_requests import ANSWERS, BACKGROUND, MOST, MOST_PAGES

FALLOCATE, COPY_FILE_RANGE, SYNCFS = 43, 47, 50  # FUSE_*, beside those of `Op`
KNOWN: Final = frozenset({*ANSWERS, FALLOCATE, COPY_FILE_RANGE, SYNCFS})
RIGHTS: Final = stat.S_ISUID | stat.S_ISGID
MODES: Final[dict[int, int]] = {Op.MKNOD: 0, Op.MKDIR: 0, Op.CREATE: 4, Op.SETATTR: 68}
"""Where a mode is behind the header."""
LONGEST_ERRNO: Final = 4095


class Answerer(Protocol):
    """The program."""

    @property
    def problem(self) -> str:
        """Why it answers nothing any more; empty while it does."""

    def ask(self, queue: int, request: bytes, room: int) -> bytes:
        """Its answer, of so many bytes at most; OSError if there is none."""

    def close(self) -> None:
        """It ends."""


class Daemon:
    """A folder that a program serves."""

    def __init__(self, path: os.PathLike[str], program: Answerer) -> None:
        self.path, self.program = path, program
        self.is_mounted = False  # the guest has names and open files, which the program knows

    def answer(self, queue: int, request: bytes, room: int) -> bytes:
        """Of a request of at least a header: what the guest is told, in so many bytes at most."""
        _, opcode, unique, *_ = fuse.IN_HEADER.unpack_from(request)
        is_silent = opcode in fuse.SILENT
        if room < fuse.OUT_HEADER.size and not is_silent:
            return b""  # nobody could be told
        room = 0 if is_silent else min(room, fuse.OUT_HEADER.size + MOST)
        try:
            if opcode not in KNOWN:
                raise OSError(errno.ENOSYS, "no such request")
            said = self.program.ask(queue, _asked(opcode, request), room)
            if is_silent:
                return b""
            answer = self._checked(opcode, unique, said)
            if opcode == Op.INIT and len(answer) > fuse.OUT_HEADER.size:
                return self._begun(request, answer, room)
            return answer
        except OSError as error:
            problem = error.errno or errno.EIO
        except struct.error:  # cut off
            problem = errno.EINVAL
        return b"" if is_silent else fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, -problem, unique)

    def forget_all(self) -> None:
        """The guest knows nothing any more, and has nothing open."""
        if self.is_mounted:
            size = fuse.IN_HEADER.size
            self.answer(1, fuse.IN_HEADER.pack(size, Op.DESTROY, 1, 0, 0, 0, 0, 0, 0), MOST)
            self.is_mounted = False

    def save(self) -> None:
        """Nothing can be saved: ShareError while the guest has it mounted."""
        if self.is_mounted:
            raise ShareError(
                f"share {self.path}: virtiofsd serves it and alone knows what the guest has open: "
                "unmount it in the guest before a snapshot, or say server=python"
            )

    def counts(self) -> dict[str, str | bool]:
        """What there is to be told."""
        return {"server": "virtiofsd", "problem": self.program.problem, "mounted": self.is_mounted}

    def close(self) -> None:
        """The program ends."""
        self.program.close()

    def _checked(self, opcode: int, unique: int, said: bytes) -> bytes:
        if opcode == Op.DESTROY:  # virtiofsd says nothing
            self.is_mounted = False
            return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, 0, unique)
        if len(said) < fuse.OUT_HEADER.size:
            raise OSError(errno.EIO, "no answer")
        size, error, about = fuse.OUT_HEADER.unpack_from(said)
        is_one = (size, about) == (len(said), unique) and -LONGEST_ERRNO <= error <= 0
        if not is_one or (error and size != fuse.OUT_HEADER.size):
            raise OSError(errno.EIO, "no answer to this")
        return said

    def _begun(self, request: bytes, answer: bytes, room: int) -> bytes:
        """What both have agreed on, and no more than this device can carry."""
        self.is_mounted = True
        *_, offered = fuse.INIT_IN.unpack_from(request, fuse.IN_HEADER.size)
        data = answer[fuse.OUT_HEADER.size :].ljust(fuse.INIT_OUT.size, b"\0")
        major, minor, readahead, flags, *_, write, _, pages, _ = fuse.INIT_OUT.unpack_from(data)
        body = fuse.INIT_OUT.pack(
            major, min(minor, fuse.MINOR), readahead, flags & offered & fuse.FLAGS, BACKGROUND,
            BACKGROUND, min(write, MOST), 1, min(pages, MOST_PAGES), 0,
        )  # fmt: skip
        if fuse.OUT_HEADER.size + len(body) > room:
            raise OSError(errno.EIO, "no room for the answer")
        unique = fuse.OUT_HEADER.unpack_from(answer)[2]
        return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(body), 0, unique) + body


def _asked(opcode: int, request: bytes) -> bytes:
    """The request as the program is told it."""
    _, _, unique, node, _, _, pid, *_ = fuse.IN_HEADER.unpack_from(request)
    body = bytearray(request[fuse.IN_HEADER.size :])
    if opcode == Op.INIT:
        major, _, readahead, flags = fuse.INIT_IN.unpack_from(body)
        body = bytearray(fuse.INIT_IN.pack(major, fuse.MINOR, readahead, flags & fuse.FLAGS))
    elif (at := MODES.get(opcode)) is not None:
        (mode,) = struct.unpack_from("<I", body, at)
        if opcode == Op.MKNOD and (stat.S_IFMT(mode) or stat.S_IFREG) not in MADE:
            raise OSError(errno.EPERM, "no devices")
        struct.pack_into("<I", body, at, mode & ~RIGHTS)
    size = fuse.IN_HEADER.size + len(body)
    return fuse.IN_HEADER.pack(size, opcode, unique, node, 0, 0, pid, 0, 0) + bytes(body)
