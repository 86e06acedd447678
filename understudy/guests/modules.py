"""Drivers of Debian's kernels that are modules: out of the kernel's package, into an initramfs.

What a kernel needs for virtio devices and for the file systems on disks, with all that these
depend on, and the tables by which busybox's modprobe finds them.  A guest without such devices
gets none of it.

Source: modprobe(8), depmod(8): "depends" and "alias" of each module's `.modinfo` section, which
are strings "name=value", each with a zero after it.
Invariant: the modules are of the very package of the kernel that is in the cache.
"""

import lzma
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from understudy.guests import deb, debian, initramfs
from understudy.guests.apt import Progress
from understudy.guests.cache import Cache, explained
from understudy.guests.entry import GuestError
from understudy.guests.initramfs import Node
from understudy.guests.packages import TREE, complete
from understudy.guests.unpack import UnpackError

INSERTED: Final = ("virtio_pci", "virtio_blk", "virtio_rng", "virtio_console", "virtio_net")
"""Inserted before anything else runs."""
BALLOON: Final = ("virtio_balloon",)
"""Inserted after them, in a guest that has one."""
FOLDERS: Final = ("virtiofs",)
"""Inserted in a guest that shares folders, or may."""
VSOCK: Final = ("vmw_vsock_virtio_transport",)
"""The same of a socket to the host."""
AT_HAND: Final = ("ext4", "vfat", "isofs", "nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8",
                  "crc32c_generic")  # fmt: skip
"""Inserted when the kernel asks for them."""
FIRST: Final = "sbin/insert-drivers"
APPEND: Final = f"rdinit=/{FIRST}"
MODULE = re.compile(r"lib/modules/[^/]+/kernel/.*\.ko(\.xz)?")
INFORMATION = re.compile(rb"(?<=\0)(depends|alias)=([^\0]*)\0")
LARGEST: Final = 64 << 20  # bytes of one module, unpacked


def script(inserted: Iterable[str] = INSERTED) -> str:
    """What the guest's first process does."""
    return f"""\
#!/bin/busybox sh
# The first process of a guest with virtio devices: inserts their drivers, goes on with init.
/bin/busybox mount -t proc proc /proc
for name in {" ".join(inserted)}; do /bin/busybox modprobe $name 2>/dev/null; done
/bin/busybox umount /proc
exec /init
"""


class Module(NamedTuple):
    """A module as the tables of depmod have it."""

    path: str  # in the package, and in the guest but for a suffix of compression
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def with_drivers(
    guest: str,
    ramdisk: Path,
    progress: Progress = lambda text, share: None,
    cache: Cache | None = None,
    more: bytes = b"",
    inserted: tuple[str, ...] = INSERTED,
) -> Path:
    """An initramfs with the drivers added, and more; the kernel is to start with `APPEND`."""
    cache = cache or Cache()
    archive = ramdisk.read_bytes() + tree(guest, progress, cache, inserted).read_bytes() + more
    return cache.keep("initramfs", ".cpio", archive)


def tree(
    guest: str, progress: Progress, cache: Cache, inserted: tuple[str, ...] = INSERTED
) -> Path:
    """The archive with the drivers of a guest that has been fetched, from the cache or its package.

    GuestError if the package of its kernel is no longer to be had.
    """
    item = "-".join((guest, "modules", *(name for name in inserted if name not in INSERTED)))
    kernel = cache.manifest(guest)
    files = _found(cache, item, kernel, inserted)
    if files is None:
        with cache.lock():
            files = _found(cache, item, kernel, inserted)  # another process may have been quicker
            if files is None:
                _fetch(cache, item, guest, kernel, progress, inserted)
                files = _found(cache, item, kernel, inserted)
    if files is None or TREE not in files:
        raise GuestError(f"the cached {item} is not as expected: remove {cache.folder(item)}")
    return files[TREE]


def _found(
    cache: Cache, item: str, kernel: Mapping[str, str], inserted: Iterable[str]
) -> dict[str, Path] | None:
    """What is in the cache, if it belongs to this kernel and has the drivers that are wanted."""
    files = cache.find(item)
    if files is None:
        return None
    has = cache.manifest(item)
    is_right = (has.get("version"), has.get("drivers")) == (kernel.get("version"), _names(inserted))
    return files if is_right else None


def _fetch(
    cache: Cache, item: str, guest: str, kernel: Mapping[str, str], progress: Progress,
    inserted: tuple[str, ...],
) -> None:  # fmt: skip
    name, version = kernel["package"], kernel["version"]
    apt = debian.apt_for(cache, debian.PACKAGES[guest])
    apt.update(progress)
    with explained(cache.root), tempfile.TemporaryDirectory(dir=cache.root, prefix=".get-") as work:
        try:
            archive = apt.download(f"{name}={version}", Path(work), progress)
        except GuestError as error:
            raise apt.trouble or GuestError(
                f"{guest}: the drivers of its kernel ({name} {version}) cannot be fetched "
                f"({error}): remove {cache.folder(guest)}, so that a newer kernel is fetched"
            ) from None
        progress(f"Looking for drivers in {name}", None)
        nodes = drivers(lambda wanted: deb.chosen(archive, wanted), inserted)
    manifest = {"package": name, "version": version, "drivers": _names(inserted)}
    cache.store(item, {TREE: initramfs.cpio(complete(nodes))}, manifest)
    progress(f"Fetched the drivers of {guest}", 1.0)


def drivers(
    chosen: Callable[[Callable[[str], bool]], Iterable[tuple[str, bytes]]],
    inserted: tuple[str, ...] = INSERTED,
) -> dict[str, Node]:
    """Modules to be inserted and at hand, all they need, the tables, and the program to begin with.

    chosen: gives the files of a package whose paths are chosen, with what is in them.
    """
    found: dict[str, Module] = {}
    for path, content in chosen(_is_module):
        found[name_of(path)] = described(_inside(path), unpacked(path, content))
    needed: dict[str, Module] = {}
    waiting = [
        name for name in inserted + AT_HAND if name in found
    ]  # the others are in the kernel itself
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        if name not in found:
            raise GuestError(f"a driver needs the module {name}, which its package does not have")
        needed[name] = found[name]
        waiting += found[name].depends
    folders = {str(PurePosixPath(*PurePosixPath(m.path).parts[:3])) for m in needed.values()}
    if len(folders) != 1:
        raise GuestError(f"the kernel's package has drivers in {len(folders)} folders, expected 1")
    folder = folders.pop()
    nodes = {
        needed[name_of(path)].path: Node(stat.S_IFREG | 0o644, unpacked(path, content))
        for path, content in chosen(lambda path: _is_module(path) and name_of(path) in needed)
    }
    nodes[f"{folder}/modules.dep"] = Node(stat.S_IFREG | 0o644, dependencies(needed, folder))
    nodes[f"{folder}/modules.alias"] = Node(stat.S_IFREG | 0o644, aliases(needed))
    nodes[FIRST] = Node(stat.S_IFREG | 0o755, script(inserted).encode())
    nodes["sbin/modprobe"] = Node(stat.S_IFLNK | 0o777, b"/bin/busybox")
    return nodes


def _names(inserted: Iterable[str]) -> str:
    return " ".join((*inserted, *AT_HAND))


def _is_module(path: str) -> bool:
    return MODULE.fullmatch(path.removeprefix("usr/")) is not None


def _inside(path: str) -> str:
    """Where a file of the package lies in the guest."""
    return path.removeprefix("usr/").removesuffix(".xz")


def name_of(path: str) -> str:
    """A module's name: - and _ are the same in it, and mean _."""
    return PurePosixPath(path).name.removesuffix(".xz").removesuffix(".ko").replace("-", "_")


def unpacked(path: str, content: bytes) -> bytes:
    """A module as the kernel wants it."""
    if not path.endswith(".xz"):
        return content
    unpacker = lzma.LZMADecompressor(memlimit=LARGEST << 1)
    try:
        data = unpacker.decompress(content, LARGEST)
    except lzma.LZMAError as error:
        raise UnpackError(f"{path}: {error}") from None
    if not unpacker.eof:
        raise UnpackError(f"{path} does not end within {LARGEST >> 20} MiB")
    return data


def described(path: str, module: bytes) -> Module:
    """What a module says of itself."""
    depends: list[str] = []
    names: list[str] = []
    for key, value in INFORMATION.findall(module):
        text = value.decode("ascii", "replace")
        if key == b"alias":
            names.append(text)
        else:
            depends += [name.replace("-", "_") for name in text.split(",") if name]
    return Module(path, tuple(depends), tuple(names))


def dependencies(modules: Mapping[str, Module], folder: str) -> bytes:
    """The table modules.dep: each module, and what it needs, what is needed first at the end."""
    lines = []
    for name, module in sorted(modules.items()):
        order: list[str] = []
        _needs(name, modules, order)
        paths = [PurePosixPath(modules[n].path).relative_to(folder) for n in order]
        lines.append(f"{PurePosixPath(module.path).relative_to(folder)}:")
        lines[-1] += "".join(f" {path}" for path in paths)
    return ("\n".join(lines) + "\n").encode()


def _needs(name: str, modules: Mapping[str, Module], order: list[str]) -> None:
    """Append what a module needs, each after all that needs it."""
    for needed in modules[name].depends:
        if needed in order:
            order.remove(needed)
        order.append(needed)
        _needs(needed, modules, order)


def aliases(modules: Mapping[str, Module]) -> bytes:
    """The table modules.alias."""
    lines = [f"alias {a} {name}\n" for name, m in sorted(modules.items()) for a in m.aliases]
    return "".join(lines).encode()
