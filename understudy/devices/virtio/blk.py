"""Virtio block device: a disk.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Block Device".

Not modeled: secure erase, lifetime, zoned storage, a cache that a driver can switch off.

Invariants: a request is carried out wholly, or has a status that says not; it touches nothing
outside of the disk; data that was written before a flush is on the computer's disk when the flush
comes back, and without negotiated flushes each write is.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final

from understudy.backends.medium import Medium, Zeros
from understudy.backends.overlay import Overlay
from understudy.clock import NS_PER_SECOND
from understudy.devices.virtio.gathering import Gathering, GatheringState
from understudy.devices.virtio.pci import Postponed, VirtioPci
from understudy.devices.virtio.queue import (
    Chain,
    RingError,
    Segment,
    cut,
    length,
)
from understudy.devices.wires import Wires
from understudy.state import U62

# --- The specification ---

KIND: Final = 2
CLASS: Final = 0x010000  # mass storage, SCSI: what QEMU's has
SECTOR: Final = 512
ID_BYTES: Final = 20

SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9  # VIRTIO_BLK_F_*
MQ, DISCARD, WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14

HEADER: Final = struct.Struct("<IIQ")  # type, reserved, sector
RANGE: Final = struct.Struct("<QII")  # sector, sectors, flags
CONFIG: Final = struct.Struct("<QII4xI8xBxHIIIIIB3x")
UNMAP: Final = 1  # flag of a range


class Request(IntEnum):
    """VIRTIO_BLK_T_*."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"  # VIRTIO_BLK_S_*

# --- Ours ---

QUEUE_SIZE: Final = 256
MOST_QUEUES: Final = 16
SEGMENTS: Final = QUEUE_SIZE - 2  # the header and the status are descriptors, too
SEGMENT_BYTES: Final = 1 << 16
MOST: Final = SEGMENTS * SEGMENT_BYTES  # bytes of one request
SHORT: Final = 1 << 16  # data up to here are copied once more, to move with what is beside them
RANGES: Final = 16  # of one discard
RANGE_SECTORS: Final = 1 << 15  # of one range of zeros: the file system may have to write them
USUAL_BYTES: Final = 1 << 16
BURST_NS: Final = 10_000_000  # by so much a limit of speed may be anticipated


class Refused(Exception):
    """A request that ends with this status."""

    def __init__(self, status: bytes) -> None:
        self.status = status


@dataclass
class BlkState(GatheringState):
    """How far a limit of speed is used up."""

    free_at: U62 = 0


class Blk(Gathering, name="virtio_blk"):
    """A disk.  `medium` is its content; a disk that nobody gave one is small and empty.

    stop: called with what went wrong when the computer cannot read or write, and the request is
    tried again when the VM goes on; without it the guest sees an I/O error.
    """

    battery = ("free_at",)
    expected = MOST + SECTOR  # with what goes before the data, and the status
    state: BlkState
    switches: ClassVar[Mapping[str, int]] = {
        **VirtioPci.switches, "mq": MQ, "flush": FLUSH, "discard": DISCARD,
        "write-zeroes": WRITE_ZEROES,
    }  # fmt: skip

    def __init__(
        self,
        wires: Wires,
        *,
        medium: Medium | None = None,
        serial: str = "",
        queues: int = 1,
        rate: int = 0,
        stop: Callable[[str], None] | None = None,
    ) -> None:
        if not 1 <= queues <= MOST_QUEUES:
            raise ValueError(f"virtio_blk: {queues} queues, expected 1 to {MOST_QUEUES}")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * queues)
        self.medium = Overlay(Zeros(USUAL_BYTES)) if medium is None else medium
        self.rate = rate  # bytes a second, 0 for no limit
        self.serial, self.stop = serial.encode()[:ID_BYTES], stop
        self.offered |= SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH
        self.offered |= RO if self.medium.is_read_only else DISCARD | WRITE_ZEROES
        self.offered |= MQ if queues > 1 else 0
        self.registers = CONFIG.pack(
            self.medium.size // SECTOR, SEGMENT_BYTES, SEGMENTS, SECTOR, 0, queues,
            RANGE_SECTORS, RANGES, 1, RANGE_SECTORS, RANGES, 1,
        )  # fmt: skip
        self.state = self.power_on()

    def power_on(self) -> BlkState:
        return self.fresh(BlkState)

    def config(self) -> bytes:
        return self.registers

    # --- requests ---

    def serve(self, number: int, chain: Chain) -> int:
        _, readable, writable, _ = chain
        room, more = length(writable) - 1, length(readable) - HEADER.size
        if more < 0 or room < 0:
            raise RingError("a block request without its header or its status")
        dma = self.dma
        sent: memoryview | Sequence[Segment]
        if more <= SHORT:
            header = dma.gather(readable)
            sent = memoryview(header)[HEADER.size :]
        else:
            header = dma.gather(cut(readable, 0, HEADER.size))
            is_apart = readable[0][1] == HEADER.size  # as all drivers do it
            sent = readable[1:] if is_apart else cut(readable, HEADER.size, more)
        kind, _, sector = HEADER.unpack_from(header)
        data, status, before = b"", OK, self.moved
        self._wait()
        try:
            data = self._carry_out(kind, sector * SECTOR, sent, more, room)
        except Refused as refusal:
            status = refusal.status
        except OSError as problem:
            if self.stop is not None:
                self.stop(str(problem))
                raise Postponed from None
            status = IOERR
        if self.rate and status == OK:
            self._passed(self.moved - before)
        # "The device MUST write at least len bytes ... beginning at the first": as far as it has.
        if len(data) == room <= SHORT:
            return dma.scatter(writable, data + status)
        is_apart = writable[-1][1] == 1
        written = dma.scatter(writable[:-1] if is_apart else cut(writable, 0, room), data)
        dma.scatter(writable[-1:] if is_apart else cut(writable, room, 1), status)
        return room + 1 if written == room else written

    def _carry_out(
        self, kind: int, offset: int, sent: memoryview | Sequence[Segment], more: int, room: int
    ) -> bytes:
        """The data that the driver gets; `more` bytes are sent, `room` are wanted."""
        match kind:
            case Request.IN:
                self._check(offset, room)
                return self.medium.read(offset, room)
            case Request.OUT:
                self._write(offset, sent, more)
            case Request.FLUSH:
                self.medium.flush()
            case Request.GET_ID:
                return self.serial.ljust(ID_BYTES, b"\0")[:room]
            case Request.DISCARD if self.has(DISCARD):
                self._each(sent, more, self._discard)
            case Request.WRITE_ZEROES if self.has(WRITE_ZEROES):
                self._each(sent, more, self._zero)
            case _:
                raise Refused(UNSUPP)
        return b""

    def _wait(self) -> None:
        """Not now, if the limit of speed is used up."""
        if self.rate and (early := self.state.free_at - self.clock.now() - BURST_NS) > 0:
            raise Postponed(early)

    def _passed(self, count: int) -> None:
        free = max(self.state.free_at, self.clock.now())
        self.state.free_at = free + NS_PER_SECOND * count // self.rate

    def _sent(self, sent: memoryview | Sequence[Segment]) -> bytes | memoryview:
        """What the driver sends, wherever it is still."""
        return sent if isinstance(sent, memoryview) else self.dma.gather(sent)

    def _write(self, offset: int, sent: memoryview | Sequence[Segment], count: int) -> None:
        self._check(offset, count)
        if self.medium.is_read_only:
            raise Refused(IOERR)
        self.medium.write(offset, self._sent(sent))
        if not self.has(FLUSH):
            self.medium.flush()

    def _check(self, offset: int, count: int) -> None:
        self.moved += count
        if count % SECTOR or count > MOST or offset + count > self.medium.size:
            raise Refused(IOERR)

    # --- ranges ---

    def _each(
        self, sent: memoryview | Sequence[Segment], size: int,
        carry_out: Callable[[int, int, bool], None],
    ) -> None:  # fmt: skip
        """Do it with each of the ranges of a request, if all of them are right."""
        count, rest = divmod(size, RANGE.size)
        if rest or not 0 < count <= RANGES:
            raise Refused(IOERR)
        ranges = list(RANGE.iter_unpack(self._sent(sent)))
        for sector, sectors, flags in ranges:
            if flags & ~UNMAP:
                raise Refused(UNSUPP)
            if sectors > RANGE_SECTORS or (sector + sectors) * SECTOR > self.medium.size:
                raise Refused(IOERR)
        for sector, sectors, flags in ranges:
            self.moved += sectors * SECTOR
            carry_out(sector * SECTOR, sectors * SECTOR, bool(flags & UNMAP))

    def _discard(self, offset: int, count: int, unmap: bool) -> None:
        if unmap:
            raise Refused(UNSUPP)  # "MUST be 0" for a discard
        self.medium.discard(offset, count)

    def _zero(self, offset: int, count: int, unmap: bool) -> None:
        self.medium.zero(offset, count, may_unmap=unmap)
        if not self.has(FLUSH):
            self.medium.flush()

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        return super().save() | {"medium": self.medium.save()}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self.medium.load(saved["medium"])

    def inspect(self) -> dict[str, Any]:
        return super().save() | {"size": self.medium.size, "read-only": self.medium.is_read_only}

    def close(self) -> None:
        self.medium.close()
        super().close()
