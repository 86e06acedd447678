"""What the driver of a virtio file system says, and is told: the messages of FUSE.

Source: Linux, include/uapi/linux/fuse.h, whose names these are; version 7.31 is spoken.
"""

import os
import stat
import struct
from enum import IntEnum
from typing import Final

MAJOR, MINOR = 7, 31


class Op(IntEnum):
    """FUSE_*, of `enum fuse_opcode`; what is not in here is answered by ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46


SILENT: Final = (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)
"""Nobody waits for an answer."""

ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES = 1 << 0, 1 << 3, 1 << 5  # of INIT's flags
AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 12, 1 << 13, 1 << 14
PARALLEL_DIROPS, MAX_PAGES = 1 << 18, 1 << 22
FLAGS: Final = (
    ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | DO_READDIRPLUS | READDIRPLUS_AUTO
    | PARALLEL_DIROPS | MAX_PAGES
)  # fmt: skip

MODE, SIZE, ATIME, MTIME = 1 << 0, 1 << 3, 1 << 4, 1 << 5  # FATTR_*
UID, GID, ATIME_NOW, MTIME_NOW = 1 << 1, 1 << 2, 1 << 7, 1 << 8
FDATASYNC: Final = 1  # flag of FSYNC

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, …
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error, unique
ATTR: Final = struct.Struct("<6Q10I")
VALID: Final = struct.Struct("<QII")  # seconds that attributes hold
ENTRY: Final = struct.Struct("<QQQQII")  # nodeid, generation, and how long name and attributes hold
INIT_IN: Final = struct.Struct("<IIII")  # major, minor, max_readahead, flags
INIT_OUT: Final = struct.Struct("<IIIIHHIIHH32x")
SETATTR_IN: Final = struct.Struct("<II6Q3I5I")
MKNOD_IN: Final = struct.Struct("<IIII")  # mode, rdev, umask
MKDIR_IN: Final = struct.Struct("<II")  # mode, umask
RENAME_IN: Final = struct.Struct("<Q")  # newdir
RENAME2_IN: Final = struct.Struct("<QII")  # newdir, flags
LINK_IN: Final = struct.Struct("<Q")  # oldnodeid
OPEN_IN: Final = struct.Struct("<II")  # flags
OPEN_OUT: Final = struct.Struct("<QII")  # fh, flags
CREATE_IN: Final = struct.Struct("<IIII")  # flags, mode, umask
RELEASE_IN: Final = struct.Struct("<QIIQ")  # fh
READ_IN: Final = struct.Struct("<QQIIQII")  # fh, offset, size; of WRITE as well
WRITE_OUT: Final = struct.Struct("<II")  # size
STATFS_OUT: Final = struct.Struct("<5Q4I24x")
FSYNC_IN: Final = struct.Struct("<QII")  # fh, flags
LSEEK_IN: Final = struct.Struct("<QQII")  # fh, offset, whence
LSEEK_OUT: Final = struct.Struct("<Q")
FORGET_IN: Final = struct.Struct("<Q")  # nlookup
BATCH_FORGET_IN: Final = struct.Struct("<II")  # count
FORGET_ONE: Final = struct.Struct("<QQ")  # nodeid, nlookup
DIRENT: Final = struct.Struct("<QQII")  # ino, off, namelen, type

ENTRY_BYTES: Final = ENTRY.size + ATTR.size  # struct fuse_entry_out

HELD_S: Final = 1  # ours: a guest looks again after so long whether a name or a file has changed
NOBODY: Final = 65534
ALL_ONES: Final = (1 << 64) - 1
NS: Final = 1_000_000_000


def attributes(there: os.stat_result, *, is_writable: bool) -> bytes:
    """`struct fuse_attr`.

    What belongs to who runs this process is root's in the guest, and all else is nobody's: as in a
    user namespace with one user.  Where nothing can be written, no reading leaves a trace either:
    the time of the last access is that of the last change.
    """
    accessed_ns = there.st_atime_ns if is_writable else there.st_mtime_ns
    times = [divmod(ns, NS) for ns in (accessed_ns, there.st_mtime_ns, there.st_ctime_ns)]
    return ATTR.pack(
        there.st_ino, there.st_size, there.st_blocks,
        *(seconds & ALL_ONES for seconds, _ in times), *(ns for _, ns in times),
        there.st_mode & ~(stat.S_ISUID | stat.S_ISGID), there.st_nlink & 0xFFFF_FFFF,
        *owner(there), 0, there.st_blksize, 0,
    )  # fmt: skip


def owner(there: os.stat_result) -> tuple[int, int]:
    """User and group, as the guest sees them."""
    is_own = there.st_uid == os.geteuid(), there.st_gid == os.getegid()
    return 0 if is_own[0] else NOBODY, 0 if is_own[1] else NOBODY


def entry(number: int, attributes: bytes) -> bytes:
    """`struct fuse_entry_out`; with the number 0 a name of which nothing more is said."""
    held = HELD_S if number else 0
    return ENTRY.pack(number, 0, held, held, 0, 0) + attributes


def dirent(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    """`struct fuse_dirent`."""
    return DIRENT.pack(ino, offset, len(name), kind) + name + bytes(-len(name) % 8)


def ns_of(seconds: int, ns: int) -> int:
    """A time of SETATTR, whose seconds have a sign."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * NS + ns
