"""Files as they lie one layer over the other, and what is left of them as a tar archive.

Source: tar(5); the OCI Image Format Specification, "Image Layer Filesystem Changeset", for the
names that take away what is below.
Invariants: no name leads out of the tree; a hard link is one in the archive, too, as long as both
names are left; owners, modes and times are those that came; the same layers give the same bytes.
"""

import copy
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from understudy.guests.entry import GuestError

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"
MOST_NAME: Final = 4096  # characters: Linux's PATH_MAX


@dataclass(frozen=True, eq=False)
class Content:
    """What is in a file; two names of one file have the same one."""

    size: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Node:
    """A file, a folder, a link or a device."""

    info: tarfile.TarInfo
    content: Content | None = None


class Tree:
    """Layers that were put one over the other, which may take `most` bytes together."""

    def __init__(self, most: int) -> None:
        self.nodes: dict[str, Node] = {}
        self.most = self.left = most

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(node.content.size for node in self.nodes.values() if node.content)

    def take(self, size: int) -> None:
        """So many bytes more for a layer.  GuestError if they are too many."""
        if size > self.left:
            raise GuestError(f"it unpacks to more than {self.most >> 30} GiB")
        self.left -= size

    def put(self, name: str, info: tarfile.TarInfo, content: Content | None = None) -> None:
        """A file in the place of whatever has its name."""
        info = copy.copy(info)
        info.name, info.uname, info.gname, info.pax_headers = name, "", "", {}
        info.mtime = int(info.mtime)
        self.nodes[name] = Node(info, content)

    def lay(self, layer: tarfile.TarFile) -> None:
        """One more layer, which stays open as long as this is used.

        GuestError for names, links and sizes that cannot be.
        """
        members = [(named(one.name), one) for one in layer]
        self._uncover(members)
        members = [
            (name, info)
            for name, info in members
            if name and not name.rpartition("/")[2].startswith(WHITEOUT)
        ]
        put, covered = {}, {}  # when in this layer, by name
        for when, (name, info) in enumerate(members):
            put[name] = when
            if self._covers(name, info):
                covered[name] = when
            if info.islnk():
                target = self.nodes.get(named(info.linkname))
                if target is None or target.content is None:
                    raise GuestError(f"{name} is a link to {info.linkname}, which is no file there")
                self.put(name, target.info, target.content)
            elif info.isreg():
                if info.size < 0:
                    raise GuestError(f"{name} has a size of {info.size} bytes")
                self.take(info.size)
                self.put(name, info, Content(info.size, _reader(layer, info)))
            elif info.isdir() or info.issym() or info.isdev():
                self.put(name, info)
            else:
                raise GuestError(f"{name} is of a kind that no file system here has")
        for name, when in put.items():
            for folder in _above(name):
                node = self.nodes.get(folder)
                if covered.get(folder, -1) > when:
                    del self.nodes[name]
                    break
                if node and not (node.info.isdir() or node.info.issym()):
                    raise GuestError(f"{name} is in {folder}, which is no folder")

    def _uncover(self, members: list[tuple[str, tarfile.TarInfo]]) -> None:
        """Drop what a layer takes away of those below, wherever in it that is said.

        One look at each file, however much goes.
        """
        gone, emptied = set(), set()
        for name, info in members:
            folder, _, last = name.rpartition("/")
            if last == OPAQUE:
                emptied.add(folder)
            elif last.startswith(WHITEOUT):
                gone.add(f"{folder}/{last[len(WHITEOUT) :]}".strip("/"))
            elif name and self._covers(name, info):
                emptied.add(name)
        emptied |= gone
        self.nodes = {
            name: node
            for name, node in self.nodes.items()
            if name not in gone and emptied.isdisjoint(_above(name))
        }

    def _covers(self, name: str, info: tarfile.TarInfo) -> bool:
        """Whether what is below a name goes if this comes there.

        Not for a link in the place of a link: what is below it is in the folder that it leads to.
        """
        old = self.nodes.get(name)
        return not (info.isdir() or (info.issym() and old is not None and old.info.issym()))

    def write(self, file: Path) -> None:
        """All that is left, as an archive.

        OSError if it cannot be written, or a file read; GuestError if a file's data or numbers
        cannot be.
        """
        written: dict[Content, str] = {}
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
            for name, node in self.nodes.items():
                info = copy.copy(node.info)
                info.name = name
                if node.content is None:
                    info.size = 0
                    _add(archive, info)
                elif node.content in written:
                    info.type, info.linkname = tarfile.LNKTYPE, written[node.content]
                    info.size = 0
                    _add(archive, info)
                else:
                    written[node.content] = name
                    info.type, info.linkname, info.size = tarfile.REGTYPE, "", node.content.size
                    with node.content.open() as data:
                        _add(archive, info, data)


def named(name: str) -> str:
    """A name in an archive as it is in the tree; empty for its root.  GuestError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise GuestError(f"{name!r} leads out of the file system")
    if len(name) > MOST_NAME:
        raise GuestError(f"{name[:80]!r}… is longer than a name may be")
    return "/".join(parts)


def _above(name: str) -> Iterator[str]:
    """The folders that a name is in, up to the root, whose name is empty."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _add(archive: tarfile.TarFile, info: tarfile.TarInfo, data: IO[bytes] | None = None) -> None:
    try:
        archive.addfile(info, data)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise GuestError(f"{info.name}: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise GuestError(f"{info.name}: {error}") from None  # `tarfile` says so of missing data


def _reader(layer: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        data = layer.extractfile(info)
        assert data is not None
        return data

    return opened
