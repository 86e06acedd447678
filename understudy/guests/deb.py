"""Debian packages, read without any tool: an `ar` archive with a tar archive in it.

Source: deb(5).
"""

import io
import lzma
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import zstandard

from understudy.guests.entry import GuestError
from understudy.guests.initramfs import Node

AR_MAGIC = b"!<arch>\n"


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


def tree(package: Path, left_out: tuple[str, ...] = ()) -> dict[str, Node]:
    """All files, folders and symbolic links by path, but those under the `left_out` prefixes."""
    nodes: dict[str, Node] = {}
    with _unharmed(package), _data(package.read_bytes()) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            name = str(path)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name} lies outside of it")
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
    return nodes


@contextmanager
def _unharmed(package: Path) -> Iterator[None]:
    """What goes wrong in reading a package means that it is damaged."""
    try:
        yield
    except (
        EOFError,
        ValueError,
        lzma.LZMAError,
        tarfile.TarError,
        zlib.error,
        zstandard.ZstdError,
    ) as error:
        raise GuestError(f"the package {package.name} is damaged: {error}") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return stream.read() if stream else b""


def _data(package: bytes) -> tarfile.TarFile:
    """The tar archive with the package's files, as a stream."""
    if not package.startswith(AR_MAGIC):
        raise ValueError("it is no ar archive")
    at = len(AR_MAGIC)
    while at + 60 <= len(package):
        name = package[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(package[at + 48 : at + 58])
        body = package[at + 60 : at + 60 + size]
        if len(body) != size or size < 0:
            raise ValueError("it is truncated")
        if name == "data.tar.zst":
            reader = zstandard.ZstdDecompressor().stream_reader(body)
            return tarfile.open(fileobj=reader, mode="r|")
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(body), mode="r|*")
        at += 60 + size + (size & 1)
    raise ValueError("it has no data.tar")
