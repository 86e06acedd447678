"""A driver of a virtio file system for the tests: one FUSE request, one answer.

Source: Linux, include/uapi/linux/fuse.h.
"""

import stat
from pathlib import Path
from typing import NamedTuple

from tests.unit.devices.virtio.driver import Driver
from understudy.backends.folder import Folder
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs import REQUEST
from understudy.devices.virtio.fs_messages import Op

ROOT = 1
ROOM = 1 << 13


class There(NamedTuple):
    """What the driver is told of a name."""

    node: int
    size: int
    mode: int
    uid: int


class FuseDriver(Driver):
    """One whose device has this folder."""

    def __init__(self, path: Path, *, is_writable: bool = False) -> None:
        self.folder = Folder(path, is_writable=is_writable)
        super().__init__("virtio_fs", folder=self.folder)
        self.start()
        self.unique = 0

    def ask(
        self, op: int, node: int = ROOT, body: bytes = b"", room: int = ROOM
    ) -> tuple[int, bytes]:
        """The errno, and what came behind the header."""
        self.unique += 1
        header = fuse.IN_HEADER.pack(
            fuse.IN_HEADER.size + len(body), op, self.unique, node, 0, 0, 0, 0, 0
        )
        answer = self.request(REQUEST, header + body, fuse.OUT_HEADER.size + room)
        size, error, unique = fuse.OUT_HEADER.unpack_from(answer)
        assert (size, unique) == (len(answer), self.unique)
        return -error, answer[fuse.OUT_HEADER.size :]

    def wants(self, op: int, node: int = ROOT, body: bytes = b"", room: int = ROOM) -> bytes:
        """The same, of what is to be answered well."""
        error, data = self.ask(op, node, body, room)
        assert error == 0, (op, error)
        return data

    def look(self, *names: str) -> There:
        """Walk from the top."""
        found = There(ROOT, 0, stat.S_IFDIR, 0)
        for name in names:
            data = self.wants(Op.LOOKUP, found.node, name.encode() + b"\0")
            number = fuse.ENTRY.unpack_from(data)[0]
            row = fuse.ATTR.unpack_from(data, fuse.ENTRY.size)
            found = There(number, row[1], row[9], row[11])
        return found

    def open(self, node: int, flags: int = 0, op: Op = Op.OPEN) -> int:
        """The number of what is open then."""
        return int(fuse.OPEN_OUT.unpack(self.wants(op, node, fuse.OPEN_IN.pack(flags, 0)))[0])

    def read(self, handle: int, offset: int, size: int, node: int = ROOT) -> bytes:
        """From an open file."""
        body = fuse.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
        return self.wants(Op.READ, node, body, max(size, ROOM))

    def write(self, handle: int, offset: int, data: bytes, node: int = ROOT) -> tuple[int, bytes]:
        """To an open file."""
        body = fuse.READ_IN.pack(handle, offset, len(data), 0, 0, 0, 0) + data
        return self.ask(Op.WRITE, node, body)

    def close(self) -> None:
        """The board is gone, and the folder with it."""
        self.board.close()
