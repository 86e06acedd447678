"""What a disk would start by itself: the kernel, initrd and command line that are on it.

A boot loader finds its configuration in one of the disk's file systems; so is it done here, and
nothing of the boot loader runs.  No root, no mount.

Source: ours; the file systems by the libraries ext4-view and fatfs (`understudy._images`).
Invariants: nothing is written; what is read has a bound; every failure is a GuestError of one line.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from understudy.backends.medium import Medium
from understudy.guests import boot_entries, payload
from understudy.guests.boot_entries import BootEntry
from understudy.guests.entry import GuestError
from understudy.guests.partitions import Extent, extents

if TYPE_CHECKING:
    from understudy._images import Ext4, Fat

MOST_TEXT: Final = 1 << 20  # bytes of a file of the configuration
MOST_ENTRIES: Final = 1000  # files of it
KINDS: Final = (
    (1080, b"\x53\xef", "ext4"),
    (82, b"FAT32", "FAT"), (54, b"FAT16", "FAT"), (54, b"FAT12", "FAT"),
    (0, b"XFSB", "xfs"), (65600, b"_BHRfS_M", "btrfs"), (0, b"LUKS", "LUKS"), (3, b"NTFS", "NTFS"),
    (512, b"LABELONE", "LVM"), (0, b"hsqs", "squashfs"), (32769, b"CD001", "ISO 9660"),
)  # fmt: skip
"""How file systems begin: where, with what, and their names."""
READABLE: Final = ("ext4", "FAT")
OWN: Final = "say --kernel FILE (and --initrd, --append)"


class Found(NamedTuple):
    """What is to be started."""

    kernel: bytes
    initrd: bytes | None
    append: str


def read(disk: Medium, what: str) -> Found:
    """What the disk would start; GuestError if that cannot be found out."""
    seen: list[str] = []
    for extent in extents(disk):
        kind = _kind(disk, extent)
        if kind is not None and kind not in READABLE:
            seen.append(kind)
        if kind not in READABLE:
            continue
        try:
            files = _files(disk, extent, kind)
            entry = _entry(files)
            if entry is None:
                seen.append(f"{kind} without a boot loader's configuration")
                continue
            return _found(files, entry, what)
        except FileNotFoundError as error:
            raise GuestError(
                f"{what}: its boot loader starts a file that is not there: {error}"
            ) from None
        except OSError as error:
            raise GuestError(f"{what}: its file system cannot be read: {error}") from None
    if not seen:
        raise GuestError(f"{what} has no file system that is known here, to boot from: {OWN}")
    names = ", ".join(dict.fromkeys(seen))
    raise GuestError(
        f"{what} has nothing to boot from that can be read here (found: {names}; expected ext4 "
        f"or FAT with the configuration of extlinux, GRUB or the Boot Loader Specification): {OWN}"
    )


def file_on(disk: Medium, path: str, most: int) -> bytes:
    """A file of the first ext4 on the disk, of at most so many bytes; GuestError."""
    for extent in extents(disk):
        if _kind(disk, extent) == "ext4":
            try:
                return _files(disk, extent, "ext4").read(path, most)
            except (OSError, ValueError) as error:
                raise GuestError(f"{path} on the disk cannot be read: {error}") from None
    raise GuestError(f"no ext4 on the disk, in which {path} could be")


def _kind(disk: Medium, extent: Extent) -> str | None:
    """The name of a file system."""

    def has(at: int, magic: bytes) -> bool:
        inside = at + len(magic) <= extent.length
        return inside and disk.read(extent.start + at, len(magic)) == magic

    return next((name for at, magic, name in KINDS if has(at, magic)), None)


def _files(disk: Medium, extent: Extent, kind: str) -> "Ext4 | Fat":
    try:
        from understudy._images import Ext4, Fat
    except ImportError:
        raise GuestError(
            "this installation of understudy cannot look into disks (`make setup` compiles what "
            f"is missing): {OWN}"
        ) from None

    def read(offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= extent.length:
            raise OSError("the file system is larger than its disk")
        return disk.read(extent.start + offset, length)

    return Fat(read, extent.length) if kind == "FAT" else Ext4(read)


def _entry(files: "Ext4 | Fat") -> BootEntry | None:
    """What the first configuration in a file system says that says anything."""
    for top in ("/boot", ""):
        for look in (_extlinux, _specified, _grub):
            entry = look(files, top)
            if entry is not None:
                return entry
    return None


def _extlinux(files: "Ext4 | Fat", top: str) -> BootEntry | None:
    folder = f"{top}/extlinux"
    text = _text(files, f"{folder}/extlinux.conf")
    return None if text is None else boot_entries.extlinux(text, folder)


def _specified(files: "Ext4 | Fat", top: str) -> BootEntry | None:
    folder = f"{top}/loader/entries"
    try:
        names = [name for name in files.list(folder) if name.endswith(".conf")][:MOST_ENTRIES]
    except FileNotFoundError:
        return None
    texts = {name: _text(files, f"{folder}/{name}") or "" for name in names}
    return boot_entries.specified(texts, _text(files, f"{top}/loader/loader.conf") or "")


def _grub(files: "Ext4 | Fat", top: str) -> BootEntry | None:
    for name in ("grub", "grub2"):
        text = _text(files, f"{top}/{name}/grub.cfg")
        entry = None if text is None else boot_entries.grub(text)
        if entry is not None:
            return entry
    return None


def _text(files: "Ext4 | Fat", path: str) -> str | None:
    try:
        return files.read(path, MOST_TEXT).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: {error}") from None


def _found(files: "Ext4 | Fat", entry: BootEntry, what: str) -> Found:
    """The files of an entry: of the kernel at most as many bytes as of all initrds."""

    def whole(path: str, most: int) -> bytes:
        try:
            return files.read(path if path.startswith("/") else f"/{path}", most)
        except FileNotFoundError:
            raise FileNotFoundError(path) from None
        except ValueError as error:
            raise GuestError(f"{what}: {error}") from None

    initrds: list[bytes] = []
    left = payload.LIMIT
    for path in entry.initrds:
        initrds.append(whole(path, left))
        left -= len(initrds[-1])
    kernel = whole(entry.kernel, payload.LIMIT)
    return Found(kernel, b"".join(_padded(initrds)) or None, entry.append)


def _padded(archives: list[bytes]) -> Iterator[bytes]:
    """Archives in a row begin at multiples of four."""
    for data in archives:
        yield data + bytes(-len(data) % 4)
