"""A packed virtqueue: one ring of descriptors, made available by the driver, used by the device.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Packed Virtqueues".

The ring is gone around again and again; which lap a descriptor was written in, two of its flags
say.  Entries are counted modulo two laps here, so that a count has the specification's wrap
counter in it: 1 in the first of the two.

Invariant: whoever looks from another processor sees all that one `publish` tells of, or nothing: a
driver goes by the first used descriptor, and that one's flags are written last.
"""

import struct
from typing import Final

from understudy.devices.virtio.queue import (
    DESCRIPTOR,
    INDIRECT,
    LOOK,
    NEXT,
    WRITE,
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

AVAIL, USED = 1 << 7, 1 << 15  # VIRTQ_DESC_F_*
LENGTH, FLAGS = 8, 14  # offsets in a descriptor: address, length, id, flags
ANSWER: Final = struct.Struct("<IHH")  # length, id and flags of a used one
EVENT: Final = struct.Struct("<HH")  # "Event Suppression Structure Format": where, flags
ENABLE, DISABLE, DESC = range(3)  # RING_EVENT_FLAGS_*
LAP: Final = 1 << 15  # of an event: the wrap counter

# --- The queue ---


class PackedQueue(Queue):
    """See `Queue`."""

    alignment = (16, 4, 4)

    def __init__(self, memory: PhysicalMemory, state: QueueState, features: int) -> None:
        super().__init__(memory, state, features)
        self._window: list[Descriptor] = []  # that were looked at
        self._there = 0  # of these, from the first on, are available
        self._used: list[tuple[int, bytes]] = []  # that are yet to be told of, and where

    @staticmethod
    def is_size(size: int) -> bool:
        return size > 0

    def areas(self) -> tuple[int, int, int]:
        return DESCRIPTOR.size * self.state.size, EVENT.size, EVENT.size

    def answers(self) -> Segment:
        return self.state.descriptors, self.areas()[0]

    def pop(self) -> Chain | None:
        s, size = self.state, self.state.size
        n = (s.taken - self._looked_at) % (2 * size)
        if n >= self._there:
            if not self._may_be_more:
                return None
            self._look()
            if not self._there:
                return None
            n = 0
        gpa, count, name, flags = self._window[n]
        room = size - (s.taken - s.given) % (2 * size)  # the rest of the ring is still with us
        if not flags & (NEXT | INDIRECT) and room:
            chain = chain_of_one(name, gpa, count, flags)
            s.taken = (s.taken + 1) % (2 * size)
            return chain
        found: list[Descriptor] = []
        flags = NEXT
        while flags & NEXT:
            if len(found) >= room:
                raise RingError(f"more descriptors than the {size} of the queue")
            at = n + len(found)
            one = self._window[at] if at < len(self._window) else self._beyond_window(at)
            found.append(one)
            flags = one[3]
        chain = self._chain(found)
        s.taken = (s.taken + chain.slots) % (2 * size)
        return chain

    def unpop(self, chain: Chain) -> None:
        s = self.state
        s.taken = (s.taken - chain.slots) % (2 * s.size)
        self._may_be_more = True

    def push(self, chain: Chain, written: int) -> None:
        s = self.state
        lap, place = divmod(s.given, s.size)
        flags = (0 if lap & 1 else AVAIL | USED) | (WRITE if chain.writable else 0)
        at = s.descriptors + DESCRIPTOR.size * place + LENGTH
        self._used.append((at, ANSWER.pack(written, chain.head, flags)))
        s.given = (s.given + chain.slots) % (2 * s.size)

    def publish(self) -> bool:
        s, laps = self.state, 2 * self.state.size
        if not self._used:
            return False
        before, s.published = s.published, s.given
        ((at, first), *rest), self._used = self._used, []
        # Nobody looks at the others before the first one is there, and that one's flags come last.
        runs = [(gpa, ANSWER.size) for gpa, _ in rest]
        runs += (at, FLAGS - LENGTH), (at + FLAGS - LENGTH, ANSWER.size - (FLAGS - LENGTH))
        self.memory.scatter(runs, b"".join([data for _, data in rest]) + first)
        event, flags = EVENT.unpack(self.memory.read(s.driver, EVENT.size))
        if flags == DESC and self.has_events:
            wanted = event % LAP + (0 if event & LAP else s.size)
            return bool((wanted - before) % laps < (s.given - before) % laps)
        return bool(flags != DISABLE)

    def ask_for_kicks(self) -> None:
        self._may_be_more = True
        if self.has_events:
            s = self.state
            lap, place = divmod(s.taken, s.size)
            where = place | (0 if lap & 1 else LAP)
            self.memory.write(s.device, EVENT.pack(where, DESC))

    def let_kick(self, wanted: bool) -> None:
        if not self.has_events:
            self.memory.write(self.state.device, EVENT.pack(0, ENABLE if wanted else DISABLE))

    # --- descriptors ---

    def _look(self) -> None:
        """Find what is available from the next entry on."""
        s = self.state
        lap, place = divmod(s.taken, s.size)
        run = s.descriptors + DESCRIPTOR.size * place, DESCRIPTOR.size * min(LOOK, s.size - place)
        # Twice: what the flags of the first copy tell of is there when the second one is made.
        both = list(DESCRIPTOR.iter_unpack(self.memory.gather((run, run))))
        half = len(both) // 2
        wanted = USED if lap & 1 else AVAIL
        there = 0
        while there < half and both[there][3] & (AVAIL | USED) == wanted:
            there += 1
        self._looked_at, self._may_be_more = s.taken, there == half
        self._window, self._there = both[half:], there
        if there:
            named = [(gpa, size) for gpa, size, _, flags in both[half : half + there]
                     if flags & INDIRECT]  # fmt: skip
            self._read_tables(named)

    def _beyond_window(self, at: int) -> Descriptor:
        """A descriptor so far from where was looked from."""
        return self._descriptor((self._looked_at + at) % self.state.size)

    def _chain(self, found: list[Descriptor]) -> Chain:
        """The last one's id is the driver's name for all of them."""
        gpa, size, _, flags = found[0]
        head = found[-1][2]
        if flags & INDIRECT:  # "reserved and ignored" are all flags in a table but one
            table = self._table(gpa, size, flags)
            return chain_of(head, [(gpa, size, flags) for gpa, size, _, flags in table])
        if any(flags & INDIRECT for *_, flags in found):
            raise RingError("an indirect descriptor inside a chain")
        return chain_of(head, [(gpa, size, flags) for gpa, size, _, flags in found], len(found))
