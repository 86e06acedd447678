"""Debian packages, read without any tool: an `ar` archive with a tar archive in it.

Source: deb(5).
Invariants: at most `LIMIT` bytes are unpacked, in steps; every failure is a GuestError.
"""

import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

from understudy.guests import payload
from understudy.guests.entry import GuestError
from understudy.guests.initramfs import Node
from understudy.guests.unpack import Plain, Reader, UnpackError, stream, unharmed

AR_MAGIC = b"!<arch>\n"
LIMIT: Final = 2 << 30  # unpacked; all of it goes into a guest's memory
MOST_FILES: Final = 500_000


def files(package: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The first file matching each pattern, by pattern ("boot/vmlinuz-*").

    Reads no further than it must: kernels come before their thousands of modules.
    """
    wanted = list(patterns)
    found: dict[str, bytes] = {}
    with _unharmed(package), _data(package.read_bytes()) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            for pattern in wanted:
                if pattern not in found and member.isfile() and path.match(pattern):
                    found[pattern] = _content(archive, member)
            if len(found) == len(wanted):
                return found
    missing = [pattern for pattern in wanted if pattern not in found]
    raise GuestError(f"the package {package.name} has no {' and no '.join(missing)}")


def chosen(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files whose paths are wanted, one after the other, with what is in them."""
    with _unharmed(package), _data(package.read_bytes()) as archive:
        for member in archive:
            name = str(PurePosixPath(member.name))
            if member.isfile() and wanted(name):
                yield name, _content(archive, member)


def tree(package: Path, left_out: tuple[str, ...] = ()) -> dict[str, Node]:
    """All files, folders and symbolic links by path, but those under the `left_out` prefixes."""
    nodes, size = dict[str, Node](), 0
    with _unharmed(package), _data(package.read_bytes()) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            name = str(path)
            if path.is_absolute() or ".." in path.parts:
                raise UnpackError(f"{name} lies outside of it")
            if name == "." or f"{name}/".startswith(left_out):
                continue
            mode = member.mode & 0o7777
            if member.isdir():
                nodes[name] = Node(stat.S_IFDIR | mode)
            elif member.issym():
                nodes[name] = Node(stat.S_IFLNK | 0o777, member.linkname.encode())
            elif member.islnk():  # to a file that came before, or that was left out
                target = nodes.get(str(PurePosixPath(member.linkname)))
                if target is not None:
                    nodes[name] = target
            elif member.isfile():
                nodes[name] = Node(stat.S_IFREG | mode, _content(archive, member))
            size += len(nodes[name].data) if name in nodes else 0
            if len(nodes) > MOST_FILES or size > LIMIT:  # links repeat what they link to
                raise UnpackError(f"it has over {MOST_FILES} files, or {LIMIT >> 20} MiB of them")
    return nodes


@contextmanager
def opened(package: Path) -> Iterator[tarfile.TarFile]:
    """The package's files as a tar archive that is read once, from its beginning."""
    with _unharmed(package), _data(package.read_bytes()) as archive:
        yield archive


def unpacked(package: Path) -> bytes:
    """The same package, with its files not compressed: dpkg has less to do."""
    with _unharmed(package):
        data = package.read_bytes()
        pieces = [AR_MAGIC]
        for name, body in _members(data):
            if name.startswith("data.tar"):
                name, body = "data.tar", _plain(body)
            head = f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(body):<10}`\n".encode()
            pieces += [head, body, b"\n" * (len(body) & 1)]
        return b"".join(pieces)


@contextmanager
def _unharmed(package: Path) -> Iterator[None]:
    """What goes wrong in reading a package means that it is damaged."""
    try:
        with unharmed():
            yield
    except UnpackError as error:
        raise GuestError(f"the package {package.name} is damaged: {error}") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return stream.read() if stream else b""


def _source(body: bytes) -> Reader:
    method = payload.compression(body)
    source = Plain(body, 0) if method is None else stream(method, body)
    if source is None:
        raise UnpackError(f"its data is packed by {method}, which is not known here")
    return Reader(source, LIMIT)


def _plain(body: bytes) -> bytes:
    return _source(body).read(LIMIT + 1)


def _members(package: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of the ar archive."""
    if not package.startswith(AR_MAGIC):
        raise UnpackError("it is no ar archive")
    at = len(AR_MAGIC)
    while at + 60 <= len(package):
        name = package[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(package[at + 48 : at + 58])
        body = package[at + 60 : at + 60 + size]
        if len(body) != size or size < 0:
            raise UnpackError("it is truncated")
        yield name, body
        at += 60 + size + (size & 1)


def _data(package: bytes) -> tarfile.TarFile:
    """The tar archive with the package's files, as a stream."""
    for name, body in _members(package):
        if name.startswith("data.tar"):
            reader: Any = _source(body)  # it only reads
            return tarfile.open(fileobj=reader, mode="r|")
    raise UnpackError("it has no data.tar")
