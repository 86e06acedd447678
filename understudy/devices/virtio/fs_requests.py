"""What a virtio file system's driver can ask for, one function each.

Source: Linux, include/uapi/linux/fuse.h and fs/fuse/, by what is sent there.
Invariants: a function returns the answer behind its header, or raises an OSError with its errno, or
what `struct` and `os` raise for numbers that cannot be; how much work it does is counted, by what
is asked for and never by time.
"""

import errno
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from understudy.backends.folder import Folder
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op
from understudy.devices.virtio.pci import QUANTUM

MOST_PAGES: Final = 256  # of one request's data
MOST: Final = MOST_PAGES << 12
BACKGROUND: Final = 64  # requests for which nobody waits that a driver may have under way

# Work, in bytes that could be moved instead.
ONE_REQUEST: Final = 256 << 10
ONE_STEP: Final = 1 << 10  # from one name that the guest knows to the next, here and in the kernel
ONE_NAME: Final = 8 << 10  # in a folder
ONE_FOUND: Final = 64 << 10  # of these, with what is there
ONE_FORGOTTEN: Final = 1 << 10
ONE_SYNC: Final = QUANTUM  # nobody knows how long a disk takes: nothing more at once


@dataclass(slots=True)
class Request:
    """One of them."""

    folder: Folder
    node: int
    body: memoryview
    """What came behind the header."""
    room: int
    """Bytes of data that the answer may have."""
    own_work: int = ONE_REQUEST
    """Its work but for steps: more with all that is done."""

    def __post_init__(self) -> None:
        self.folder.names.steps = 0

    @property
    def work(self) -> int:
        """What it counts as until now, in bytes that are moved."""
        return self.own_work + self.folder.names.steps * ONE_STEP

    def fields(self, layout: struct.Struct) -> tuple[int, ...]:
        """The numbers at the beginning."""
        return layout.unpack_from(self.body)

    def names(self, count: int, behind: int = 0) -> list[bytes]:
        """Strings behind so many bytes, each of which has a zero after it."""
        *found, _ = bytes(self.body[behind:]).split(b"\0", count)
        if len(found) != count:
            raise OSError(errno.EINVAL, "a name without its end")
        return found

    def attributes(self, there: os.stat_result) -> bytes:
        """Of what is there, as the guest sees it."""
        return fuse.attributes(there, is_writable=self.folder.is_writable)

    def entry(self, name: bytes) -> bytes:
        """What the guest is told of a name in the request's folder."""
        number, there = self.folder.lookup(self.node, name)
        return fuse.entry(number, self.attributes(there))


Answer = Callable[[Request], bytes]
ANSWERS: Final[dict[int, Answer]] = {}


def answers(*ops: Op) -> Callable[[Answer], Answer]:
    """The function that carries these out."""

    def register(function: Answer) -> Answer:
        for op in ops:
            ANSWERS[op] = function
        return function

    return register


# --- the file system ---


@answers(Op.INIT)
def _init(request: Request) -> bytes:
    major, _, readahead, flags = request.fields(fuse.INIT_IN)
    if major < fuse.MAJOR:
        raise OSError(errno.EPROTO, "a driver of another age")
    request.folder.forget_all()
    return fuse.INIT_OUT.pack(
        fuse.MAJOR, fuse.MINOR, readahead, flags & fuse.FLAGS, BACKGROUND, BACKGROUND, MOST, 1,
        MOST_PAGES, 0,
    )  # fmt: skip


@answers(Op.DESTROY)
def _destroy(request: Request) -> bytes:
    request.folder.forget_all()
    return b""


@answers(Op.STATFS)
def _statfs(request: Request) -> bytes:
    room = request.folder.room()
    free = [room.f_bfree, room.f_bavail, room.f_files, room.f_ffree]
    if not request.folder.is_writable:
        free = [0, 0, room.f_files, 0]  # as on a medium that is full: it stays so
    return fuse.STATFS_OUT.pack(
        room.f_blocks, *free, room.f_bsize, room.f_namemax, room.f_frsize, 0
    )


# --- names ---


@answers(Op.LOOKUP)
def _lookup(request: Request) -> bytes:
    return request.entry(*request.names(1))


@answers(Op.FORGET)
def _forget(request: Request) -> bytes:
    request.folder.forget(request.node, *request.fields(fuse.FORGET_IN))
    return b""


@answers(Op.BATCH_FORGET)
def _batch_forget(request: Request) -> bytes:
    count, _ = request.fields(fuse.BATCH_FORGET_IN)
    rows = request.body[fuse.BATCH_FORGET_IN.size :][: count * fuse.FORGET_ONE.size]
    whole = len(rows) // fuse.FORGET_ONE.size * fuse.FORGET_ONE.size
    request.own_work += whole // fuse.FORGET_ONE.size * ONE_FORGOTTEN
    for number, times in fuse.FORGET_ONE.iter_unpack(rows[:whole]):
        request.folder.forget(number, times)
    return b""


@answers(Op.INTERRUPT)
def _interrupt(request: Request) -> bytes:
    return b""  # what it is about has been answered


@answers(Op.READLINK)
def _readlink(request: Request) -> bytes:
    return request.folder.link_text(request.node)[: request.room]


@answers(Op.SYMLINK)
def _symlink(request: Request) -> bytes:
    name, text = request.names(2)
    request.folder.make_link(request.node, name, text)
    return request.entry(name)


@answers(Op.LINK)
def _link(request: Request) -> bytes:
    (old,) = request.fields(fuse.LINK_IN)
    (name,) = request.names(1, fuse.LINK_IN.size)
    request.folder.link(old, request.node, name)
    return request.entry(name)


@answers(Op.MKNOD)
def _mknod(request: Request) -> bytes:
    mode, *_ = request.fields(fuse.MKNOD_IN)
    (name,) = request.names(1, fuse.MKNOD_IN.size)
    request.folder.make_node(request.node, name, mode)
    return request.entry(name)


@answers(Op.MKDIR)
def _mkdir(request: Request) -> bytes:
    mode, _ = request.fields(fuse.MKDIR_IN)
    (name,) = request.names(1, fuse.MKDIR_IN.size)
    request.folder.make_folder(request.node, name, mode)
    return request.entry(name)


@answers(Op.UNLINK)
def _unlink(request: Request) -> bytes:
    request.folder.remove(request.node, *request.names(1), is_folder=False)
    return b""


@answers(Op.RMDIR)
def _rmdir(request: Request) -> bytes:
    request.folder.remove(request.node, *request.names(1), is_folder=True)
    return b""


@answers(Op.RENAME)
def _rename(request: Request) -> bytes:
    (other,) = request.fields(fuse.RENAME_IN)
    name, to = request.names(2, fuse.RENAME_IN.size)
    request.folder.rename(request.node, name, other, to, 0)
    return b""


@answers(Op.RENAME2)
def _rename2(request: Request) -> bytes:
    other, flags, _ = request.fields(fuse.RENAME2_IN)
    name, to = request.names(2, fuse.RENAME2_IN.size)
    request.folder.rename(request.node, name, other, to, flags)
    return b""


# --- attributes ---


def _held(request: Request, there: os.stat_result) -> bytes:
    return fuse.VALID.pack(fuse.HELD_S, 0, 0) + request.attributes(there)


@answers(Op.GETATTR)
def _getattr(request: Request) -> bytes:
    return _held(request, request.folder.stat(request.node))


@answers(Op.SETATTR)
def _setattr(request: Request) -> bytes:
    (
        valid, _, _, size, _, accessed, modified, _, accessed_ns, modified_ns, _, mode, _, uid, gid,
        _,
    ) = request.fields(fuse.SETATTR_IN)  # fmt: skip
    folder, changes = request.folder, dict[str, Any]()
    if valid & fuse.MODE:
        changes["mode"] = mode
    if valid & fuse.SIZE:
        changes["size"] = size
    for key, flag, now, ns in (
        ("accessed_ns", fuse.ATIME, fuse.ATIME_NOW, fuse.ns_of(accessed, accessed_ns)),
        ("modified_ns", fuse.MTIME, fuse.MTIME_NOW, fuse.ns_of(modified, modified_ns)),
    ):
        if valid & flag:
            changes[key] = time.time_ns() if valid & now else ns
    if valid & (fuse.UID | fuse.GID):
        owner = fuse.owner(folder.stat(request.node))
        wanted = uid if valid & fuse.UID else owner[0], gid if valid & fuse.GID else owner[1]
        if wanted != owner:
            raise OSError(errno.EPERM, "files belong to who shares the folder")
    if changes:
        folder.change(request.node, **changes)
    return _held(request, folder.stat(request.node))


# --- files ---


@answers(Op.OPEN)
def _open(request: Request) -> bytes:
    flags, _ = request.fields(fuse.OPEN_IN)
    number = request.folder.open(request.node, flags & ~os.O_DIRECTORY)
    return fuse.OPEN_OUT.pack(number, 0, 0)


@answers(Op.CREATE)
def _create(request: Request) -> bytes:
    flags, mode, _, _ = request.fields(fuse.CREATE_IN)
    (name,) = request.names(1, fuse.CREATE_IN.size)
    number, there, handle = request.folder.create(request.node, name, flags, mode)
    return fuse.entry(number, request.attributes(there)) + fuse.OPEN_OUT.pack(handle, 0, 0)


@answers(Op.READ)
def _read(request: Request) -> bytes:
    number, offset, size, *_ = request.fields(fuse.READ_IN)
    return os.pread(request.folder.handle(number).fd, min(size, request.room), offset)


@answers(Op.WRITE)
def _write(request: Request) -> bytes:
    number, offset, size, *_ = request.fields(fuse.READ_IN)
    data = request.body[fuse.READ_IN.size :]
    if size != len(data):
        raise OSError(errno.EINVAL, "as many bytes as it says")
    return fuse.WRITE_OUT.pack(request.folder.handle(number).write(data, offset), 0)


@answers(Op.RELEASE, Op.RELEASEDIR)
def _release(request: Request) -> bytes:
    number, *_ = request.fields(fuse.RELEASE_IN)
    request.folder.release(number)
    return b""


@answers(Op.FSYNC, Op.FSYNCDIR)
def _fsync(request: Request) -> bytes:
    number, flags, _ = request.fields(fuse.FSYNC_IN)
    fd = request.folder.handle(number).fd
    request.own_work += ONE_SYNC
    (os.fdatasync if flags & fuse.FDATASYNC else os.fsync)(fd)
    return b""


@answers(Op.LSEEK)
def _lseek(request: Request) -> bytes:
    number, offset, whence, _ = request.fields(fuse.LSEEK_IN)
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, "the guest knows all other places")
    return fuse.LSEEK_OUT.pack(os.lseek(request.folder.handle(number).fd, offset, whence))


# --- folders ---


@answers(Op.OPENDIR)
def _opendir(request: Request) -> bytes:
    return fuse.OPEN_OUT.pack(request.folder.open(request.node, os.O_DIRECTORY), 0, 0)


@answers(Op.READDIR)
def _readdir(request: Request) -> bytes:
    number, offset, size, *_ = request.fields(fuse.READ_IN)
    most, rows = min(size, request.room), bytearray()
    for entry in request.folder.listing(number, offset):
        row = fuse.dirent(entry.ino, entry.offset, entry.kind, entry.name)
        if len(rows) + len(row) > most:
            break
        request.own_work += ONE_NAME
        rows += row
    return bytes(rows)


@answers(Op.READDIRPLUS)
def _readdirplus(request: Request) -> bytes:
    number, offset, size, *_ = request.fields(fuse.READ_IN)
    most, rows = min(size, request.room), bytearray()
    for entry in request.folder.listing(number, offset):
        row = fuse.dirent(entry.ino, entry.offset, entry.kind, entry.name)
        is_enough = rows and request.work >= QUANTUM  # the driver asks for the rest
        if is_enough or len(rows) + fuse.ENTRY_BYTES + len(row) > most:
            break
        request.own_work += ONE_FOUND
        rows += _told(request, entry.name) + row
    return bytes(rows)


def _told(request: Request, name: bytes) -> bytes:
    """What the guest is told of a name among others; nothing if there is nothing to be told."""
    if name not in (b".", b".."):
        try:
            return request.entry(name)
        except OSError:
            pass  # it has gone, or is not to be had: whoever wants it asks again
    return fuse.entry(0, bytes(fuse.ATTR.size))
