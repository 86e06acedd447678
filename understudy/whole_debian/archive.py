"""Packages and files of ours as one tar archive, which a VM reads from a disk.

Source: tar(5); deb(5).  Debian's merged /usr: what packages have in /bin, /sbin and /lib lies in
/usr, and these are links.
Invariants: owners and times are those in the packages; the same inputs give the same bytes.
"""

import io
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from understudy.guests import deb
from understudy.guests.initramfs import Node
from understudy.guests.packages import complete

MERGED: Final = ("bin", "lib", "lib64", "sbin")
PACKAGES: Final = "var/cache/understudy"
SECTOR: Final = 512


def write(
    file: Path, base: Iterable[Path], packages: Iterable[Path], ours: Mapping[str, Node]
) -> None:
    """Write the archive.

    base: packages whose files lie in it as they will in the system, so that dpkg can run there;
    packages: those that dpkg is to unpack; ours: files, by their paths.
    """
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        seen: set[str] = set()
        for package in base:
            if not seen:
                _merge(archive, seen)
            _spread(archive, package, seen)
        for name, node in sorted(complete(dict(ours)).items()):
            if name not in seen:
                _put(archive, name, node)
        for package in packages:
            node = Node(stat.S_IFREG | 0o644, deb.unpacked(package))
            _put(archive, f"{PACKAGES}/{package.name}", node)
    with file.open("ab") as end:
        end.truncate(-(-end.tell() // SECTOR) * SECTOR)


def _merge(archive: tarfile.TarFile, seen: set[str]) -> None:
    for name in ("usr", *(f"usr/{name}" for name in MERGED)):
        _put(archive, name, Node(stat.S_IFDIR | 0o755))
        seen.add(name)
    for name in MERGED:
        _put(archive, name, Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode()))
        seen.add(name)


def _spread(archive: tarfile.TarFile, package: Path, seen: set[str]) -> None:
    """The files of a package; folders once."""
    with deb.opened(package) as files:
        for member in files:
            member.name = _merged(member.name)
            if member.name == "." or (member.isdir() and member.name in seen):
                continue
            if member.name in MERGED:
                continue  # base-files has the links, too
            if member.islnk():
                member.linkname = _merged(member.linkname)
            member.uname = member.gname = ""
            seen.add(member.name)
            archive.addfile(member, files.extractfile(member) if member.isfile() else None)


def _merged(name: str) -> str:
    path = PurePosixPath(name)
    return str(
        PurePosixPath("usr", path) if len(path.parts) > 1 and path.parts[0] in MERGED else path
    )


def _put(archive: tarfile.TarFile, name: str, node: Node) -> None:
    """A file, folder or link of ours: root's, without a time."""
    entry = tarfile.TarInfo(name)
    entry.mode = stat.S_IMODE(node.mode)
    if stat.S_ISDIR(node.mode):
        entry.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(node.mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, node.data.decode()
    else:
        entry.size = len(node.data)
    archive.addfile(entry, io.BytesIO(node.data) if entry.size else None)
