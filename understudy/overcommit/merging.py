"""Guest frames that seem to be alike become one host frame, copy-on-write, if they are.

What is alike goes together: a kernel is in frames in a row in each guest, what was never written to
is zeros for megabytes.  So a match is of guest frames in a row with others in a row, or with one
alone.  All matches go through each step together (compare what may have changed, protect, compare,
move, free), and what a step costs is paid once for a row.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory".
Cost: both frames of each pair are read and compared, twice if nobody protects the other one; page
tables hear twice of all; frames in a row are given back to the computer by one call.
Invariants: a frame is protected before the comparison that decides; nothing that a guest can read
is changed; nothing is done with frames that are not there any more, or that a device has, too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, repeat
from typing import NamedTuple, Self

from understudy.arch.address import PAGE_SHIFT
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import PRESENT, PROTECTED, Flag


class Found(NamedTuple):
    """Where contents with a certain hash were seen."""

    p2m: P2m
    gfn: int
    pfn: int

    def is_there(self) -> bool:
        """Whether this guest frame is still that host frame."""
        return self.p2m.lookup(self.gfn) == self.pfn

    def ahead(self, frames: int) -> "Found":
        """The one that is so many further, if both go on in a row."""
        return Found(self.p2m, self.gfn + frames, self.pfn + frames)


class Row(NamedTuple):
    """Guest frames in a row, and on the host, too."""

    p2m: P2m
    gfn: int
    pfn: int
    frames: int


class Match(NamedTuple):
    """Guest frames in a row, from `one` on; each had the hash of its counterpart."""

    numbers: list[int]  # those hashes
    one: Found
    other: Found
    step: int  # 1: the counterparts are a row, too; 0: all have the same one
    ours: int = 0  # what the p2m says of the first, once that is looked up
    theirs: int = 0

    @property
    def frames(self) -> int:
        """How many."""
        return len(self.numbers)

    @property
    def rows(self) -> tuple[Row, Row]:
        """The guest frames of both."""
        frames = len(self.numbers)
        return Row(*self.one, frames), Row(*self.other, frames if self.step else 1)

    def part(self, low: int, high: int) -> Self:
        """Some of them."""
        if high - low == len(self.numbers):
            return self
        one, other = self.one.ahead(low), self.other.ahead(low * self.step)
        return self._replace(numbers=self.numbers[low:high], one=one, other=other)

    def pairs(self) -> Iterable[tuple[int, int]]:
        """The host frames (pfn) that are compared."""
        first, other, frames = self.one.pfn, self.other.pfn, len(self.numbers)
        if frames == 1:
            return ((first, other),)
        others = range(other, other + frames) if self.step else repeat(other, frames)
        return zip(range(first, first + frames), others, strict=True)


class Merger:
    """Makes frames of one host the same."""

    def __init__(self, host: Host) -> None:
        self.merged = self.refused = 0
        """Guest frames that got another's host frame; whose equal hash was not enough."""
        self._memory, self._frames = host.memory, host.frames
        self._owner = CopyOnWrite(host)

    def merge(self, matches: Iterable[Match]) -> list[Match]:
        """Make each match one.  Returns those of which this is better in the table than that.

        `one` is of the same guest in all of them, and each of its frames in one match only.
        """
        gone: list[Match] = []
        parts = [part for match in matches for part in self._now(match, gone)]
        return gone + self._try(parts)

    def _now(self, match: Match, gone: list[Match]) -> Iterator[Match]:
        """Its parts that can be made one: in each the frames of either side are in one state."""
        at = 0
        while at < match.frames:
            part = self._state(match.part(at, match.frames))
            frames = part.frames
            at += frames
            ours, theirs, pfn, other = part.ours, part.theirs, part.one.pfn, part.other.pfn
            is_good = theirs & PRESENT and theirs >> PAGE_SHIFT == other
            if not theirs & Flag.SHARED:  # it is still for the table, unless many have ours
                is_pinned = self._is_pinned(other, frames if part.step else 1)
                is_good = is_good and not ours & Flag.SHARED and not is_pinned
            if not is_good:
                gone.append(part)
            elif pfn != other and (ours & Flag.SHARED or not self._is_pinned(pfn, frames)):
                yield part

    def _state(self, match: Match) -> Match:
        """As much of its begin as is in one state, and which."""
        one, other, step, frames = match.one, match.other, match.step, match.frames
        ours, frames = one.p2m.row(one.gfn, frames)
        theirs, row = other.p2m.row(other.gfn, frames if step else 1)
        if frames > 1:
            frames = min(frames, row) if step else frames
            if not step and one.pfn <= other.pfn < one.pfn + frames:  # it is one of them itself
                frames = other.pfn - one.pfn or 1
            for word, pfn in ((ours, one.pfn), (theirs, other.pfn))[: 1 + step]:
                if not word & Flag.SHARED and self._is_pinned(pfn, frames):
                    frames = _alike(self._frames.references, pfn, frames)
        return match.part(0, frames)._replace(ours=ours, theirs=theirs)

    def _is_pinned(self, pfn: int, frames: int) -> bool:
        """Whether frames that are not shared have other owners.

        Those are devices, which may write whatever the p2m protects.
        """
        if frames == 1:
            return self._frames.references(pfn) > 1
        return self._frames.sole(pfn, frames) < frames

    def _try(self, matches: list[Match]) -> list[Match]:
        """Of those that are there: returns those that are not alike."""
        hints = [match for match in matches if not match.theirs & Flag.SHARED]
        shared = [match for match in matches if match.theirs & Flag.SHARED]
        hints, refused = self._compare(hints)  # nobody protects them: they may have changed
        new = self._protect(hints + shared)
        alike, late = self._compare(hints + shared)
        if late:  # an equal hash was not enough, or a guest in another thread has written
            self._let_be(new, alike)
        self._join(alike)
        self.refused += sum(match.frames for match in refused + late)
        return refused + late

    def _compare(self, matches: list[Match]) -> tuple[list[Match], list[Match]]:
        """Who is alike, and who is not."""
        told = self._are_equal([pair for match in matches for pair in match.pairs()])
        if all(told):
            return matches, []
        alike: list[Match] = []
        others: list[Match] = []
        begin = 0
        for match in matches:
            at = 0
            for is_alike, some in groupby(map(bool, told[begin : begin + match.frames])):
                end = at + len(list(some))
                (alike if is_alike else others).append(match.part(at, end))
                at = end
            begin += match.frames
        return alike, others

    def _are_equal(self, pairs: list[tuple[int, int]]) -> Sequence[int]:
        return self._memory.alike(pairs)

    def _protect(self, matches: list[Match]) -> list[Row]:
        """Guest frames that are going to be shared; returns those that were not yet."""
        new = [
            row for match in matches
            for row, word in zip(match.rows, (match.ours, match.theirs), strict=True)
            if not word & Flag.SHARED
        ]  # fmt: skip
        with ExitStack() as batches:
            for p2m in dict.fromkeys(row.p2m for row in new):
                batches.enter_context(p2m.batch())
                p2m.owners[Flag.SHARED] = self._owner
            for row in new:
                row.p2m.protect(row.gfn, row.frames, Flag.SHARED)
        return new

    def _let_be(self, new: list[Row], alike: list[Match]) -> None:
        """Of what was protected for nothing."""
        kept = {(row.p2m, gfn) for match in alike for row in match.rows for gfn in _gfns(row)}
        for row in new:
            for gfn in _gfns(row):
                if (row.p2m, gfn) not in kept:
                    row.p2m.unprotect(gfn, 1, Flag.SHARED)

    def _join(self, matches: list[Match]) -> None:
        """Both sides are protected, and the same: one host frame is enough for each pair."""
        if not matches:
            return
        self._frames.share_all([(two.other.pfn, two.frames) for two in matches if two.step])
        for match in matches:
            if not match.step:
                self._frames.share(match.other.pfn, 1, match.frames)
        p2m = matches[0].one.p2m
        with p2m.batch():
            for match in matches:
                put = p2m.map if match.step else p2m.map_same
                flags = match.ours & PROTECTED | Flag.SHARED
                put(match.one.gfn, match.other.pfn, match.frames, flags)
        self._frames.free_all([(match.one.pfn, match.frames) for match in matches])
        self.merged += sum(match.frames for match in matches)


def _gfns(row: Row) -> range:
    return range(row.gfn, row.gfn + row.frames)


def _alike(owners: Callable[[int], int], pfn: int, frames: int) -> int:
    """How many frames of a row have one owner, as the first has, or more, as the first has."""
    return len(list(next(groupby(range(pfn, pfn + frames), lambda at: owners(at) == 1))[1]))
