"""The p2m: the map from guest frames (gfn) to host frames (pfn).

It is a sorted list of extents, because a guest's memory is few long runs until something
(sharing, ballooning) breaks them up.

Invariants: extents are sorted, disjoint, and merged wherever both gfn and pfn go on; watchers
hear of every change before `map` or `unmap` returns.
"""

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple


class GuestMemoryError(IndexError):
    """A guest-physical address that is not RAM."""


class Extent(NamedTuple):
    """`frames` guest frames from `gfn` on lie in host frames from `pfn` on."""

    gfn: int
    pfn: int
    frames: int


class P2m:
    """The map from guest frames to host frames."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []
        self._starts: list[int] = []
        self.watchers: list[Callable[[int, int], None]] = []  # called with (gfn, count)
        self.traced: Container[int] = frozenset()  # frames (gfn) whose writes matter to somebody
        self.written: Callable[[int, int], None] = lambda gpa, length: None  # (gpa, length)

        self.protected: set[int] = set()  # frames that may only be read
        self.absent: set[int] = set()  # frames that were taken away: RAM, but not there now
        self.on_write: Callable[[int], None] = self.unprotect
        self.on_touch: Callable[[int], None] = self._nobody

    @staticmethod
    def _nobody(gfn: int) -> None:
        raise GuestMemoryError(f"guest frame {gfn:#x} was taken away, and nobody gives it back")

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def find(self, gfn: int) -> Extent | None:
        """The extent that holds `gfn`."""
        at = bisect_right(self._starts, gfn) - 1
        if at < 0:
            return None
        extent = self._extents[at]
        return extent if gfn < extent.gfn + extent.frames else None

    def lookup(self, gfn: int) -> int | None:
        """The pfn behind `gfn`."""
        extent = self.find(gfn)
        return None if extent is None else extent.pfn + gfn - extent.gfn

    def within(self, gfn: int, count: int) -> list[Extent]:
        """The extents that overlap [gfn, gfn+count), cut to it."""
        end, out = gfn + count, []
        at = max(bisect_right(self._starts, gfn) - 1, 0)
        for extent in self._extents[at:]:
            if extent.gfn >= end:
                break
            low, high = max(extent.gfn, gfn), min(extent.gfn + extent.frames, end)
            if low < high:
                out.append(Extent(low, extent.pfn + low - extent.gfn, high - low))
        return out

    def map(self, gfn: int, pfn: int, count: int) -> None:
        """Put host frames behind guest frames, in place of what was there."""
        self._cut(gfn, count)
        self._forget(gfn, count)
        self._extents.append(Extent(gfn, pfn, count))
        self._settle(gfn, count)

    def unmap(self, gfn: int, count: int) -> None:
        """Leave nothing behind these guest frames: they are not RAM any more."""
        self._cut(gfn, count)
        self._forget(gfn, count)
        self._settle(gfn, count)

    def take(self, gfn: int, count: int) -> None:
        """Take the host frames away.  `on_touch` is called when one is missed: it maps another."""
        self._cut(gfn, count)
        self._forget(gfn, count)
        self.absent.update(range(gfn, gfn + count))
        self._settle(gfn, count)

    def protect(self, gfn: int, count: int = 1) -> None:
        """Refuse writes.  `on_write` is called for one: it unprotects the frame or maps another."""
        self.protected.update(range(gfn, gfn + count))
        self._settle(gfn, count)

    def unprotect(self, gfn: int, count: int = 1) -> None:
        """Allow writes again."""
        self.protected.difference_update(range(gfn, gfn + count))
        self._settle(gfn, count)

    def has_protected(self, gfn: int, count: int) -> bool:
        """Whether any of these frames may only be read."""
        if len(self.protected) < count:
            return any(gfn <= frame < gfn + count for frame in self.protected)
        return any(frame in self.protected for frame in range(gfn, gfn + count))

    def touch(self, gfn: int, *, write: bool = False) -> bool:
        """Somebody needs this frame: have it given back, and writes allowed.  False: no RAM."""
        if gfn in self.absent:
            self.on_touch(gfn)
        if write and gfn in self.protected:
            self.on_write(gfn)
        return self.find(gfn) is not None and not (write and gfn in self.protected)

    def _forget(self, gfn: int, count: int) -> None:
        if self.protected or self.absent:
            frames = range(gfn, gfn + count)
            self.protected.difference_update(frames)
            self.absent.difference_update(frames)

    def _cut(self, gfn: int, count: int) -> None:
        end, kept = gfn + count, []
        for extent in self._extents:
            last = extent.gfn + extent.frames
            if last <= gfn or extent.gfn >= end:
                kept.append(extent)
                continue
            if extent.gfn < gfn:
                kept.append(Extent(extent.gfn, extent.pfn, gfn - extent.gfn))
            if last > end:
                kept.append(Extent(end, extent.pfn + end - extent.gfn, last - end))
        self._extents = kept

    def _settle(self, gfn: int, count: int) -> None:
        merged: list[Extent] = []
        for extent in sorted(self._extents):
            last = merged[-1] if merged else None
            if (
                last is not None
                and last.gfn + last.frames == extent.gfn
                and last.pfn + last.frames == extent.pfn
            ):
                merged[-1] = Extent(last.gfn, last.pfn, last.frames + extent.frames)
            else:
                merged.append(extent)
        self._extents = merged
        self._starts = [extent.gfn for extent in merged]
        for watcher in self.watchers:
            watcher(gfn, count)
