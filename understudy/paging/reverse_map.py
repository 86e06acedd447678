"""From a guest frame back to the entries of our tables that map it.

Source: KVM calls it rmap.  It answers which entries must change when a frame moves, or when a
frame becomes a page table and may not be written any more.

An entry is named by its slot, the hpa at which it lies.

Invariant: a slot is listed exactly while its entry maps a page, under what it maps.
"""

from collections.abc import Collection
from typing import Final

NOTHING: Final[frozenset[int]] = frozenset()
BLOCK: Final = 512  # frames of a 2-MByte page
ENTRY_BYTES: Final = 320  # what is noted of one entry


class ReverseMap:
    """The slots that map each guest frame, and each block of 512 of them as one large page."""

    def __init__(self) -> None:
        self._small: dict[int, int | set[int]] = {}  # gfn -> its slot, or its slots
        self._large: dict[int, set[int]] = {}  # gfn // 512 -> slots
        self._small_of: dict[int, int] = {}  # and back
        self._large_of: dict[int, int] = {}

    def add(self, slot: int, gfn: int) -> None:
        """The entry at `slot` maps this frame now."""
        self._small_of[slot] = gfn
        slots = self._small.get(gfn)
        if slots is None:
            self._small[gfn] = slot
        elif isinstance(slots, set):
            slots.add(slot)
        elif slots != slot:
            self._small[gfn] = {slots, slot}

    def add_large(self, slot: int, gfn: int) -> None:
        """The entry at `slot` maps the block that begins with this frame."""
        self._large_of[slot] = gfn // BLOCK
        self._large.setdefault(gfn // BLOCK, set()).add(slot)

    def remove(self, slot: int) -> bool:
        """The entry at `slot` maps nothing any more.  False if it did not."""
        gfn = self._small_of.pop(slot, None)
        if gfn is not None:
            slots = self._small[gfn]
            if isinstance(slots, set):
                slots.discard(slot)
            if not slots or not isinstance(slots, set):
                del self._small[gfn]
            return True
        block = self._large_of.pop(slot, None)
        if block is None:
            return False
        large = self._large[block]
        large.discard(slot)
        if not large:
            del self._large[block]
        return True

    def frame_at(self, slot: int) -> int | None:
        """The frame that the entry at `slot` maps, if it is a small page."""
        return self._small_of.get(slot)

    def mapped_at(self, slot: int) -> int:
        """The frame that the entry at `slot` maps, or the first of its large page."""
        gfn = self._small_of.get(slot)
        return self._large_of[slot] * BLOCK if gfn is None else gfn

    def small(self, gfn: int) -> Collection[int]:
        """The slots that map one frame alone."""
        slots = self._small.get(gfn, NOTHING)
        return (slots,) if isinstance(slots, int) else slots

    def large(self, gfn: int) -> set[int] | frozenset[int]:
        """The slots that map the block in which this frame lies."""
        return self._large.get(gfn // BLOCK, NOTHING)

    def slots_in(self, gfn: int, count: int) -> list[int]:
        """All slots that map any of these frames."""
        found: list[int] = []
        end = gfn + count
        if count < len(self._small):
            for frame in range(gfn, end):
                found += self.small(frame)
        else:
            for frame in self._small:
                if gfn <= frame < end:
                    found += self.small(frame)
        first, last = gfn // BLOCK, (end - 1) // BLOCK
        if last - first < len(self._large):
            for block in range(first, last + 1):
                found += self._large.get(block, NOTHING)
        else:
            for block, slots in self._large.items():
                if first <= block <= last:
                    found += slots
        return found

    def clear(self) -> None:
        """Nothing maps anything."""
        for table in (self._small, self._large, self._small_of, self._large_of):
            table.clear()

    def __len__(self) -> int:
        return len(self._small_of) + len(self._large_of)
