"""Files into a guest and out of it: contents and permissions, folders, symbolic links.

Source: ours; Linux's open(2), statx(2), getdents64(2).

Not modeled: owners, times, hard links, holes; devices and pipes are refused.

Invariants: after a copy the file has the size that was sent, by the word of whoever keeps it; what
a guest calls its files cannot lead out of the folder that they are put into, nor through a link in
it; on the host nothing is written over but the one file that was named.
"""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from understudy.agent.calls import (
    O_CLOEXEC,
    O_CREAT,
    O_DIRECTORY,
    O_LARGEFILE,
    O_NOFOLLOW,
    O_NONBLOCK,
    O_PATH,
    O_RDONLY,
    O_TRUNC,
    O_WRONLY,
    ROOM,
    Answer,
    Call,
    Place,
    Request,
)
from understudy.agent.calls import Result as Of
from understudy.agent.result import LinuxError
from understudy.agent.steps import Ask
from understudy.guests.agent_program import SCRATCH_GVA

READ_BYTES: Final = 1 << 20
WRITE_BYTES: Final = ROOM & -0x1000
NAMES_BYTES: Final = 1 << 16
STATX_BYTES: Final = 256
STATX_BASIC: Final = 0x7FF
AT_EMPTY_PATH: Final = 0x1000
ENTRY: Final = struct.Struct("<QqHB")  # of a folder: inode, offset, length, type; then the name
PERMISSIONS: Final = 0o777


class About(NamedTuple):
    """What is known of a file."""

    mode: int
    size: int


def _about(request: Request, file: Of | int) -> Place:
    place = request.keep(bytes(STATX_BYTES))
    request.call(Call.STATX, file, request.text(""), AT_EMPTY_PATH, STATX_BASIC, place)
    return place


def _told(answer: Answer, place: Place) -> About:
    data = answer.kept(place, STATX_BYTES)
    return About(*struct.unpack_from("<H", data, 28), *struct.unpack_from("<Q", data, 40))


def about(ask: Ask, path: str) -> About:
    """What a name stands for, without following a link.  OSError if there is nothing."""
    request = Request()
    file = request.call(Call.OPEN, request.text(path), O_PATH | O_NOFOLLOW | O_CLOEXEC)
    place = _about(request, file)
    request.call(Call.CLOSE, file)
    answer = ask(request)
    answer.checked(file, path)
    return _told(answer, place)


def read(ask: Ask, path: str) -> Iterator[bytes]:
    """A file's contents, in pieces.  OSError if it cannot be read, LinuxError if it is no file."""
    request = Request()
    flags = O_RDONLY | O_LARGEFILE | O_NONBLOCK | O_CLOEXEC
    opened = request.call(Call.OPEN, request.text(path), flags)
    place = _about(request, opened)
    answer = ask(request)
    file = answer.checked(opened, path)
    try:
        if not stat.S_ISREG(_told(answer, place).mode):
            raise LinuxError(f"{path} in the guest is no file")
        while True:
            request = Request()
            got = request.call(Call.READ, file, SCRATCH_GVA, READ_BYTES)
            request.answer(got, READ_BYTES)
            answer = ask(request)
            if not answer.checked(got, path):
                return
            yield answer.spans[0]
    finally:
        _close(ask, file)


def write(ask: Ask, path: str, pieces: Iterator[bytes], mode: int) -> None:
    """Make a file of these contents.  OSError if that fails; then it is not complete."""
    request = Request()
    flags = O_WRONLY | O_CREAT | O_TRUNC | O_LARGEFILE | O_CLOEXEC
    opened = request.call(Call.OPEN, request.text(path), flags, 0o600)
    file, size = ask(request).checked(opened, path), 0
    try:
        for piece in pieces:
            at = 0
            while at < len(piece):
                request, part = Request(), piece[at : at + WRITE_BYTES]
                wrote = request.call(Call.WRITE, file, request.data(part), len(part))
                at += ask(request).checked(wrote, path)
            size += len(piece)
        request = Request()
        changed = request.call(Call.FCHMOD, file, mode & PERMISSIONS)
        place = _about(request, file)
        answer = ask(request)
        answer.checked(changed, path)
        told = _told(answer, place)
        if stat.S_ISREG(told.mode) and told.size != size:
            raise LinuxError(f"{path} in the guest has {told.size} bytes, where {size} were sent")
    finally:
        _close(ask, file)


def _close(ask: Ask, file: int) -> None:
    request = Request()
    request.call(Call.CLOSE, file)
    ask(request)


# --- folders ---


def put(ask: Ask, source: Path, target: str) -> None:
    """Copy a file or a folder of the host to this name in the guest."""
    info = source.lstat()
    if stat.S_ISLNK(info.st_mode):
        _link(ask, str(source.readlink()), target)
    elif stat.S_ISDIR(info.st_mode):
        _make_folder(ask, target)
        for inner in sorted(source.iterdir()):
            put(ask, inner, f"{target}/{inner.name}")
        request = Request()
        changed = request.call(Call.CHMOD, request.text(target), info.st_mode & PERMISSIONS)
        ask(request).checked(changed, target)
    elif stat.S_ISREG(info.st_mode):
        with source.open("rb") as file:
            write(ask, target, iter(lambda: file.read(WRITE_BYTES), b""), info.st_mode)
    else:
        raise LinuxError(f"{source} is neither a file nor a folder: it cannot be copied")


def get(ask: Ask, source: str, target: Path) -> None:
    """Copy a file or a folder of the guest to this name on the host.

    A file is written over, a folder must not be there yet.
    """
    told = about(ask, source)
    if stat.S_ISDIR(told.mode):
        _get_folder(ask, source, target, told)
    elif stat.S_ISREG(told.mode):
        _get_file(ask, source, target, told, "wb")
    else:
        raise LinuxError(f"{source} in the guest is neither a file nor a folder")


def _get_file(ask: Ask, source: str, target: Path, told: About, mode: Literal["wb", "xb"]) -> None:
    with target.open(mode) as file:
        file.writelines(read(ask, source))
        os.fchmod(file.fileno(), told.mode & PERMISSIONS)


def _get_folder(ask: Ask, source: str, target: Path, told: About) -> None:
    """Everything in it; each name is new on the host, so no link is followed."""
    target.mkdir(mode=0o700)
    for name in names(ask, source):
        inner, path = f"{source}/{name}", target / name
        here = about(ask, inner)
        if stat.S_ISDIR(here.mode):
            _get_folder(ask, inner, path, here)
        elif stat.S_ISREG(here.mode):
            _get_file(ask, inner, path, here, "xb")
        elif stat.S_ISLNK(here.mode):
            path.symlink_to(_link_of(ask, inner))
        else:
            raise LinuxError(f"{inner} in the guest is neither a file nor a folder")
    target.chmod(told.mode & PERMISSIONS)


def names(ask: Ask, path: str) -> list[str]:
    """What is in a folder of the guest, sorted.  LinuxError for what is no name."""
    request = Request()
    opened = request.call(Call.OPEN, request.text(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    file, found = ask(request).checked(opened, path), list[str]()
    try:
        while True:
            request = Request()
            got = request.call(Call.GETDENTS64, file, SCRATCH_GVA, NAMES_BYTES)
            request.answer(got, NAMES_BYTES)
            answer = ask(request)
            if not answer.checked(got, path):
                return sorted(found)
            found += [name for name in _entries(answer.spans[0]) if name not in (".", "..")]
    finally:
        _close(ask, file)


def _entries(data: bytes) -> Iterator[str]:
    at = 0
    while at < len(data):
        length = ENTRY.unpack_from(data, at)[2] if at + ENTRY.size <= len(data) else 0
        raw = data[at + ENTRY.size : at + length].partition(b"\0")[0]
        if not raw or b"/" in raw:
            raise LinuxError("the guest has a folder with names that cannot be")
        yield os.fsdecode(raw)
        at += length


def _make_folder(ask: Ask, path: str) -> None:
    request = Request()
    made = request.call(Call.MKDIR, request.text(path), 0o700)
    answer = ask(request)
    try:
        answer.checked(made, path)
    except FileExistsError:
        if not stat.S_ISDIR(about(ask, path).mode):
            raise


def _link(ask: Ask, text: str, path: str) -> None:
    request = Request()
    made = request.call(Call.SYMLINK, request.text(text), request.text(path))
    ask(request).checked(made, path)


def _link_of(ask: Ask, path: str) -> str:
    request = Request()
    got = request.call(Call.READLINK, request.text(path), SCRATCH_GVA, NAMES_BYTES)
    request.answer(got, NAMES_BYTES)
    answer = ask(request)
    answer.checked(got, path)
    return os.fsdecode(answer.spans[0])
