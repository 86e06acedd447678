"""The initramfs of the guests: a cpio archive of the "newc" format.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
Invariant: the same tree gives the same bytes, so that both guests boot the same thing.
"""

import stat
from pathlib import Path

DEVICE_CONSOLE = (5, 1)


def entry(
    name: str, mode: int, data: bytes = b"", inode: int = 0, device: tuple[int, int] = (0, 0)
) -> bytes:
    """One member: a header of thirteen fields in hexadecimal, its name, its contents, padded."""
    path = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(data)


def archive(root: Path) -> bytes:
    """Everything below `root`, parents first, with a console for the kernel to open."""
    members = [entry("dev", stat.S_IFDIR | 0o755)]
    members.append(entry("dev/console", stat.S_IFCHR | 0o600, device=DEVICE_CONSOLE))
    for inode, path in enumerate(sorted(root.rglob("*")), start=2):
        name, mode = str(path.relative_to(root)), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            members.append(entry(name, stat.S_IFLNK | 0o777, bytes(path.readlink()), inode))
        elif stat.S_ISDIR(mode):
            members.append(entry(name, stat.S_IFDIR | 0o755, inode=inode))
        else:
            members.append(entry(name, stat.S_IFREG | 0o755, path.read_bytes(), inode))
    members.append(entry("TRAILER!!!", 0))
    return b"".join(members)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
