"""Debian packages inside a guest: each, with all it depends on, as a piece of the initramfs.

What: downloads a package and its dependencies, unpacks them into one tree, keeps that as a cpio
archive; a guest's initramfs is busybox's archive and these after it.
Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst (archives in a row), and
Debian Policy, "Package" (what a name may be).
Invariants: nothing is installed on the computer; packages are unpacked and no script of theirs
runs, so those that set themselves up in one (alternatives, users, caches) are not set up.
"""

import re
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from understudy.guests import deb, debian, initramfs
from understudy.guests.apt import Apt, Progress
from understudy.guests.cache import Cache, explained
from understudy.guests.entry import GuestError
from understudy.guests.initramfs import Node

NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
DOCUMENTATION = tuple(
    f"usr/share/{folder}/" for folder in ("bug", "doc", "info", "lintian", "locale", "man")
)
TREE = "tree.cpio"


def with_packages(
    ramdisk: Path,
    names: Iterable[str],
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
    architecture: str = "amd64",
) -> Path:
    """An initramfs with these packages added to what is in `ramdisk`; or a GuestError."""
    cache = cache or Cache()
    pieces = [ramdisk.read_bytes()]
    pieces += [tree(name, progress, cache, architecture).read_bytes() for name in names]
    archive = b"".join(pieces)
    return cache.keep("initramfs", ".cpio", archive)


def tree(
    name: str,
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
    architecture: str = "amd64",
) -> Path:
    """The cpio archive of a package and all it needs, from the cache or fetched into it."""
    if not NAME.fullmatch(name):
        raise GuestError(
            f"{name!r} is no name of a Debian package: expected small letters, digits and +.-"
        )
    cache = cache or Cache()
    item = f"package-{name}{debian.suffix(architecture)}"
    files = cache.find(item)
    if files is None:
        with cache.lock():
            files = cache.find(item)  # another process may have been quicker
            if files is None:
                _fetch(cache, item, name, architecture, progress)
                files = cache.find(item)
    if files is None or TREE not in files:
        raise GuestError(f"the cached {item} is not as expected: remove {cache.folder(item)}")
    return files[TREE]


def _fetch(cache: Cache, item: str, name: str, architecture: str, progress: Progress) -> None:
    apt = Apt(cache.root / f"apt{debian.suffix(architecture)}", architecture)
    apt.update(progress)
    if name not in apt.names(name):
        if apt.trouble is not None:
            raise apt.trouble
        suites = ", ".join(apt.suites())
        raise GuestError(
            f"the computer's package sources ({suites}) have no package {name} "
            f"for {architecture}: look for its name with `apt-cache search`"
        )
    with explained(cache.root), tempfile.TemporaryDirectory(dir=cache.root, prefix=".get-") as work:
        archives = apt.download_with_needs([name], Path(work), progress)
        progress(f"Unpacking {len(archives)} packages", None)
        nodes: dict[str, Node] = {}
        for archive in archives:
            nodes |= deb.tree(archive, DOCUMENTATION)
        files = (path.name.replace("%3a", ":").split("_") for path in archives)
        versions = {package: version for package, version, _ in files}
    about = {
        "package": name,
        "version": versions[name],
        "needs": ", ".join(f"{needed} {version}" for needed, version in sorted(versions.items())),
    }
    cache.store(item, {TREE: initramfs.cpio(complete(nodes))}, about)
    progress(f"Fetched {name}", 1.0)


def complete(nodes: dict[str, Node]) -> dict[str, Node]:
    """The tree with every parent folder, and the loader of programs where they look for it.

    Where /lib64 is a link to /usr/lib64 packages have files in the latter alone; the guest's
    /lib64 is a folder.
    """
    whole = dict(nodes)
    for name in nodes:
        top, _, rest = name.partition("/")
        inside = rest.partition("/")[2]
        if top == "usr" and rest.startswith("lib64/") and "/" not in inside:
            whole.setdefault(f"lib64/{inside}", Node(stat.S_IFLNK | 0o777, f"/{name}".encode()))
    for name in list(whole):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            whole.setdefault("/".join(parts[:depth]), Node(stat.S_IFDIR | 0o755))
    return whole
