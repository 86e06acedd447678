"""How many owners each host frame has.

Guests get large runs, and share all of them or single frames: the counts of 512 frames in a row are
one number as long as they are equal, and an array once they are not.

Source: none.  Invariant: what is in no block has no owner.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Final

SHIFT: Final = 9
BLOCK: Final = 1 << SHIFT
_KIND: Final = "Q"
_ONES: Final = sum(1 << 64 * n for n in range(BLOCK))


class References:
    """pfn -> count."""

    def __init__(self) -> None:
        self._blocks: dict[int, int | array[int]] = {}  # pfn >> 9 -> the count, or the counts

    def of(self, pfn: int) -> int:
        """The owners of one frame."""
        block = self._blocks.get(pfn >> SHIFT, 0)
        return block if isinstance(block, int) else block[pfn & BLOCK - 1]

    def any(self, first: int, count: int) -> bool:
        """Whether any of these frames has an owner."""
        for number, low, high in _parts(first, count):
            block = self._blocks.get(number, 0)
            if block if isinstance(block, int) else any(block[low:high]):
                return True
        return False

    def all(self, first: int, count: int) -> bool:
        """Whether each of these frames has an owner."""
        for number, low, high in _parts(first, count):
            block = self._blocks.get(number, 0)
            if not block if isinstance(block, int) else 0 in block[low:high]:
                return False
        return True

    def sole(self, first: int, count: int) -> int:
        """How many of these frames have one owner."""
        found = 0
        for number, low, high in _parts(first, count):
            block = self._blocks.get(number, 0)
            alike = (high - low) * (block == 1)
            found += alike if isinstance(block, int) else block[low:high].count(1)
        return found

    def add(self, first: int, count: int, owners: int = 1) -> None:
        """One more owner, or so many, for each of these frames."""
        for number, low, high in _parts(first, count):
            block = self._blocks.get(number, 0)
            if high - low < BLOCK:
                counts = self._open(number) if isinstance(block, int) else block
                for at in range(low, high):
                    counts[at] += owners
            elif isinstance(block, int):
                self._blocks[number] = block + owners
            else:
                wide = int.from_bytes(block, "little") + owners * _ONES
                block[:] = array(_KIND, wide.to_bytes(8 * BLOCK, "little"))

    def drop(self, first: int, count: int) -> list[tuple[int, int]]:
        """One owner less for each of these frames, which have one; the runs that now have none."""
        gone: list[tuple[int, int]] = []
        for number, low, high in _parts(first, count):
            block, base = self._blocks.get(number, 0), number << SHIFT
            if isinstance(block, int) and high - low == BLOCK:
                if block > 1:
                    self._blocks[number] = block - 1
                else:
                    del self._blocks[number]
                    _append(gone, base, BLOCK)
                continue
            counts = self._open(number) if isinstance(block, int) else block
            if counts[low:high].count(1) == high - low:
                counts[low:high] = array(_KIND, bytes(8 * (high - low)))
                _append(gone, base + low, high - low)
            else:
                for at in range(low, high):
                    counts[at] -= 1
                    if not counts[at]:
                        _append(gone, base + at, 1)
            # An array of zeros stays after single frames: it is used again.
            if gone and count > 1 and not any(counts):
                del self._blocks[number]
        return gone

    def _open(self, number: int) -> "array[int]":
        """The counts of a block as an array, to be changed."""
        block = self._blocks.get(number, 0)
        if isinstance(block, int):
            block = self._blocks[number] = array(_KIND, [block]) * BLOCK
        return block


def _parts(first: int, count: int) -> Iterable[tuple[int, int, int]]:
    """(block, low, high): the frames of a run block by block, counted from the block's first."""
    low = first & BLOCK - 1
    if low + count <= BLOCK:
        return ((first >> SHIFT, low, low + count),)
    return _many_parts(first, count)


def _many_parts(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    end = first + count
    while first < end:
        low = first & BLOCK - 1
        size = min(BLOCK - low, end - first)
        yield first >> SHIFT, low, low + size
        first += size


def _append(runs: list[tuple[int, int]], first: int, count: int) -> None:
    """Add a run after the others, joined with the last one if it goes on there."""
    if runs and sum(runs[-1]) == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))
