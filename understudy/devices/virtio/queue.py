"""A virtqueue: how a driver hands buffers to a device, and gets them back.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Virtqueues".

What is common to the two kinds of ring, `split.py` and `packed.py`.  A device sees a `Queue` alone.

Memory is asked for much at once (docs/decisions/0105-*): what is available is looked at in pieces
of `LOOK` entries, with the tables that they name, and what is given back is written by `publish`.

A driver is hostile.  Invariants: each structure in guest memory is read once, as a whole, and what
is decided is decided by that copy; a chain has at most as many descriptors as the queue, or as
`LONGEST_TABLE` in an indirect table; anything else raises `RingError`, or the memory's IndexError,
and then nothing has been taken.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from understudy.arch.address import PAGE
from understudy.machine.physical import BYTES, PhysicalMemory
from understudy.state import U8, U16, U64

# --- The specification ---


NEXT: Final = 1  # VIRTQ_DESC_F_*
WRITE: Final = 2  # the device writes, else it reads
INDIRECT: Final = 4  # the buffer is a table of descriptors
DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, and two that each ring has its way
LONGEST_TABLE: Final = 1024  # ours: descriptors in an indirect table
LONGEST_TABLE_BYTES: Final = LONGEST_TABLE * DESCRIPTOR.size
LOOK: Final = 32  # ours: entries of the ring that are looked at in one go
MOST_LOOKED_AT: Final = LOOK * LONGEST_TABLE_BYTES  # in one go, beside the ring
END: Final = 1 << 64  # of all addresses
LONGEST_CHAIN: Final = 1 << 32  # bytes of all its buffers, "Descriptor Table": 2^32 at most
NO_VECTOR: Final = 0xFFFF

INDIRECT_DESC: Final = 1 << 28  # VIRTIO_F_*, the features that concern queues
EVENT_IDX: Final = 1 << 29
RING_PACKED: Final = 1 << 34


Descriptor = tuple[int, int, int, int]


Segment = tuple[int, int]
"""A run of guest-physical addresses: where it begins, and its bytes."""


class RingError(Exception):
    """A driver that does what it must not: the device needs a reset."""


class Chain(NamedTuple):
    """One buffer of the driver: what the device reads, and after it what the device writes."""

    head: int  # by which the driver knows it
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]
    slots: int = 1  # entries of the ring that it takes


def length(segments: Sequence[Segment]) -> int:
    """Bytes of them all."""
    return sum(map(BYTES, segments))


def work(chain: Chain, most: int) -> int:
    """What it may be to have the frames of `most` bytes each way, in bytes that could be moved."""
    done = 0
    if most:
        for runs in (chain.readable, chain.writable):  # (no calls: this is for each request)
            done += max(min(sum(map(BYTES, runs)), most), PAGE * len(runs))
    return done


def cut(segments: Sequence[Segment], start: int, count: int) -> list[Segment]:
    """The part of `count` bytes from `start` on; less if they end before."""
    parts: list[Segment] = []
    for gpa, size in segments:
        if start >= size:
            start -= size
            continue
        part = min(size - start, count)
        if part <= 0:
            break
        parts.append((gpa + start, part))
        start, count = 0, count - part
    return parts


# --- The queue ---


@dataclass
class QueueState:
    """What the driver has set of a queue, and how far the device has come."""

    size: U16 = 0
    vector: U16 = NO_VECTOR
    is_enabled: bool = False
    descriptors: U64 = 0  # "Descriptor Area"
    driver: U64 = 0  # "Driver Area"
    device: U64 = 0  # "Device Area"
    taken: U16 = 0  # the next entry that may be available, as the kind of ring counts them
    given: U16 = 0  # the next entry that is given back
    published: U16 = 0  # the entry up to which the driver has been told
    alone: U8 = 0  # kicks that were answered at once, since one was known to wait for others


class Queue:
    """One queue as a device uses it.

    It keeps nothing from one access to the next: make one whenever it is needed, and `publish` what
    was pushed.
    """

    alignment: ClassVar[tuple[int, int, int]]
    """Of the descriptor area, the driver area and the device area."""

    def __init__(self, memory: PhysicalMemory, state: QueueState, features: int) -> None:
        self.memory, self.state = memory, state
        self.has_events = bool(features & EVENT_IDX)
        self.has_indirect = bool(features & INDIRECT_DESC)
        self._looked_at = 0  # the entry from which on was looked, as they are counted
        self._may_be_more = True  # than the last look has found
        self._tables: dict[Segment, bytes] = {}  # that the last look has read
        self._is_expected = False  # the ring, to be written

    @staticmethod
    def is_size(size: int) -> bool:
        """Whether a queue may have so many entries, as far as that is the ring's business."""
        raise NotImplementedError

    def areas(self) -> tuple[int, int, int]:
        """Bytes of the descriptor area, the driver area and the device area."""
        raise NotImplementedError

    def answers(self) -> Segment:
        """Where `publish` writes."""
        raise NotImplementedError

    def pop(self) -> Chain | None:
        """The next buffer that the driver has made available, or None.

        After a None it is looked for more when the driver has been asked for kicks.
        """
        raise NotImplementedError

    def pop_or_ask(self) -> Chain | None:
        """The same; if there is none, the driver is asked for kicks."""
        chain = self.pop()
        if chain is None:
            self.ask_for_kicks()
            chain = self.pop()  # one that came before the driver could see that
        return chain

    def unpop(self, chain: Chain) -> None:
        """The buffer that was popped last, and is not pushed yet, is the next one again."""
        raise NotImplementedError

    def expect(self, chain: Chain, most: int) -> None:
        """A buffer is going to be used and given back, `most` bytes of it each way.

        See `GuestMemory.expect`.
        """
        memory, s = self.memory, self.state
        if memory.is_whole:
            return
        if not self._is_expected:
            memory.expect(((s.driver, self.areas()[1]),), END, write=False)
            memory.expect((self.answers(),), END, write=True)
            self._is_expected = True
        if most:
            memory.expect(chain.readable, most, write=False)
            memory.expect(chain.writable, most, write=True)

    def push(self, chain: Chain, written: int) -> None:
        """Give a buffer back, `written` bytes of it filled; the driver is not told yet."""
        raise NotImplementedError

    def publish(self) -> bool:
        """Tell of all that was pushed; whether the driver wants an interrupt for it."""
        raise NotImplementedError

    def ask_for_kicks(self) -> None:
        """From the next available buffer on, the driver is to notify the device."""
        raise NotImplementedError

    def let_kick(self, wanted: bool) -> None:
        """Whether the driver is to notify the device at all; event indices say it by themselves."""
        raise NotImplementedError

    # --- memory ---

    def check(self) -> None:
        """RingError if the ring is of a size, or lies where it may not."""
        s = self.state
        if not self.is_size(s.size):
            raise RingError(f"a ring of {s.size}")
        places = s.descriptors, s.driver, s.device
        for gpa, alignment, size in zip(places, self.alignment, self.areas(), strict=True):
            if gpa % alignment:
                raise RingError(f"a ring at {gpa:#x}: expected a multiple of {alignment}")
            if gpa + size > END:
                raise _beyond(gpa, size)

    def _read_tables(self, named: Sequence[Segment]) -> None:
        """Read these indirect tables together.

        One that cannot be is left out, and found out when its turn comes (`_table`).
        """
        self._tables.clear()
        runs = [run for run in named if run[1] <= LONGEST_TABLE_BYTES and sum(run) <= END]
        try:
            data = self.memory.gather(runs) if runs else b""
        except IndexError:
            return
        at = 0
        for run in runs:
            self._tables[run] = data[at : at + run[1]]
            at += run[1]

    def _table(self, gpa: int, size: int, flags: int) -> list[Descriptor]:
        """The descriptors of an indirect table, which the descriptor of these words has."""
        if not self.has_indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if flags & NEXT:
            raise RingError("an indirect descriptor with a next one")
        if size % DESCRIPTOR.size or not 0 < size <= LONGEST_TABLE_BYTES:
            raise RingError(f"an indirect table of {size} bytes")
        if gpa + size > END:
            raise _beyond(gpa, size)
        data = self._tables.get((gpa, size))
        if data is None:
            data = self.memory.read(gpa, size)
        return list(DESCRIPTOR.iter_unpack(data))

    def _descriptor(self, index: int) -> Descriptor:
        at = self.state.descriptors + DESCRIPTOR.size * index
        return DESCRIPTOR.unpack(self.memory.read(at, DESCRIPTOR.size))

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")


def chain_of(head: int, parts: Sequence[tuple[int, int, int]], slots: int = 1) -> Chain:
    """The chain of these (address, bytes, flags); RingError if no buffer may be so."""
    readable: list[Segment] = []
    writable: list[Segment] = []
    total = 0
    for gpa, size, flags in parts:
        if gpa + size > END:
            raise _beyond(gpa, size)
        total += size
        if flags & WRITE:
            writable.append((gpa, size))
        elif writable:
            raise RingError("a buffer to be read after one to be written")
        else:
            readable.append((gpa, size))
    if total > LONGEST_CHAIN:
        raise RingError("a chain of more than 2^32 bytes")
    return Chain(head, tuple(readable), tuple(writable), slots)


def chain_of_one(head: int, gpa: int, size: int, flags: int) -> Chain:
    """The same for a single descriptor."""
    if gpa + size > END:
        raise _beyond(gpa, size)
    run = ((gpa, size),)
    return Chain(head, (), run) if flags & WRITE else Chain(head, run, ())


def _beyond(gpa: int, size: int) -> RingError:
    return RingError(f"{size} bytes at {gpa:#x}, beyond the end of all addresses")
