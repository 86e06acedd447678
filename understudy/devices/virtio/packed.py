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
    NEXT,
    WRITE,
    Chain,
    Descriptor,
    Queue,
    RingError,
    chain_of,
)

# --- The specification ---

AVAIL, USED = 1 << 7, 1 << 15  # VIRTQ_DESC_F_*
LENGTH, FLAGS = 8, 14  # offsets in a descriptor: address, length, id, flags
ANSWER: Final = struct.Struct("<IH")  # length and id of a used one
USED_ONE: Final = struct.Struct("<IHH")  # and its flags
EVENT: Final = struct.Struct("<HH")  # "Event Suppression Structure Format": where, flags
ENABLE, DISABLE, DESC = range(3)  # RING_EVENT_FLAGS_*
LAP: Final = 1 << 15  # of an event: the wrap counter

# --- The queue ---


class PackedQueue(Queue):
    """See `Queue`."""

    alignment = (16, 4, 4)
    first = 0  # the flags that are yet to be written, of the first that was pushed

    @staticmethod
    def is_size(size: int) -> bool:
        return size > 0

    def pop(self) -> Chain | None:
        s, size = self.state, self.state.size
        lap, place = divmod(s.taken, size)
        flags = self._u16(s.descriptors + DESCRIPTOR.size * place + FLAGS)
        if flags & (AVAIL | USED) != (USED if lap & 1 else AVAIL):
            return None
        room = size - (s.taken - s.given) % (2 * size)  # the rest of the ring is still with us
        found: list[Descriptor] = []
        flags = NEXT
        while flags & NEXT:
            if len(found) >= room:
                raise RingError(f"more descriptors than the {size} of the queue")
            found.append(self._descriptor((place + len(found)) % size))
            flags = found[-1][3]
        chain = self._chain(found)
        s.taken = (s.taken + chain.slots) % (2 * size)
        return chain

    def unpop(self, chain: Chain) -> None:
        s = self.state
        s.taken = (s.taken - chain.slots) % (2 * s.size)

    def push(self, chain: Chain, written: int) -> None:
        s = self.state
        lap, place = divmod(s.given, s.size)
        at = s.descriptors + DESCRIPTOR.size * place
        flags = (0 if lap & 1 else AVAIL | USED) | (WRITE if chain.writable else 0)
        if s.given == s.published:
            self._write(at + LENGTH, ANSWER.pack(written, chain.head))
            self.first = flags
        else:  # nobody looks there before the first one is there
            self._write(at + LENGTH, USED_ONE.pack(written, chain.head, flags))
        s.given = (s.given + chain.slots) % (2 * s.size)

    def publish(self) -> bool:
        s, laps = self.state, 2 * self.state.size
        if s.given == s.published:
            return False
        before, s.published = s.published, s.given
        at = s.descriptors + DESCRIPTOR.size * (before % s.size)
        self._write(at + FLAGS, self.first.to_bytes(2, "little"))
        event, flags = EVENT.unpack(self._read(s.driver, EVENT.size))
        if flags == DESC and self.has_events:
            wanted = event % LAP + (0 if event & LAP else s.size)
            return bool((wanted - before) % laps < (s.given - before) % laps)
        return bool(flags != DISABLE)

    def ask_for_kicks(self) -> None:
        if self.has_events:
            s = self.state
            lap, place = divmod(s.taken, s.size)
            where = place | (0 if lap & 1 else LAP)
            self._write(s.device, EVENT.pack(where, DESC))

    def let_kick(self, wanted: bool) -> None:
        if not self.has_events:
            self._write(self.state.device, EVENT.pack(0, ENABLE if wanted else DISABLE))

    # --- descriptors ---

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
