"""Files as they lie one layer over the other, and what is left of them as a tar archive.

Source: tar(5); the OCI Image Format Specification, "Image Layer Filesystem Changeset", for the
names that take away what is below.
Invariants: no name leads out of the tree; a hard link is one in the archive, too, as long as both
names are left; owners, modes and times are those that came; the same layers give the same bytes.
"""

import copy
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from understudy.guests.entry import GuestError

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"


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
    """Layers that were put one over the other."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(node.content.size for node in self.nodes.values() if node.content)

    def put(self, name: str, info: tarfile.TarInfo, content: Content | None = None) -> None:
        """A file in the place of whatever has its name; a folder keeps what is in it."""
        info = copy.copy(info)
        info.name, info.uname, info.gname, info.pax_headers = name, "", "", {}
        info.mtime = int(info.mtime)
        old = self.nodes.get(name)
        if old is not None and old.info.isdir() and not info.isdir():
            self.remove(name)
        self.nodes[name] = Node(info, content)

    def remove(self, name: str) -> None:
        """That, and all that is in it."""
        self.nodes.pop(name, None)
        self.empty(name)

    def empty(self, name: str) -> None:
        """All that is in a folder; in the whole tree for no name."""
        inside = f"{name}/" if name else ""
        for other in [other for other in self.nodes if other.startswith(inside)]:
            del self.nodes[other]

    def lay(self, layer: tarfile.TarFile) -> None:
        """One more layer, which stays open as long as this is used.

        GuestError for names and links that cannot be.
        """
        members = [(named(one.name), one) for one in layer]
        for name, _ in members:  # what goes is below this layer, wherever that is said in it
            folder, _, last = name.rpartition("/")
            if last == OPAQUE:
                self.empty(folder)
            elif last.startswith(WHITEOUT):
                self.remove(f"{folder}/{last[len(WHITEOUT) :]}".strip("/"))
        for name, info in members:
            if not name or name.rpartition("/")[2].startswith(WHITEOUT):
                continue
            if info.islnk():
                target = self.nodes.get(named(info.linkname))
                if target is None or target.content is None:
                    raise GuestError(f"{name} is a link to {info.linkname}, which is no file there")
                self.put(name, target.info, target.content)
            elif info.isreg():
                self.put(name, info, Content(info.size, _reader(layer, info)))
            elif info.isdir() or info.issym() or info.isdev():
                self.put(name, info)
            else:
                raise GuestError(f"{name} is of a kind that no file system here has")

    def write(self, file: Path) -> None:
        """All that is left, as an archive.  OSError if it cannot be written, or a file read."""
        written: dict[Content, str] = {}
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
            for name, node in self.nodes.items():
                info = copy.copy(node.info)
                info.name = name
                if node.content is None:
                    archive.addfile(info)
                elif node.content in written:
                    info.type, info.linkname = tarfile.LNKTYPE, written[node.content]
                    info.size = 0
                    archive.addfile(info)
                else:
                    written[node.content] = name
                    info.type, info.linkname, info.size = tarfile.REGTYPE, "", node.content.size
                    with node.content.open() as data:
                        archive.addfile(info, data)


def named(name: str) -> str:
    """A name in an archive as it is in the tree; empty for its root.  GuestError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise GuestError(f"{name!r} leads out of the file system")
    return "/".join(parts)


def _reader(layer: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        data = layer.extractfile(info)
        assert data is not None
        return data

    return opened
