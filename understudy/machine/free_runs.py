"""The runs of free frames, so that the lowest one that is large enough is found at once.

Each run is in a dictionary by its first frame and by its end, so that neighbors join when a run
comes back; and in the heap of its size class (the bits that its length needs).  A run of a higher
class than is asked for fits always, so that only the first of each such heap is looked at, and all
of a heap only in the class that was asked for.  What has gone from the dictionary is still in its
heap until it comes up, or until most of a heap is such.

Source: Knuth, "The Art of Computer Programming", volume 1, "Dynamic Storage Allocation" (tags at
both ends).  Invariant: runs are disjoint, and never neighbors.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

SLACK: Final = 64  # entries of a heap that may be out of date without a look at how many are


class FreeRuns:
    """(first, length) of every free run; `total`: the frames in all of them."""

    def __init__(self) -> None:
        self._length: dict[int, int] = {}  # first -> length
        self._first: dict[int, int] = {}  # end -> first
        self._heaps: dict[int, list[int]] = {}  # bits of the length -> firsts
        self._sizes: dict[int, int] = {}  # how many runs there are of each class
        self.total = 0

    def add(self, first: int, length: int) -> None:
        """A run becomes free; no part of it is."""
        self.total += length
        end = first + length
        if (before := self._first.get(first)) is not None:
            self._forget(before)
            first = before
        if (after := self._length.get(end)) is not None:
            self._forget(end)
            end += after
        self._note(first, end - first)

    def remove(self, run: int, first: int, length: int) -> None:
        """[first, first+length), which lies in the run that begins at `run`, is free no more."""
        end, stop = run + self._length[run], first + length
        self._forget(run)
        self.total -= length
        if run < first:
            self._note(run, first - run)
        if stop < end:
            self._note(stop, end - stop)

    def find(self, count: int, align: int) -> tuple[int, int] | None:
        """The lowest `count` free neighbors, the first a multiple of `align`: (run, first)."""
        best: tuple[int, int] | None = None
        always = (count + align - 2).bit_length() + 1  # runs of such a class fit, however aligned
        least = count.bit_length()
        for bits in self._sizes:
            if bits < least:
                continue
            for run in (self._lowest(bits),) if bits >= always else self._all(bits):
                at = -(-run // align) * align
                fits = at + count <= run + self._length[run]
                if fits and (best is None or at < best[1]):
                    best = run, at
        return best

    def around(self, frame: int) -> int:
        """The first frame of the run that holds this one (slow: looks at all)."""
        if frame in self._length:
            return frame
        return next(n for n, size in self._length.items() if n < frame < n + size)

    def largest_first(self) -> list[tuple[int, int]]:
        """All runs (first, length), the largest first, the lowest first of those as large."""
        return sorted(self._length.items(), key=lambda run: (-run[1], run[0]))

    def _note(self, first: int, length: int) -> None:
        bits = length.bit_length()
        self._length[first], self._first[first + length] = length, first
        self._sizes[bits] = self._sizes.get(bits, 0) + 1
        heap = self._heaps.setdefault(bits, [])
        heappush(heap, first)
        if len(heap) > 2 * self._sizes[bits] + SLACK:
            heap[:] = set(self._all(bits))
            heapify(heap)

    def _forget(self, first: int) -> None:
        length = self._length.pop(first)
        del self._first[first + length]
        bits = length.bit_length()
        self._sizes[bits] -= 1
        if not self._sizes[bits]:
            del self._sizes[bits]
            self._heaps[bits].clear()

    def _is_now(self, first: int, bits: int) -> bool:
        return self._length.get(first, 0).bit_length() == bits

    def _lowest(self, bits: int) -> int:
        """The lowest run of a class that has one."""
        heap = self._heaps[bits]
        while not self._is_now(heap[0], bits):
            heappop(heap)
        return heap[0]

    def _all(self, bits: int) -> Iterator[int]:
        return (first for first in self._heaps[bits] if self._is_now(first, bits))
