"""Frames that a guest does without: the host has them back, until the guest needs one again.

A guest gives a frame up for a while (it is in the balloon), or says that nothing it still wants is
in there (it is free).  Either way the contents are forgotten; whoever touches such a frame gets
another one, with zeros in it.  A memory that is lazy (`GuestMemory.is_lazy`) begins as frames that
are all free, and while its host has plenty 2 MBytes come at once, so that they can be one page.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Ballooning"; VIRTIO 1.2,
"Memory Balloon Device".
Invariants: which frames these are, the p2m knows alone; a frame is the host's again only after all
who could reach it for the guest have heard of that, shadows of the tables in it included.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from understudy.arch.address import PAGE_SHIFT
from understudy.machine.frame_table import MOST
from understudy.machine.frames import OutOfFrames
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m, joined
from understudy.machine.words import FRAMES, PRESENT, Flag
from understudy.state import U62, plain, restore

Runs = Iterable[tuple[int, int]]
"""(gfn, frames)."""
Pieces = list[tuple[int, int, int]]
"""(gfn, word, frames)."""
OUTSIDE: Final = PRESENT | Flag.FREE | Flag.SWAPPED | Flag.SAMPLED  # of the balloon
MOST_RUNS: Final = 1024  # of one report: no driver has so many, nor any with pages of its balloon


@dataclass
class BalloonedState:
    """What a snapshot keeps: where the frames are, and what was counted."""

    ballooned: list[tuple[U62, U62]] = field(default_factory=list)
    free: list[tuple[U62, U62]] = field(default_factory=list)
    given: U62 = 0
    fetched: U62 = 0
    broken: U62 = 0


class Ballooned:
    """Owns `Flag.BALLOONED` and `Flag.FREE` in the p2m of one memory.

    given: frames that the host got back.  fetched: those that the guest has needed again.
    broken: of these, those that were in the balloon then.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory, self._p2m = memory, memory.p2m
        self._p2m.owners[Flag.BALLOONED] = self._p2m.owners[Flag.FREE] = self
        self.given = self.fetched = self.broken = 0
        self._counted, self._counts = -1, (0, 0)  # at how many changes of the p2m, and what

    # --- what the guest says ---

    def inflate(self, runs: Runs) -> int:
        """The guest does without these frames; how many of them the host has got back now.

        What is no RAM stays as it is.  What was taken away before is in the balloon now: nobody
        wants it back.
        """
        return self._take(runs, Flag.BALLOONED)

    def report(self, runs: Runs) -> int:
        """Nothing is in these frames that the guest wants; how many the host has got back now.

        Of more runs than `MOST_RUNS`, with no frame in the balloon between, the first.
        """
        found = self._pieces(runs, OUTSIDE)
        return self._take(_runs_of(found)[:MOST_RUNS], Flag.FREE)

    def deflate(self, runs: Runs) -> int:
        """The guest uses these frames again, when it likes; how many were in the balloon."""
        found = self._pieces(runs, Flag.BALLOONED)
        self._name(found, Flag.FREE)
        return sum(frames for *_, frames in found)

    def _take(self, runs: Runs, flag: int) -> int:
        runs = list(runs)
        for gfn, _, frames in self._pieces(runs, Flag.SAMPLED):
            for frame in range(gfn, gfn + frames):
                self._p2m.touch(frame)
        gone: list[tuple[int, int]] = []
        with self._p2m.batch():
            for run in runs:  # one after the other, for a guest may name a frame twice
                found = self._pieces([run], OUTSIDE)
                self._name(found, flag)
                gone += [(word >> PAGE_SHIFT, n) for _, word, n in found if word & PRESENT]
        if gone:
            self._memory.host.frames.free_all(gone)
        count = sum(frames for _, frames in gone)
        self.given += count
        return count

    def give_untouched(self) -> int:
        """The frames in which nobody has ever written anything are free; how many went."""
        return self._take(list(self._holes()), Flag.FREE)

    def _holes(self) -> Iterator[tuple[int, int]]:
        fd = self._memory.host.memory.fd
        for gfn, pfn, frames in list(self._p2m):
            at, end = pfn, pfn + frames
            while at < end:
                try:
                    data = min(os.lseek(fd, at << PAGE_SHIFT, os.SEEK_DATA) >> PAGE_SHIFT, end)
                except OSError:  # nothing but holes up to the end of the host's memory
                    data = end
                if data > at:
                    yield gfn + at - pfn, data - at
                if data == end:
                    break
                at = os.lseek(fd, data << PAGE_SHIFT, os.SEEK_HOLE) >> PAGE_SHIFT

    def _name(self, pieces: Pieces, flag: int) -> None:
        """Nothing but this flag is there any more; pieces beside each other go at once."""
        for gfn, frames in _runs_of(pieces):
            self._p2m.take(gfn, frames, flag)

    def _pieces(self, runs: Runs, flag: int) -> Pieces:
        return [
            piece
            for gfn, count in runs
            if gfn < MOST
            for piece in self._p2m.pieces(gfn, min(gfn + count, MOST))
            if piece[1] & flag
        ]

    # --- looking ---

    @property
    def ballooned(self) -> int:
        """Frames that are in the balloon, and the host's."""
        return self._count()[0]

    @property
    def free(self) -> int:
        """Frames that are the host's because the guest does not need what was in them."""
        return self._count()[1]

    def _count(self) -> tuple[int, int]:
        """Both; all memory is gone through once after each change, however often they are asked."""
        if self._counted != (changes := self._p2m.changes):
            ballooned = free = 0
            for _, word, frames in self._all():
                ballooned += frames * bool(word & Flag.BALLOONED)
                free += frames * bool(word & Flag.FREE)
            self._counted, self._counts = changes, (ballooned, free)
        return self._counts

    def counts(self) -> dict[str, int]:
        """In frames: those that are the host's now, and what has become of them so far."""
        ballooned, free = self._count()
        return {
            "ballooned": ballooned, "free": free, "given": self.given, "fetched": self.fetched,
            "broken": self.broken,
        }  # fmt: skip

    def _runs(self, flag: int) -> list[tuple[int, int]]:
        return [(gfn, frames) for gfn, word, frames in self._all() if word & flag]

    def _all(self) -> Iterable[tuple[int, int, int]]:
        """All pieces of memory, if any frame is away."""
        return self._p2m.pieces() if self._p2m.absent else ()

    # --- owner of frames ---

    def touch(self, p2m: P2m, gfn: int) -> None:
        """The guest, or somebody for it, needs the frame: it gets another one, of zeros."""
        if p2m.word(gfn) & Flag.BALLOONED:
            self.broken += 1
        elif self._memory.is_lazy and self._fetch_block(gfn & -FRAMES):
            return
        p2m.map(gfn, self._memory.host.frame_for(p2m), 1)
        self.fetched += 1

    def _fetch_block(self, gfn: int) -> bool:
        """2 MBytes at once, if all of them are free, and the host has plenty."""
        host, word = self._memory.host, self._p2m.uniform(gfn, 2)
        if host.room is None or not host.room.is_ample or word is None or not word & Flag.FREE:
            return False
        try:
            self._p2m.map(gfn, host.frames.allocate(FRAMES, FRAMES), FRAMES)
        except OutOfFrames:
            return False
        self.fetched += FRAMES
        return True

    def write(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever protected."""
        raise GuestMemoryError(f"guest frame {gfn:#x} is protected, but not by the balloon")

    # --- snapshots ---

    def save(self) -> dict[str, Any]:
        """Which frames are gone, and what was counted, as plain values."""
        runs = self._runs(Flag.BALLOONED), self._runs(Flag.FREE)
        found: dict[str, Any] = plain(BalloonedState(*runs, self.given, self.fetched, self.broken))
        return found

    def load(self, saved: dict[str, Any]) -> None:
        """The same frames are gone from a memory that was just filled.  ValueError: not RAM."""
        state = restore(BalloonedState, saved, "balloon")
        for runs, flag in ((state.ballooned, Flag.BALLOONED), (state.free, Flag.FREE)):
            wanted = sum(frames for _, frames in runs)
            found = self._pieces(runs, PRESENT | Flag.FREE | flag)  # free: not filled yet
            if any(not frames for _, frames in runs) or wanted != sum(n for _, _, n in found):
                raise ValueError("snapshot: frames are in the balloon that are no RAM")
            self._take(runs, flag)
        self.given, self.fetched, self.broken = state.given, state.fetched, state.broken


def _runs_of(pieces: Pieces) -> list[tuple[int, int]]:
    """The same frames, whatever they are, as runs."""
    return joined([(gfn, frames) for gfn, _, frames in pieces])
