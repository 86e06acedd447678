"""A raw image: the bytes of a file, or of a block device, are those of the disk.

Source: pread(2), pwrite(2), fallocate(2), fsync(2).
Invariants: the image is locked as long as it is open; a file that has become shorter is an I/O
error, never zeros.
"""

import ctypes
import errno
import os
import weakref
from pathlib import Path
from typing import Any, Final

from understudy.backends.locked import ImageError, opened
from understudy.backends.medium import check_range, read_only, write_zeros

SECTOR: Final = 512
OTHERS: Final = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"QED\0": "qed",
    b"LUKS\xba\xbe": "luks",
}
"""How images of other formats begin, by the name that qemu-img has for them."""
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # FALLOC_FL_*
CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Raw:
    """An open raw image."""

    def __init__(
        self, path: Path, *, is_read_only: bool = False, is_surely_raw: bool = False
    ) -> None:
        """ImageError says why not.  `is_surely_raw`: it may begin as other formats do."""
        self.path, self.is_read_only = path, is_read_only
        self.fd = opened(path, writes=not is_read_only)
        self._release = weakref.finalize(self, os.close, self.fd)
        try:
            self.size = _size(path, self.fd)
            if not is_surely_raw:
                _check_format(path, os.pread(self.fd, 64, 0))
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes."""
        check_range(self, offset, length)
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"{self.path} has become shorter")
            data += more
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of the data, or an OSError."""
        check_range(self, offset, len(data))
        if self.is_read_only:
            raise read_only()
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done

    def flush(self) -> None:
        """All that was written is on the computer's disk."""
        if not self.is_read_only:
            os.fsync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Give the room back, where the file system can."""
        check_range(self, offset, length)
        if self.is_read_only:
            raise read_only()
        self._allocate(PUNCH_HOLE | KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Zeros; without writing them where the file system can."""
        check_range(self, offset, length)
        if self.is_read_only:
            raise read_only()
        mode = PUNCH_HOLE if may_unmap else ZERO_RANGE
        if not self._allocate(mode | KEEP_SIZE, offset, length):
            write_zeros(self, offset, length)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate; False where it does not exist."""
        if length == 0 or _fallocate(self.fd, mode, offset, length) == 0:
            return True
        error = ctypes.get_errno()
        if error not in CANNOT:
            raise OSError(error, os.strerror(error))
        return False

    def save(self) -> dict[str, Any]:
        """Not the content: what tells whether it has changed."""
        return {"size": self.size, "changed_ns": os.fstat(self.fd).st_mtime_ns}

    def load(self, saved: Any) -> None:
        """ValueError if it is not the content any more on which the snapshot's guest relies."""
        if saved != self.save():
            raise ValueError(f"snapshot: {self.path} has been written since the snapshot was made")

    def close(self) -> None:
        """Let others have it."""
        self._release()


def _size(path: Path, fd: int) -> int:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise ImageError(f"{path} is empty: give it a size first, like `truncate -s 1G {path}`")
    if size % SECTOR:
        raise ImageError(
            f"{path} has {size} bytes, no whole number of sectors of {SECTOR} bytes: is it a disk "
            f"image?  `truncate -s %{SECTOR} {path}` makes it longer"
        )
    return size


def _check_format(path: Path, start: bytes) -> None:
    for magic, name in OTHERS.items():
        if start.startswith(magic):
            do = f"`qemu-img convert -f {name} -O qcow2 {path} {path.stem}.qcow2` makes it usable"
            if name == "qcow2":
                do = "say ,format=qcow2"
            raise ImageError(
                f"{path} is an image of the format {name}: {do} (or say ,format=raw if the disk is "
                "really to begin with these bytes)"
            )
