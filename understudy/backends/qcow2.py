"""A qcow2 image, and the images below it.

Source: QEMU's docs/interop/qcow2.txt for the header; what is behind it is the business of the
library imago, by the compiled module `_images`.

A header may come from anywhere, and so may the name of a backing file in it.  Here the files are
opened, locked and checked; the library gets open files only.

Invariants: a chain ends, and no file is in it twice; every file of it is locked, and only the first
one may be written; a backing file has the format that is written in the header, never one that
its own content suggests.
"""

import os
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.backends.locked import ImageError, close_all, opened
from understudy.backends.medium import check_range, read_only
from understudy.backends.qcow2_check import check

MAGIC: Final = b"QFI\xfb"
HEADER: Final = struct.Struct(">4sIQIIQI")  # up to crypt_method
FEATURES: Final = struct.Struct(">Q")  # incompatible_features, at FEATURES_AT
FEATURES_AT, HEADER_LENGTH_AT, V2_LENGTH = 72, 100, 72
CORRUPT, DATA_FILE, EXTENDED_L2 = 2, 4, 16  # bits of incompatible_features
BACKING_FORMAT: Final = 0xE279_2ACA  # a header extension
LONGEST_NAME: Final = 1023
LONGEST_CHAIN: Final = 16
FORMATS: Final = ("raw", "qcow2")
HEADER_BYTES: Final = 1 << 16


class Backing(NamedTuple):
    """What a header says of the image below."""

    name: str
    format: str


class Qcow2:
    """An open qcow2 image with all that is below it."""

    def __init__(self, path: Path, *, is_read_only: bool = False) -> None:
        """ImageError says why not."""
        self.path, self.is_read_only = path, is_read_only
        self.files: list[int] = []
        self._release = weakref.finalize(self, close_all, self.files)
        try:
            formats = self._open_chain()
            self.image = _library()(list(zip(self.files, formats, strict=True)), not is_read_only)
        except OSError as error:
            self._release()
            raise ImageError(f"{path} is damaged, or no image of this format: {error}") from None
        except BaseException:
            self._release()
            raise
        self.size: int = self.image.size // 512 * 512

    def _open_chain(self) -> list[str]:
        """Open all files of the chain; their formats."""
        path, format_, formats = self.path, "qcow2", list[str]()
        seen: set[tuple[int, int] | None] = set()
        while True:
            writes = not formats and not self.is_read_only
            found = _identity(path)
            if found in seen:  # said before it is found locked, by us
                raise ImageError(f"{self.path}: its backing files come back to {path}")
            self.files.append(opened(path, writes=writes))
            fd = self.files[-1]
            seen.add(found)
            if len(seen) > LONGEST_CHAIN:
                raise ImageError(f"{self.path} has more than {LONGEST_CHAIN} backing files")
            formats.append(format_)
            below = backing(path, os.pread(fd, HEADER_BYTES, 0)) if format_ == "qcow2" else None
            if writes:
                check(path, fd)
            if below is None:
                return formats
            above, path, format_ = path, path.parent / below.name, below.format
            if not path.exists():
                raise ImageError(
                    f"{above}: its backing file {path} is not there; bring it there, or say where "
                    f"it is: `qemu-img rebase -u -F {format_} -b FILE {above}`"
                )

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes."""
        check_range(self, offset, length)
        data: bytes = self.image.read(offset, length)
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of the data, or an OSError."""
        self._check(offset, len(data))
        self.image.write(offset, bytes(data))

    def flush(self) -> None:
        """All that was written is on the computer's disk, and the tables that lead to it."""
        if not self.is_read_only:
            self.image.flush()

    def discard(self, offset: int, length: int) -> None:
        """Give the room back."""
        self._check(offset, length)
        self.image.discard(offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Zeros."""
        self._check(offset, length)
        self.image.zero(offset, length, may_unmap)

    def _check(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if self.is_read_only:
            raise read_only()

    def save(self) -> dict[str, Any]:
        """Not the content: what tells whether it has changed."""
        self.flush()
        changed = [os.fstat(fd).st_mtime_ns for fd in self.files]
        return {"size": self.size, "changed_ns": changed}

    def load(self, saved: Any) -> None:
        """ValueError if it is not the content any more on which the snapshot's guest relies."""
        if saved != self.save():
            raise ValueError(f"snapshot: {self.path} has been written since the snapshot was made")

    def close(self) -> None:
        """Flush, and let others have it."""
        if self._release.alive:
            try:
                self.image.close()
            finally:
                self._release()


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells files apart, whatever they are called."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def backing(path: Path, header: bytes) -> Backing | None:
    """What the header says of the image below; ImageError if the image cannot be used."""
    if len(header) < V2_LENGTH or not header.startswith(MAGIC):
        raise ImageError(f"{path} is no qcow2 image: is it cut off, or of another format?")
    _, version, at, length, _, _, encryption = HEADER.unpack_from(header)
    if version not in (2, 3):
        raise ImageError(f"{path} is a qcow2 image of version {version}, expected 2 or 3")
    if encryption:
        raise ImageError(
            f"{path} is encrypted: `qemu-img convert` makes an image of it that is not"
        )
    end = V2_LENGTH
    if version == 3:
        if len(header) < HEADER_LENGTH_AT + 4:
            raise ImageError(f"{path} is cut off in its header")
        (features,) = FEATURES.unpack_from(header, FEATURES_AT)
        (end,) = struct.unpack_from(">I", header, HEADER_LENGTH_AT)
        if features & CORRUPT:
            raise ImageError(
                f"{path} is marked as corrupt: `qemu-img check -r all {path}` mends it"
            )
        if features & (DATA_FILE | EXTENDED_L2):
            what = "its data in another file" if features & DATA_FILE else "extended tables"
            raise ImageError(
                f"{path} has {what}: `qemu-img convert -O qcow2` makes an image that can be used"
            )
    if not at:
        return None
    name = header[at : at + length]
    if not 0 < length <= LONGEST_NAME or len(name) != length or b"\0" in name:
        raise ImageError(f"{path} has the name of a backing file that cannot be")
    text = os.fsdecode(name)
    format_ = _format_of_backing(header, end, at)
    if text.startswith(("json:", "nbd:", "http:", "https:", "ssh:", "rbd:", "fat:")):
        raise ImageError(f"{path} is over {text}: only files can be below an image")
    if format_ not in FORMATS:
        said = f"the format {format_}" if format_ else "no format"
        raise ImageError(
            f"{path} says {said} for its backing file, expected raw or qcow2: "
            f"`qemu-img rebase -u -F FORMAT -b {text} {path}` writes it down"
        )
    return Backing(text, format_)


def _format_of_backing(header: bytes, at: int, end: int) -> str:
    """The header extension that says it; empty if there is none."""
    while at + 8 <= min(end, len(header)):
        kind, length = struct.unpack_from(">II", header, at)
        if kind == 0:
            break
        if kind == BACKING_FORMAT:
            return header[at + 8 : at + 8 + length].decode("ascii", "replace")
        at += 8 + (length + 7 & ~7)
    return ""


def _library() -> Callable[[list[tuple[int, str]], bool], Any]:
    try:
        from understudy._images import Image
    except ImportError:
        raise ImageError(
            "this installation of understudy cannot read qcow2 images (`make setup` compiles what "
            "is missing): `qemu-img convert -O raw` makes a raw image of one"
        ) from None
    return Image
