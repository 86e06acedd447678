"""Who owns which frame of host-physical memory.

Frames are numbered by pfn (hpa >> 12).  The allocator keeps free runs, not a bitmap, because
guests get few and large ones; a run that is allocated costs the computer nothing until it is
touched, and one that is freed is given back.

Invariants: a frame belongs to at most one owner; frame 0 to none, so that hpa 0 is never valid.
"""

import threading
from bisect import bisect_left, insort
from typing import Final

PAGE: Final = 4096
PAGE_SHIFT: Final = 12


class OutOfFrames(MemoryError):
    """The host has no run of free frames of that size."""


class Frames:
    """The frame allocator: first fit among the free runs, aligned."""

    def __init__(self, first: int, count: int) -> None:
        self._free: list[tuple[int, int]] = [(first, count)] if count else []
        self._lock = threading.Lock()

    @property
    def free_count(self) -> int:
        """How many frames are free."""
        return sum(count for _, count in self._free)

    def allocate(self, count: int = 1, align: int = 1) -> int:
        """The pfn of `count` neighboring frames, the first a multiple of `align`."""
        with self._lock:
            for start, length in self._free:
                first = -(-start // align) * align
                if first + count <= start + length:
                    self._take(first, count)
                    return first
        raise OutOfFrames(
            f"no run of {count} free frames aligned to {align}: {self.free_count} frames are "
            "free; give the host more memory, Host(ram=…)"
        )

    def allocate_runs(self, count: int, align: int = 1) -> list[tuple[int, int]]:
        """`count` frames as runs (pfn, count), as few as there are, the first one aligned."""
        try:
            return [(self.allocate(count, align), count)]
        except OutOfFrames:
            pass
        with self._lock:
            if self.free_count < count:
                raise OutOfFrames(f"{count} frames wanted, {self.free_count} are free")
            runs = []
            for start, length in sorted(self._free, key=lambda run: -run[1]):
                part = min(length, count)
                runs.append((start, part))
                count -= part
                if not count:
                    break
            for start, part in runs:
                self._take(start, part)
            return runs

    def claim(self, first: int, count: int) -> None:
        """Take exactly these frames (a snapshot returns to where it was)."""
        with self._lock:
            self._take(first, count)

    def free(self, first: int, count: int) -> None:
        """Give a run back."""
        with self._lock:
            at = bisect_left(self._free, (first, 0))
            before = self._free[at - 1] if at else (0, 0)
            after = self._free[at] if at < len(self._free) else (first + count, 0)
            if sum(before) > first or after[0] < first + count:
                raise ValueError(f"frames {first:#x}+{count}: some of them are free already")
            if before[1] and sum(before) == first:
                self._free.remove(before)
                first, count = before[0], before[1] + count
            if after[1] and after[0] == first + count:
                self._free.remove(after)
                count += after[1]
            insort(self._free, (first, count))

    def _take(self, first: int, count: int) -> None:
        at = bisect_left(self._free, (first + 1, 0)) - 1
        start, length = self._free[at] if at >= 0 else (0, 0)
        if not (start <= first and first + count <= start + length):
            raise OutOfFrames(f"frames {first:#x}+{count} are not all free")
        self._free[at : at + 1] = [
            run for run in ((start, first - start), (first + count, start + length - first - count))
            if run[1]
        ]  # fmt: skip
