"""The p2m: the map from guest frames (gfn) to host frames (pfn), and the state of each.

A frame may be protected (it may only be read) or absent (RAM, but taken away), each for a reason,
a flag; several reasons may protect one frame at once.  Each flag has an owner, who is asked when
somebody wants to write a frame that is protected, or needs one that is absent.

Those who keep what they have read here (page tables) are watchers: they hear of changes as runs,
once for many (`batch`).  Those who keep what they have read in guest memory (shadows of the guest's
tables) are tracers: they hear of the hypervisor's writes to the frames that they trace.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server" (what becomes of frames).

Invariants: a change of one frame costs the same however many pieces memory is in; watchers hear of
every change before the method that made it, or the outermost `batch`, returns.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frame_table import GIGA, GIGA_SHIFT, LARGE, MOST, FrameTable
from understudy.machine.words import ABSENT, ELSEWHERE, FLAGS, PRESENT, PROTECTED, RAM, Flag

Runs = Sequence[tuple[int, int]]
"""(gfn, frames), disjoint and in order."""
Watcher = Callable[[Runs], None]


class GuestMemoryError(IndexError):
    """A guest-physical address that is not RAM."""


class Extent(NamedTuple):
    """`frames` guest frames from `gfn` on lie in host frames from `pfn` on."""

    gfn: int
    pfn: int
    frames: int


class Owner(Protocol):
    """Who protects frames, or has taken them away."""

    def write(self, p2m: "P2m", gfn: int) -> None:
        """Somebody wants to write a frame that this owner protects: unprotect it, or move it."""

    def touch(self, p2m: "P2m", gfn: int) -> None:
        """Somebody needs a frame that this owner has taken away: map one."""


class Keeper(Protocol):
    """An owner that can tell what is in the frames which it has taken away."""

    def follow(self, source: "P2m", target: "P2m") -> None:
        """What `source` has here, `target` has, too: it is to be a copy of it."""

    def drop(self, p2m: "P2m") -> None:
        """Nobody wants what this one has here."""

    def is_coming(self, p2m: "P2m", gfn: int) -> bool:
        """A guest misses this frame: whether it is to do so again, for it takes a while."""

    def pieces(self, p2m: "P2m") -> "Iterator[tuple[int, bytes]]":
        """What this one has here and is not all zero: gfns, rising, and contents."""


class Tracer(Protocol):
    """Who must know what is written where."""

    @property
    def traced(self) -> Container[int]:
        """The frames (gfn)."""

    def table_written(self, gpa: int, length: int) -> None:
        """The hypervisor has written here, inside one page."""


class P2m(FrameTable):
    """The map from guest frames to host frames."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[int, Owner] = {}  # by flag
        self.keeper: Keeper | None = None  # of what is swapped out
        self.changes = 0  # however often watchers had something to hear
        self.watchers: list[Watcher] = []
        self.tracers: list[Tracer] = []
        self.halt: Callable[[], None] = lambda: None  # nobody uses what is taken away
        self._pending: list[tuple[int, int]] | None = None

    # --- looking ---

    def lookup(self, gfn: int) -> int | None:
        """The pfn behind `gfn`."""
        giga = self._gigas.get(gfn >> 18)  # `word`, written out: this is asked most often
        if isinstance(giga, list):
            block = giga[gfn >> 9 & 511]
            word = block + ((gfn & 511) << 12) if isinstance(block, int) else block[gfn & 511]
        elif giga is None:
            return None
        else:
            word = giga + ((gfn & 0x3FFFF) << 12)
        return word >> 12 if word & 1 else None

    def places(self, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """Where runs (gpa, bytes) lie on the host, if all are RAM and none is in pieces there."""
        found: list[tuple[int, int]] = []
        gigas = self._gigas
        for gpa, size in runs:
            giga = gigas.get(gpa >> 30)
            if isinstance(giga, list):
                block = giga[gpa >> 21 & 511]
                if isinstance(block, int):
                    word, room = block + (gpa & LARGE - PAGE), LARGE - (gpa & LARGE - 1)
                else:
                    word, room = block[gpa >> 12 & 511], PAGE - (gpa & PAGE - 1)
            elif giga is None:
                return None
            else:
                word, room = giga + (gpa & (1 << 30) - PAGE), (1 << 30) - (gpa & (1 << 30) - 1)
            if size > room or not word & PRESENT:
                return None
            found.append((word & -PAGE | gpa & PAGE - 1, size))
        return found

    def is_protected(self, gfn: int) -> bool:
        """Whether a frame may only be read.  (`protected` is how many there are.)"""
        return bool(self.word(gfn) & PROTECTED)

    def __iter__(self) -> Iterator[Extent]:
        return self._extents(0, MOST)

    def within(self, gfn: int, count: int) -> list[Extent]:
        """The extents that overlap [gfn, gfn+count), cut to it."""
        return list(self._extents(gfn, gfn + count))

    def _extents(self, gfn: int, end: int) -> Iterator[Extent]:
        last = Extent(0, 0, 0)
        for start, word, frames in self.pieces(gfn, end):
            if not word & PRESENT:
                continue
            pfn = word >> PAGE_SHIFT
            if start == last.gfn + last.frames and pfn == last.pfn + last.frames:
                last = Extent(last.gfn, last.pfn, last.frames + frames)
                continue
            if last.frames:
                yield last
            last = Extent(start, pfn, frames)
        if last.frames:
            yield last

    # --- changing ---

    def map(self, gfn: int, pfn: int, count: int, flags: int = 0) -> None:
        """Put host frames behind guest frames, in place of what was there.

        `flags` protect them; what protected the frames before does not any more.
        """
        _check(gfn, count, pfn)
        self._change(gfn, count, pfn << PAGE_SHIFT | PRESENT | flags)

    def move(self, gfn: int, pfn: int, off: int = 0) -> None:
        """Another host frame has the contents of a guest frame now: only `off` ends."""
        _check(gfn, 1, pfn)
        flags = self.word(gfn) & PROTECTED & ~off
        self._change(gfn, 1, pfn << PAGE_SHIFT | PRESENT | flags)

    def map_same(self, gfn: int, pfn: int, count: int, flags: int) -> None:
        """Put one host frame behind each of these guest frames; `flags` protect them."""
        _check(gfn, count)
        _check(gfn, 1, pfn)
        self._change(gfn, count, pfn << PAGE_SHIFT | PRESENT | flags, 0)

    def unmap(self, gfn: int, count: int) -> None:
        """Leave nothing behind these guest frames: they are not RAM any more."""
        _check(gfn, count)
        self._change(gfn, count, gfn << PAGE_SHIFT)

    def take(self, gfn: int, count: int, flag: int = Flag.SWAPPED) -> None:
        """Take the host frames away.  The flag's owner is asked when one is missed."""
        _check(gfn, count)
        self._change(gfn, count, gfn << PAGE_SHIFT | flag)

    def copy(self, other: "P2m", flag: int) -> None:
        """Map, where nothing is mapped yet, what another p2m maps, with this protection alone."""
        self.halt()
        if self.gigabytes():
            raise ValueError("a p2m is copied into one that maps something: expected an empty one")
        self._copy(other)
        self._flag_all(flag, PROTECTED & ~flag)
        self._announce([(number << GIGA_SHIFT, GIGA) for number in self.gigabytes()])

    def clear(self) -> list[Extent]:
        """Leave nothing mapped; what was."""
        self.halt()
        extents, numbers = list(self), self.gigabytes()
        self._clear()
        self._announce([(number << GIGA_SHIFT, GIGA) for number in numbers])
        return extents

    def protect(self, gfn: int, count: int = 1, flag: int = Flag.SEALED) -> None:
        """Refuse writes to RAM.  The flag's owner is asked for each."""
        self._reflag(gfn, count, flag, 0)

    def unprotect(self, gfn: int, count: int = 1, flag: int = PROTECTED) -> None:
        """Allow writes again, if nobody else protects the frames."""
        self._reflag(gfn, count, 0, flag)

    def protect_all(self, flag: int) -> None:
        """Refuse writes to all RAM."""
        self.halt()
        self._announce(self._flag_all(flag, 0))

    def unprotect_all(self, flag: int) -> None:
        """End one reason for which frames are protected."""
        self.halt()
        self._announce(self._flag_all(0, flag))

    def touch(self, gfn: int, *, write: bool = False) -> bool:
        """Somebody needs this frame: have it given back, and writes allowed.  False: no RAM."""
        word = self.word(gfn)
        if word & ABSENT:
            self._owner(gfn, word & ABSENT).touch(self, gfn)
            word = self.word(gfn)
        if write and word & PROTECTED:
            self._ask(gfn, word & PROTECTED)
            word = self.word(gfn)
        return bool(word & PRESENT) and not (write and word & PROTECTED)

    def is_coming(self, gfn: int) -> bool:
        """A vCPU misses this frame: whether it is to execute its instruction again.

        It does so when the frame may have come, so nobody need `touch` it now.
        """
        return self.keeper is not None and self.keeper.is_coming(self, gfn)

    def bring_back(self) -> None:
        """Have all frames given back whose contents their owners alone know, and cannot tell."""
        flags = ELSEWHERE & ~Flag.SWAPPED if self.keeper is not None else ELSEWHERE
        if self.absent:
            for gfn, word, frames in list(self.pieces()):
                for frame in range(gfn, gfn + frames) if word & flags else ():
                    self.touch(frame)

    def _ask(self, gfn: int, flags: int) -> None:
        if not flags & flags - 1:
            self._owner(gfn, flags).write(self, gfn)
            return
        with self.batch():
            while flags:
                flag = flags & -flags
                self._owner(gfn, flag).write(self, gfn)
                flags -= flag

    def _owner(self, gfn: int, flag: int) -> Owner:
        owner = self.owners.get(flag)
        if owner is None:
            raise GuestMemoryError(
                f"guest frame {gfn:#x} has the flag {flag:#x}, and nobody owns that: expected an "
                f"entry in P2m.owners, which has {[hex(flag) for flag in self.owners]}"
            )
        return owner

    def _change(self, gfn: int, count: int, word: int, step: int = PAGE) -> None:
        self.halt()
        if count == 1:
            self._put(gfn, word)
        else:
            self._fill(gfn, count, word, step)
        self._tell(gfn, count)

    def _reflag(self, gfn: int, count: int, on: int, off: int) -> None:
        _check(gfn, count)
        if (on | off) & (FLAGS ^ PROTECTED):
            raise ValueError(f"flags {on | off:#x}: expected some of {PROTECTED:#x}, which protect")
        self.halt()
        if count > 1:
            self._announce(self._flag(gfn, count, on, off))
            return
        old = self.word(gfn)
        new = (old | on) & ~off
        if new != old and old & RAM:
            self._put(gfn, new)
            self._tell(gfn, 1)

    def _announce(self, runs: list[tuple[int, int]]) -> None:
        if not runs:
            return
        self.changes += 1
        if self._pending is not None:
            self._pending += runs
            return
        for watcher in self.watchers:
            watcher(runs)

    # --- who hears of it ---

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What changes inside, the watchers hear of at the end, at once."""
        if self._pending is not None:
            yield
            return
        self._pending = []
        try:
            yield
        finally:
            runs, self._pending = joined(self._pending), None
            self._announce(runs)

    def _tell(self, gfn: int, count: int) -> None:
        self._announce([(gfn, count)])

    def written(self, gpa: int, length: int) -> None:
        """The hypervisor has written here, inside one page: tell those who trace it."""
        for tracer in self.tracers:
            if gpa >> PAGE_SHIFT in tracer.traced:
                tracer.table_written(gpa, length)


def _check(gfn: int, count: int, pfn: int = 0) -> None:
    if gfn < 0 or count < 1 or pfn < 0 or max(gfn, pfn) + count > MOST:
        raise ValueError(
            f"guest frames {gfn:#x}+{count}, host frames from {pfn:#x} on: expected at least one "
            f"frame, and numbers below {MOST:#x}"
        )


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same frames as runs that are disjoint and in order."""
    out: list[tuple[int, int]] = []
    for gfn, count in sorted(runs):
        if out and gfn <= (end := sum(out[-1])):
            out[-1] = (out[-1][0], max(end, gfn + count) - out[-1][0])
        else:
            out.append((gfn, count))
    return out
