"""A virtqueue: how a driver hands buffers to a device, and gets them back.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues".

Not modeled: packed virtqueues.  A device sees `pop`, `push` and `publish` alone, which they have,
too.

A driver is hostile.  Invariants: each structure in guest memory is read once, as a whole, and what
is decided is decided by that copy; a chain has at most as many descriptors as the queue, or as
`LONGEST_TABLE` in an indirect table; anything else raises `RingError`, or the memory's IndexError,
and then nothing has been taken.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from understudy.machine.physical import PhysicalMemory
from understudy.state import U16, U64

# --- The specification ---


NEXT: Final = 1  # VIRTQ_DESC_F_*
WRITE: Final = 2  # the device writes, else it reads
INDIRECT: Final = 4  # the buffer is a table of descriptors
DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next
USED: Final = struct.Struct("<II")  # head of the chain, bytes written
NO_INTERRUPT: Final = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
RING: Final = 4  # where a ring begins, after its flags and its index
ALIGNMENT: Final = 16, 2, 4  # of the descriptor table, the driver area and the device area
LARGEST: Final = 1 << 15  # entries of a split queue
LONGEST_TABLE: Final = 1024  # ours: descriptors in an indirect table
LONGEST_CHAIN: Final = 1 << 32  # bytes of all its buffers, "Descriptor Table": 2^32 at most
NO_VECTOR: Final = 0xFFFF

INDIRECT_DESC: Final = 1 << 28  # VIRTIO_F_*, the features that concern queues
EVENT_IDX: Final = 1 << 29


Descriptor = tuple[int, int, int, int]


class RingError(Exception):
    """A driver that does what it must not: the device needs a reset."""


class Segment(NamedTuple):
    """A run of guest-physical addresses."""

    gpa: int
    length: int


@dataclass(frozen=True, slots=True)
class Chain:
    """One buffer of the driver: what the device reads, and after it what the device writes."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


def length(segments: Sequence[Segment]) -> int:
    """Bytes of them all."""
    return sum(segment.length for segment in segments)


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
        parts.append(Segment(gpa + start, part))
        start, count = 0, count - part
    return parts


def gather(memory: PhysicalMemory, segments: Sequence[Segment]) -> bytes:
    """What stands in the segments.  The caller has bounded their length."""
    return b"".join([memory.read(gpa, size) for gpa, size in segments])


def scatter(memory: PhysicalMemory, segments: Sequence[Segment], data: bytes) -> int:
    """Write to the segments, until data or segments end; how many bytes that were."""
    view, at = memoryview(data), 0
    for gpa, size in segments:
        if at >= len(view):
            break
        part = min(size, len(view) - at)
        memory.write(gpa, view[at : at + part])
        at += part
    return at


# --- The queue ---


@dataclass
class QueueState:
    """What the driver has set of a queue, and how far the device has come."""

    size: U16 = 0
    vector: U16 = NO_VECTOR
    is_enabled: bool = False
    descriptors: U64 = 0  # "Descriptor Area"
    driver: U64 = 0  # "Driver Area": the available ring
    device: U64 = 0  # "Device Area": the used ring
    taken: U16 = 0  # index of the next entry of the available ring
    given: U16 = 0  # index of the next entry of the used ring
    published: U16 = 0  # index up to which the driver has been told


class SplitQueue:
    """One queue as a device uses it.  It keeps nothing: make one whenever it is needed."""

    def __init__(self, memory: PhysicalMemory, state: QueueState, features: int) -> None:
        self.memory, self.state = memory, state
        self.has_events = bool(features & EVENT_IDX)
        self.has_indirect = bool(features & INDIRECT_DESC)

    def pop(self) -> Chain | None:
        """The next buffer that the driver has made available, or None."""
        s = self.state
        waiting = self._u16(s.driver + 2) - s.taken & 0xFFFF
        if waiting > s.size:
            raise RingError(f"{waiting} available buffers in a queue of {s.size}")
        if not waiting:
            return None
        chain = self._chain(self._u16(s.driver + RING + 2 * (s.taken % s.size)))
        s.taken = s.taken + 1 & 0xFFFF
        return chain

    def unpop(self) -> None:
        """The buffer that was popped last, and is not pushed yet, is the next one again."""
        self.state.taken = self.state.taken - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Give a buffer back, `written` bytes of it filled; the driver is not told yet."""
        s = self.state
        self._write(
            s.device + RING + USED.size * (s.given % s.size), USED.pack(chain.head, written)
        )
        s.given = s.given + 1 & 0xFFFF

    def publish(self) -> bool:
        """Tell of all that was pushed; whether the driver wants an interrupt for it."""
        s = self.state
        if s.given == s.published:
            return False
        before, s.published = s.published, s.given
        self._write(s.device + 2, s.given.to_bytes(2, "little"))
        if not self.has_events:
            return not self._u16(s.driver) & NO_INTERRUPT
        event = self._u16(s.driver + RING + 2 * s.size)  # used_event
        return (s.given - event - 1 & 0xFFFF) < (s.given - before & 0xFFFF)

    def ask_for_kicks(self) -> None:
        """From the next available buffer on, the driver is to notify the device."""
        if self.has_events:
            s = self.state  # avail_event
            self._write(s.device + RING + USED.size * s.size, s.taken.to_bytes(2, "little"))

    # --- chains ---

    def _chain(self, head: int) -> Chain:
        s = self.state
        if head >= s.size:
            raise RingError(f"descriptor {head} in a table of {s.size}")
        first = self._descriptor(head)
        gpa, size, flags, _ = first
        if not flags & INDIRECT:
            return _walk(head, first, self._descriptor, s.size)
        if not self.has_indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if flags & NEXT:
            raise RingError("an indirect descriptor with a next one")
        count, rest = divmod(size, DESCRIPTOR.size)
        if rest or not 0 < count <= LONGEST_TABLE:
            raise RingError(f"an indirect table of {size} bytes")
        table = list(DESCRIPTOR.iter_unpack(self._read(gpa, size)))
        if table[0][2] & INDIRECT:
            raise RingError("an indirect descriptor in an indirect table")
        return _walk(head, table[0], table.__getitem__, count)

    def _descriptor(self, index: int) -> Descriptor:
        at = self.state.descriptors + DESCRIPTOR.size * index
        return DESCRIPTOR.unpack(self._read(at, DESCRIPTOR.size))

    # --- memory ---

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self._read(gpa, 2), "little")

    def _read(self, gpa: int, size: int) -> bytes:
        _check_range(gpa, size)
        return self.memory.read(gpa, size)

    def _write(self, gpa: int, data: bytes) -> None:
        _check_range(gpa, len(data))
        self.memory.write(gpa, data)


def _walk(head: int, found: Descriptor, at: Callable[[int], Descriptor], count: int) -> Chain:
    """The chain that begins with the descriptor `found`, in a table of `count`."""
    readable: list[Segment] = []
    writable: list[Segment] = []
    total = 0
    for _ in range(count):
        gpa, size, flags, following = found
        _check_range(gpa, size)
        total += size
        if flags & WRITE:
            writable.append(Segment(gpa, size))
        elif writable:
            raise RingError("a buffer to be read after one to be written")
        else:
            readable.append(Segment(gpa, size))
        if not flags & NEXT:
            if total > LONGEST_CHAIN:
                raise RingError("a chain of more than 2^32 bytes")
            return Chain(head, tuple(readable), tuple(writable))
        if following >= count:
            raise RingError(f"descriptor {following} in a table of {count}")
        found = at(following)
        if found[2] & INDIRECT:
            raise RingError("an indirect descriptor inside a chain")
    raise RingError(f"a chain that does not end in a table of {count}")


def _check_range(gpa: int, size: int) -> None:
    if gpa + size > 1 << 64:
        raise RingError(f"{size} bytes at {gpa:#x}, beyond the end of all addresses")
