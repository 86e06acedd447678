"""Virtio file system device: a folder of this computer, by the messages of FUSE.

The folder is served here, or by another program (`fs_daemon.py`).

Source: Virtual I/O Device (VIRTIO) Version 1.2, "File System Device"; `fs_messages.py` for FUSE.

Not modeled: the notification queue, the DAX window, locks between guests (a guest's own are its
kernel's), extended attributes, device files.

Invariants: the device reaches what its `Folder` or `Daemon` does, see there; a request ends with an
errno at the worst; what a guest has in its caches it looks at again after a second of its time; a
request counts as its work (`fs_requests.py`), however little it moves, so no ring keeps the
hypervisor.
"""

import errno
import struct
from typing import Any, Final

from understudy.backends.folder import Folder
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_daemon import Daemon
from understudy.devices.virtio.fs_requests import ANSWERS, MOST, ONE_REQUEST, Request
from understudy.devices.virtio.pci import VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, RingError, cut, length
from understudy.devices.wires import Wires

# --- The specification ---

KIND: Final = 26
CLASS: Final = 0x018000  # mass storage, other: what QEMU's has
CONFIG: Final = struct.Struct("<36sI")  # tag, num_request_queues
TAG_BYTES: Final = 36
HIGH_PRIORITY, REQUEST = 0, 1  # queues
QUEUES: Final = 2

# --- Ours ---

QUEUE_SIZE: Final = 1024
LONGEST_REQUEST: Final = MOST + (1 << 14)  # with what goes before the data
LONGEST_ANSWER: Final = MOST + fuse.OUT_HEADER.size


class Fs(VirtioPci, name="virtio_fs"):
    """A folder, which the guest finds by its tag; a device that nobody gave one has nothing."""

    expected = LONGEST_REQUEST
    state: VirtioState

    def __init__(
        self, wires: Wires, *, folder: Folder | None = None, daemon: Daemon | None = None,
        tag: str = "share",
    ) -> None:  # fmt: skip
        """`folder` is served here, `daemon` by its program; there is one of the two at most."""
        if not 1 <= len(tag.encode()) <= TAG_BYTES:
            raise ValueError(f"virtio_fs: a tag {tag!r}, expected 1 to {TAG_BYTES} bytes")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE, QUEUE_SIZE))
        self.folder, self.daemon = folder, daemon
        self.registers = CONFIG.pack(tag.encode(), 1)
        self.state = self.power_on()

    def power_on(self) -> VirtioState:
        return self.fresh(VirtioState)

    def config(self) -> bytes:
        return self.registers

    # --- requests ---

    def serve(self, number: int, chain: Chain) -> int:
        size = length(chain.readable)
        if not fuse.IN_HEADER.size <= size <= LONGEST_REQUEST:
            raise RingError(f"a FUSE request of {size} bytes")
        request = self.dma.gather(chain.readable)
        self.moved += size
        if self.daemon is not None:
            return self._handed_over(self.daemon, number, request, chain)
        _, opcode, unique, node, *_ = fuse.IN_HEADER.unpack_from(request)
        body = memoryview(request)[fuse.IN_HEADER.size :]
        room = length(chain.writable) - fuse.OUT_HEADER.size
        wish = None if self.folder is None else Request(self.folder, node, body, min(room, MOST))
        answer, problem = b"", 0
        try:
            if wish is None or opcode not in ANSWERS:
                raise OSError(errno.ENOSYS, "no such request")
            answer = ANSWERS[opcode](wish)
            if len(answer) > max(room, 0):
                raise OSError(errno.EIO, "no room for the answer")
        except OSError as error:
            problem, answer = error.errno or errno.EIO, b""
        except (struct.error, OverflowError, ValueError):  # cut off, or numbers that cannot be
            problem, answer = errno.EINVAL, b""
        if wish is not None:
            self.moved += wish.work
        if opcode in fuse.SILENT or room < 0:
            return 0
        total = fuse.OUT_HEADER.size + len(answer)
        header = fuse.OUT_HEADER.pack(total, -problem, unique)
        self.dma.scatter(cut(chain.writable, 0, len(header)), header)
        if answer:
            data = cut(chain.writable, len(header), len(answer))
            self.dma.scatter(data, answer)
        self.moved += total
        return total

    def _handed_over(self, daemon: Daemon, number: int, request: bytes, chain: Chain) -> int:
        answer = daemon.answer(number, request, length(chain.writable))
        if answer:
            self.dma.scatter(cut(chain.writable, 0, len(answer)), answer)
        self.moved += len(answer) + ONE_REQUEST
        return len(answer)

    @property
    def server(self) -> Folder | Daemon | None:
        """Whose folder it is."""
        return self.folder if self.daemon is None else self.daemon

    # --- reset, snapshots ---

    def reset(self) -> None:
        super().reset()
        if self.server is not None:
            self.server.forget_all()

    def save(self) -> dict[str, Any]:
        if self.daemon is not None:
            self.daemon.save()
        return super().save() | {"folder": None if self.folder is None else self.folder.save()}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if self.folder is not None:
            kept = saved.get("folder")
            self.folder.forget_all() if kept is None else self.folder.load(kept)
        elif self.daemon is not None:
            self.daemon.forget_all()
            if self.is_live and saved.get("folder") is not None:
                raise ValueError(
                    f"snapshot: what the guest knows of the shared folder {self.daemon.path} is "
                    "known to the server in Python alone: say server=python"
                )

    def inspect(self) -> dict[str, Any]:
        told = super().save()
        if self.server is not None:
            told |= {"path": str(self.server.path)} | self.server.counts()
        return told

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        super().close()
