"""The initramfs of a system whose root file system is on a virtio disk.

What: busybox, the drivers of virtio disks and of ext4 out of the kernel's own package, and a
script: rootfs/init-on-disk, which mounts what `root=` says and goes on there, for a whole Debian;
rootfs/init-of-disk, which goes on in whatever is on the first disk, and brings the agent with it.
Source: Linux, Documentation/filesystems/ramfs-rootfs-initramfs.rst; switch_root(8).
Invariant: the same package and busybox give the same bytes.
"""

import stat
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Final

from understudy.guests import initramfs
from understudy.guests.initramfs import Node
from understudy.guests.modules import drivers
from understudy.guests.packages import complete

INSERTED: Final = ("virtio_pci", "virtio_blk", "ext4")

Chosen = Callable[[Callable[[str], bool]], Iterable[tuple[str, bytes]]]
"""Gives the files of a package whose paths are chosen, with what is in them."""


def build(busybox: bytes, chosen: Chosen) -> bytes:
    """The archive; `chosen` reads the kernel's package.  GuestError if it lacks a driver."""
    script = (resources.files(__package__) / "rootfs" / "init-on-disk").read_bytes()
    plain = initramfs.build(busybox, {"init": script})
    more = drivers(chosen, INSERTED) | {"init": Node(stat.S_IFREG | 0o755, script)}
    return plain + initramfs.cpio(complete(more))


def entering() -> bytes:
    """An archive that goes behind that of a guest with drivers: its root is on its first disk."""
    ours = resources.files(__package__) / "rootfs"
    nodes = {
        "init": Node(stat.S_IFREG | 0o755, (ours / "init-of-disk").read_bytes()),
        "sbin/without-init": Node(stat.S_IFREG | 0o644, (ours / "without-init").read_bytes()),
    }
    return initramfs.cpio(complete(nodes))
