"""Guest-physical memory: the p2m (gfn to pfn) and reads and writes through it.

The p2m is a sorted list of extents, because a guest's memory is few long runs until something
(sharing, ballooning) breaks them up.

The map of a PC: RAM from 0 up to 3 GiB, the rest of it from 4 GiB on; between them lie the
devices.  0xA0000-0xFFFFF is RAM, too (firmware tables are written there), but `ranges` does
not report it as usable.

Invariants: extents are sorted, disjoint, and merged wherever both gfn and pfn go on; watchers
hear of every change before `map` or `unmap` returns.
"""

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator
from typing import Final, NamedTuple, NewType

from understudy.host import PAGE, PAGE_SHIFT, Host

Gpa = NewType("Gpa", int)
Gva = NewType("Gva", int)
Hpa = NewType("Hpa", int)

LOW_END: Final = 0xC000_0000  # RAM below the devices ends here
HIGH_START: Final = 0x1_0000_0000
LEGACY_HOLE: Final = (0xA_0000, 0x10_0000)
GIGABYTE_FRAMES: Final = 1 << 18


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


class GuestMemory:
    """A VM's RAM, addressed by gpa."""

    def __init__(self, host: Host, size: int) -> None:
        self.host, self.size, self.p2m = host, size, P2m()
        self._memory = host.memory

    def populate(self) -> None:
        """Take the frames: gigabyte-aligned runs if there are any, so that pages can be large."""
        for gfn, count in self.layout():
            align = GIGABYTE_FRAMES if count >= GIGABYTE_FRAMES else 512
            for pfn, part in self.host.frames.allocate_runs(count, align):
                self.p2m.map(gfn, pfn, part)
                gfn += part

    def layout(self) -> list[tuple[int, int]]:
        """Where RAM lies: (gfn, frames)."""
        low = min(self.size, LOW_END)
        parts = [(0, low >> PAGE_SHIFT)]
        if self.size > low:
            parts.append((HIGH_START >> PAGE_SHIFT, (self.size - low) >> PAGE_SHIFT))
        return parts

    def ranges(self) -> list[tuple[int, int]]:
        """Usable RAM as (gpa, bytes)."""
        low = min(self.size, LOW_END)
        hole, resume = LEGACY_HOLE
        parts = [(0, min(low, hole))]
        if low > resume:
            parts.append((resume, low - resume))
        if self.size > low:
            parts.append((HIGH_START, self.size - low))
        return parts

    def hpa(self, gpa: int) -> int | None:
        """The host-physical address behind `gpa`, or None where there is no RAM."""
        if self.p2m.absent:
            self.p2m.touch(gpa >> PAGE_SHIFT)
        extent = self.p2m.find(gpa >> PAGE_SHIFT)
        return None if extent is None else gpa + ((extent.pfn - extent.gfn) << PAGE_SHIFT)

    def read(self, gpa: int, length: int) -> bytes:
        """The bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        pieces = [self._memory.read(hpa, part) for hpa, part in self._pieces(gpa, length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        view = memoryview(data).cast("B")
        if self.p2m.protected:
            for gfn in range(gpa >> PAGE_SHIFT, (gpa + len(view) + PAGE - 1) >> PAGE_SHIFT):
                self.p2m.touch(gfn, write=True)
        at = 0
        for hpa, part in self._pieces(gpa, len(view)):
            self._memory.write(hpa, view[at : at + part])
            at += part
        if self.p2m.traced:
            self._tell(gpa, len(view))

    def _tell(self, gpa: int, length: int) -> None:
        """Those who trace a frame hear of writes by the hypervisor, page by page."""
        end = gpa + length
        while gpa < end:
            part = min(end - gpa, PAGE - (gpa & (PAGE - 1)))
            if gpa >> PAGE_SHIFT in self.p2m.traced:
                self.p2m.written(gpa, part)
            gpa += part

    def read_u64(self, gpa: int) -> int:
        """The little-endian word of 64 bits at `gpa`."""
        hpa = self.hpa(gpa)
        if hpa is None or gpa & (PAGE - 1) > PAGE - 8:
            return int.from_bytes(self.read(gpa, 8), "little")
        return self._memory.read_u64(hpa)

    def read_u32(self, gpa: int) -> int:
        """The little-endian word of 32 bits at `gpa`."""
        hpa = self.hpa(gpa)
        if hpa is None or gpa & (PAGE - 1) > PAGE - 4:
            return int.from_bytes(self.read(gpa, 4), "little")
        return self._memory.read_u32(hpa)

    def write_u64(self, gpa: int, value: int) -> None:
        """Write a little-endian word of 64 bits."""
        self.write(gpa, value.to_bytes(8, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """Write a little-endian word of 32 bits."""
        self.write(gpa, value.to_bytes(4, "little"))

    def _pieces(self, gpa: int, length: int) -> list[tuple[int, int]]:
        """[gpa, gpa+length) as runs (hpa, length)."""
        pieces = []
        if self.p2m.absent:
            for gfn in range(gpa >> PAGE_SHIFT, (gpa + length + PAGE - 1) >> PAGE_SHIFT):
                self.p2m.touch(gfn)
        while length:
            extent = self.p2m.find(gpa >> PAGE_SHIFT)
            if extent is None or gpa < 0:
                raise GuestMemoryError(
                    f"gpa {gpa:#x} ({length} bytes): expected RAM, which lies at "
                    + ", ".join(f"{start:#x}+{size:#x}" for start, size in self.ranges())
                )
            part = min(length, ((extent.gfn + extent.frames) << PAGE_SHIFT) - gpa)
            pieces.append((gpa + ((extent.pfn - extent.gfn) << PAGE_SHIFT), part))
            gpa, length = gpa + part, length - part
        return pieces
