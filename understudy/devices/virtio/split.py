"""A split virtqueue: a table of descriptors, a ring of what is available, a ring of what was used.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues".

Entries are counted as the rings' indices are, modulo 2^16.
"""

import struct
from collections.abc import Callable
from typing import Final

from understudy.devices.virtio.queue import (
    INDIRECT,
    NEXT,
    Chain,
    Descriptor,
    Queue,
    RingError,
    chain_of,
)

# --- The specification ---

USED: Final = struct.Struct("<II")  # head of the chain, bytes written
NO_INTERRUPT: Final = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
NO_NOTIFY: Final = 1  # VIRTQ_USED_F_NO_NOTIFY
RING: Final = 4  # where a ring begins, after its flags and its index

# --- The queue ---


class SplitQueue(Queue):
    """See `Queue`."""

    alignment = (16, 2, 4)

    @staticmethod
    def is_size(size: int) -> bool:
        return size > 0 and not size & size - 1

    def pop(self) -> Chain | None:
        s = self.state
        waiting = self._u16(s.driver + 2) - s.taken & 0xFFFF
        if waiting > s.size:
            raise RingError(f"{waiting} available buffers in a queue of {s.size}")
        if not waiting:
            return None
        chain = self._chain(self._u16(s.driver + RING + 2 * (s.taken % s.size)))
        s.taken = s.taken + 1 & 0xFFFF
        return chain

    def unpop(self, chain: Chain) -> None:
        self.state.taken = self.state.taken - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        s = self.state
        self._write(
            s.device + RING + USED.size * (s.given % s.size), USED.pack(chain.head, written)
        )
        s.given = s.given + 1 & 0xFFFF

    def publish(self) -> bool:
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
        if self.has_events:
            s = self.state  # avail_event
            self._write(s.device + RING + USED.size * s.size, s.taken.to_bytes(2, "little"))

    def let_kick(self, wanted: bool) -> None:
        if not self.has_events:
            flags = 0 if wanted else NO_NOTIFY
            self._write(self.state.device, flags.to_bytes(2, "little"))

    # --- chains ---

    def _chain(self, head: int) -> Chain:
        s = self.state
        if head >= s.size:
            raise RingError(f"descriptor {head} in a table of {s.size}")
        first = self._descriptor(head)
        gpa, size, flags, _ = first
        if not flags & INDIRECT:
            return _walk(head, first, self._descriptor, s.size)
        table = self._table(gpa, size, flags)
        if table[0][2] & INDIRECT:
            raise RingError("an indirect descriptor in an indirect table")
        return _walk(head, table[0], table.__getitem__, len(table))


def _walk(head: int, found: Descriptor, at: Callable[[int], Descriptor], count: int) -> Chain:
    """The chain that begins with the descriptor `found`, in a table of `count`."""
    parts: list[tuple[int, int, int]] = []
    for _ in range(count):
        gpa, size, flags, following = found
        parts.append((gpa, size, flags))
        if not flags & NEXT:
            return chain_of(head, parts)
        if following >= count:
            raise RingError(f"descriptor {following} in a table of {count}")
        found = at(following)
        if found[2] & INDIRECT:
            raise RingError("an indirect descriptor inside a chain")
    raise RingError(f"a chain that does not end in a table of {count}")
