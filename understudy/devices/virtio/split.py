"""A split virtqueue: a table of descriptors, a ring of what is available, a ring of what was used.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Split Virtqueues".

Entries are counted as the rings' indices are, modulo 2^16.
"""

import struct
from collections.abc import Callable
from itertools import takewhile
from typing import Final

from understudy.devices.virtio.queue import (
    DESCRIPTOR,
    INDIRECT,
    LOOK,
    NEXT,
    Chain,
    Descriptor,
    Queue,
    QueueState,
    RingError,
    Segment,
    chain_of,
    chain_of_one,
)
from understudy.machine.physical import PhysicalMemory

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

    def __init__(self, memory: PhysicalMemory, state: QueueState, features: int) -> None:
        super().__init__(memory, state, features)
        self._heads: list[int] = []  # that were found
        self._firsts: list[Descriptor] = []  # of these, as far as they lie in the table
        self._used: list[bytes] = []  # that are yet to be told of

    def areas(self) -> tuple[int, int, int]:
        size = self.state.size
        events = 2 if self.has_events else 0
        return DESCRIPTOR.size * size, RING + 2 * size + events, RING + USED.size * size + events

    def answers(self) -> Segment:
        return self.state.device, self.areas()[2]

    def pop(self) -> Chain | None:
        s = self.state
        n = s.taken - self._looked_at & 0xFFFF
        if n >= len(self._heads):
            if not self._may_be_more:
                return None
            self._look()
            if not self._heads:
                return None
            n = 0
        head = self._heads[n]
        if head >= s.size:
            raise RingError(f"descriptor {head} in a table of {s.size}")
        gpa, size, flags, _ = first = self._firsts[n]
        if flags & (NEXT | INDIRECT):
            chain = self._chain(head, first)
        else:
            chain = chain_of_one(head, gpa, size, flags)
        s.taken = s.taken + 1 & 0xFFFF
        return chain

    def unpop(self, chain: Chain) -> None:
        self.state.taken = self.state.taken - 1 & 0xFFFF
        self._may_be_more = True

    def push(self, chain: Chain, written: int) -> None:
        self._used.append(USED.pack(chain.head, written))
        self.state.given = self.state.given + 1 & 0xFFFF

    def publish(self) -> bool:
        s = self.state
        if not self._used:
            return False
        ring, used, self._used = s.device + RING, self._used, []
        before, s.published = s.given - len(used) & 0xFFFF, s.given
        runs = [(ring + USED.size * ((before + n) % s.size), USED.size) for n in range(len(used))]
        runs.append((s.device + 2, 2))
        self.memory.scatter(runs, b"".join(used) + s.given.to_bytes(2, "little"))
        if not self.has_events:
            return not self._u16(s.driver) & NO_INTERRUPT
        event = self._u16(s.driver + RING + 2 * s.size)  # used_event
        return (s.given - event - 1 & 0xFFFF) < (s.given - before & 0xFFFF)

    def ask_for_kicks(self) -> None:
        self._may_be_more = True
        if self.has_events:
            s = self.state  # avail_event
            self.memory.write(s.device + RING + USED.size * s.size, s.taken.to_bytes(2, "little"))

    def let_kick(self, wanted: bool) -> None:
        if not self.has_events:
            flags = 0 if wanted else NO_NOTIFY
            self.memory.write(self.state.device, flags.to_bytes(2, "little"))

    # --- chains ---

    def _look(self) -> None:
        """Find what is available from the next entry on."""
        s = self.state
        place = s.taken % s.size
        room = min(LOOK, s.size - place)
        # The index first: what it tells of is there when the entries are read.
        found = self.memory.gather(((s.driver + 2, 2), (s.driver + RING + 2 * place, 2 * room)))
        index, *heads = struct.unpack(f"<{1 + room}H", found)
        waiting = index - s.taken & 0xFFFF
        if waiting > s.size:
            raise RingError(f"{waiting} available buffers in a queue of {s.size}")
        del heads[waiting:]
        firsts: list[Descriptor] = []
        if heads:
            runs = [(s.descriptors + DESCRIPTOR.size * head, DESCRIPTOR.size)
                    for head in takewhile(s.size.__gt__, heads)]  # fmt: skip
            firsts = list(DESCRIPTOR.iter_unpack(self.memory.gather(runs)))
            self._read_tables([(gpa, size) for gpa, size, flags, _ in firsts if flags & INDIRECT])
        self._looked_at, self._may_be_more = s.taken, waiting > room
        self._heads, self._firsts = heads, firsts

    def _chain(self, head: int, first: Descriptor) -> Chain:
        gpa, size, flags, _ = first
        if not flags & INDIRECT:
            return _walk(head, first, self._descriptor, self.state.size)
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
