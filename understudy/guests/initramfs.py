"""An initramfs of busybox, made in Python: the user land of the built-in Linux guests.

The archive is a `newc` cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
What runs in it stands in the folder rootfs/ beside this file.
Invariants: the same inputs give the same bytes (no times, inode numbers by order); nothing of
the computer it was made on gets in.
"""

import gzip as gzip_format
import re
import stat
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

from understudy.guests import agent_program
from understudy.guests.entry import GuestError

PROMPT = b"understudy# "  # what the console's shell prints when it waits for a command

DIRECTORIES = ("bin", "dev", "etc", "lib", "lib64", "mnt", "proc", "root", "run", "sbin", "sys",
               "tmp", "usr", "usr/bin", "usr/sbin", "var", "var/tmp")  # fmt: skip
ETC = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": b"127.0.0.1 localhost understudy\n",
}
OURS = {"init": "init", "sbin/console": "console"}


class Node(NamedTuple):
    """One entry of the archive."""

    mode: int  # type and permissions, as in st_mode
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


Extra = bytes | tuple[bytes, int]  # contents, or contents and permissions


def build(busybox: bytes, extra: Mapping[str, Extra] | None = None, *, gzip: bool = False) -> bytes:
    """The archive.  `extra` maps paths to contents (mode 0755) or to (contents, mode).

    Leaving it uncompressed (the default) boots faster: the guest has less to do.
    """
    if not busybox.startswith(b"\x7fELF"):
        raise GuestError("busybox is no ELF program")
    nodes = {name: Node(stat.S_IFDIR | 0o755) for name in DIRECTORIES}
    nodes["tmp"] = nodes["var/tmp"] = Node(stat.S_IFDIR | 0o1777)
    nodes["dev/console"] = Node(stat.S_IFCHR | 0o600, device=(5, 1))
    nodes["dev/null"] = Node(stat.S_IFCHR | 0o666, device=(1, 3))
    nodes["bin/busybox"] = Node(stat.S_IFREG | 0o755, busybox)
    for applet in applets(busybox):
        if applet != "busybox":
            nodes[f"bin/{applet}"] = Node(stat.S_IFLNK | 0o777, b"busybox")
    for name, text in ETC.items():
        nodes[name] = Node(stat.S_IFREG | 0o644, text)
    ours = resources.files(__package__) / "rootfs"
    nodes["etc/profile"] = Node(stat.S_IFREG | 0o644, (ours / "profile").read_bytes())
    for name, source in OURS.items():
        nodes[name] = Node(stat.S_IFREG | 0o755, (ours / source).read_bytes())
    nodes["sbin/agent"] = Node(stat.S_IFREG | 0o755, agent_program.image())
    for name, content in (extra or {}).items():
        data, mode = content if isinstance(content, tuple) else (content, 0o755)
        _add_with_parents(nodes, name.strip("/"), Node(stat.S_IFREG | mode, data))
    archive = cpio(nodes)
    return gzip_format.compress(archive, mtime=0) if gzip else archive


def cpio(nodes: Mapping[str, Node]) -> bytes:
    """A newc archive of the nodes, parents before children."""
    pieces = []
    order = sorted(nodes.items(), key=lambda item: item[0].split("/"))
    for inode, (name, node) in enumerate([*order, ("TRAILER!!!", Node(0))], start=1):
        path = name.encode() + b"\0"
        fields = (
            inode if node.mode else 0,
            node.mode,
            0,  # uid
            0,  # gid
            1,  # links
            0,  # mtime
            len(node.data),
            0,  # device that holds the file
            0,
            *node.device,
            len(path),
            0,  # checksum, not used by newc
        )
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        pieces += [head, b"\0" * (-len(head) % 4), node.data, b"\0" * (-len(node.data) % 4)]
    archive = b"".join(pieces)
    return archive + b"\0" * (-len(archive) % 512)


def applets(busybox: bytes) -> list[str]:
    """The commands a busybox program offers: its table of names, zero-terminated and sorted."""
    table = re.search(rb"\0(\[\0\[\[\0(?:[a-z0-9][a-z0-9_.+-]*\0)+)", busybox)
    names = table.group(1).rstrip(b"\0").split(b"\0") if table else []
    if b"sh" not in names or b"mount" not in names:
        raise GuestError("busybox lists no shell among its commands: is it busybox-static?")
    return [name.decode() for name in names]


def _add_with_parents(nodes: dict[str, Node], name: str, node: Node) -> None:
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts):
        raise GuestError(f"{name!r} is no path for a file in the initramfs")
    for depth in range(1, len(parts)):
        nodes.setdefault("/".join(parts[:depth]), Node(stat.S_IFDIR | 0o755))
    nodes[name] = node
