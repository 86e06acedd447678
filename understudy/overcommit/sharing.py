"""Content-based page sharing: guest frames with the same contents become one, copy-on-write.

Idea: a scan hashes guest frames, one after the other, and looks each hash up.  Who is found there
is compared byte by byte; if both are the same, both guests read one host frame from now on.  What
is found in the table and is not shared is a *hint*: nobody protects it, so that its guest may
change it at no cost, and the comparison notices.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory".
Cost: a read of each frame and a hash of it, once a round of one that is shared; a write to one that
is shared costs one exit and one copy (see `machine.copy_on_write`, which is also what forked clones
share by).  What is as it was costs no call of a function of Python's: all of a batch is looked up
at once.
Invariants: frames of two groups are never shared, nor are their hashes ever the same by more than
chance; a frame is protected before the comparison that decides; a scan brings no frame back, fills
no hole, and changes nothing that a guest can read.
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, repeat
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frame_table import MOST
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import PRESENT, Flag
from understudy.overcommit.merging import Found, Match, Merger

BATCH: Final = 32  # frames that are read at once: few enough to be in a cache when hashed
GAP: Final = 4  # frames between two that are read at once: one more reading would cost more
WINDOW: Final = 1 << 12  # guest frames of which the p2m is asked at once
FEWEST: Final = 4096  # hashes that are in the table before any is given up
NEXT: Final = MOST + 1  # from the place of a frame to that of the next in a row, see `Member.place`
DEFAULT_GROUP: Final = ""

Hash = Callable[[memoryview, int], int]
"""(contents of a frame, salt) to a number; frames of different contents may have the same."""


class Member:
    """One guest's memory that takes part."""

    def __init__(self, p2m: P2m, salt: int, number: int) -> None:
        self.p2m, self.salt, self.number = p2m, salt, number
        self.next = 0  # the gfn at which its scan goes on

    def place(self, gfn: int, pfn: int) -> int:
        """`Found` as one number; `NEXT` more is the frame behind, if both go on in a row."""
        return (self.number * MOST + gfn) * MOST + pfn


class Sharing:
    """Looks for frames of guests on one host that have the same contents."""

    def __init__(self, host: Host, hash: Hash = xxh3_64_intdigest) -> None:
        self.scanned = 0
        """Frames that were hashed."""
        self._memory, self._frames, self._hash = host.memory, host.frames, hash
        self._buffer = memoryview(bytearray(BATCH * PAGE))
        self._pages = [self._buffer[at : at + PAGE] for at in range(0, BATCH * PAGE, PAGE)]
        self._merger = Merger(host)
        self._salts: dict[str, int] = {}
        self._members: dict[P2m, Member] = {}
        self._numbers = count()
        self._p2ms: dict[int, P2m] = {}  # by the number of its member
        self._turn = 0  # whose scan goes on
        self._read: set[int] = set()  # shared frames (pfn) that were read in this round
        self._found: dict[int, int] = {}  # hash: place
        self._most = FEWEST  # of them, before it is looked whether there are too many

    @property
    def merged(self) -> int:
        """Frames that became another's."""
        return self._merger.merged

    @property
    def refused(self) -> int:
        """Frames whose equal hash was not enough."""
        return self._merger.refused

    # --- who takes part ---

    def join(self, p2m: P2m, group: str = DEFAULT_GROUP) -> None:
        """A guest's memory takes part from now on; it shares with those of its group alone."""
        if p2m in self._members:
            raise ValueError("this memory takes part in sharing already: let it leave first")
        salt = self._salts.setdefault(group, secrets.randbits(64))
        member = self._members[p2m] = Member(p2m, salt, next(self._numbers))
        self._p2ms[member.number] = p2m

    def leave(self, p2m: P2m) -> None:
        """A guest's memory takes no part any more; what it shares, it shares until it writes."""
        if p2m not in self._members:
            return
        self._turn -= list(self._members).index(p2m) < self._turn
        member = self._members.pop(p2m)
        del self._p2ms[member.number]
        low, high = member.place(0, 0), member.place(MOST, 0)
        self._found = {at: place for at, place in self._found.items() if not low <= place < high}

    @property
    def hints(self) -> int:
        """Frames in the table that nobody protects."""
        return self.hints_by().total()

    def hints_by(self) -> Counter[P2m]:
        """The same by guest."""
        latest = {place // MOST: place for place in self._found.values()}  # one of each frame
        return Counter(
            found.p2m for found in map(self._at, latest.values())
            if found.is_there() and not found.p2m.word(found.gfn) & Flag.SHARED
        )  # fmt: skip

    def _at(self, place: int) -> Found:
        where, pfn = divmod(place, MOST)
        number, gfn = divmod(where, MOST)
        return Found(self._p2ms[number], gfn, pfn)

    def _place(self, found: Found) -> int:
        return self._members[found.p2m].place(found.gfn, found.pfn)

    # --- scanning ---

    def scan(self, pages: int) -> int:
        """Go on with so many guest frames, or once around; returns how many became another's."""
        before, members = self.merged, list(self._members.values())
        turns = len(members)
        if turns and members[self._turn % turns].next:
            turns += 1  # it ends where it has begun
        while pages > 0 and turns:
            self._turn %= len(members)
            member = members[self._turn]
            if not self._turn and not member.next:
                self._read.clear()
            pages = self._scan_member(member, pages)
            if pages:  # it has come to the end
                member.next, self._turn, turns = 0, self._turn + 1, turns - 1
        if len(self._found) > self._most:
            self._tidy()
        return self.merged - before

    def _tidy(self) -> None:
        """One hash of each frame is enough; not worth the time while there are no more than two."""
        frames = sum(size for p2m in self._members for _, _, size in p2m.pieces())
        self._most = max(FEWEST, 2 * frames)
        if len(self._found) > self._most:
            latest = {place // MOST: number for number, place in self._found.items()}
            self._found = {number: self._found[number] for number in latest.values()}

    def look_up(self, p2m: P2m, gfn: int) -> bool:
        """Whether this frame, looked up now, has become another's, and its own is free."""
        member, pfn, before = self._members.get(p2m), p2m.lookup(gfn), self.merged
        if member is not None and pfn is not None:
            self._scan_rows(member, [(gfn, pfn, 1)])
        return self.merged > before

    def _scan_member(self, member: Member, pages: int) -> int:
        """The rest of one guest's frames, or so many; returns how many of them are left over."""
        p2m, read = member.p2m, self._read
        while pages:
            ahead = p2m.pieces(member.next)
            first = next((gfn for gfn, word, _ in ahead if word & PRESENT), None)
            if first is None:
                break
            member.next = first + min(WINDOW, pages)
            rows = []
            for gfn, word, frames in list(p2m.pieces(first, member.next)):
                if word & PRESENT:
                    pages -= frames
                    pfn = word >> PAGE_SHIFT
                    # (The first is what `_is_unread` says, which is a call for each.)
                    if frames == 1 and pfn in read and word & Flag.SHARED:
                        continue
                    if not word & Flag.SHARED or self._is_unread(p2m, gfn, pfn, frames):
                        rows.append((gfn, pfn, frames))
            self._scan_rows(member, rows)
        return pages

    def _is_unread(self, p2m: P2m, gfn: int, pfn: int, frames: int) -> bool:
        """Whether nobody has read these shared frames in this round.

        Nobody can write to them: who reads one has read it for all that have it.
        """
        row = range(pfn, pfn + frames)
        if self._read.issuperset(row):
            return False
        self._read.update(row)
        self._end_sharing(p2m, gfn, pfn, frames)
        return True

    def _scan_rows(self, member: Member, rows: list[tuple[int, int, int]]) -> None:
        """(gfn, pfn, frames): what is near each other on the host is read at once."""
        near: list[tuple[int, int, int]] = []
        met: list[tuple[int, int]] = []
        low = end = 0
        for gfn, pfn, frames in rows:
            while frames:
                if not (near and end <= pfn <= end + GAP and pfn < low + BATCH):
                    met += self._scan_near(member, near)
                    near, low = [], pfn
                some = min(frames, low + BATCH - pfn)
                near.append((gfn, pfn, some))
                gfn, pfn, frames = gfn + some, pfn + some, frames - some
                end = pfn
        self._meet(met + self._scan_near(member, near))

    def _scan_near(self, member: Member, rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """At most `BATCH` frames; (hash, place) of those whose hash another has.

        By the file: looking at a hole of a mapping fills it.
        """
        if not rows:
            return []
        low, last = rows[0][1], rows[-1]
        size = last[1] + last[2] - low << PAGE_SHIFT
        os.preadv(self._memory.fd, [self._buffer[:size]], low << PAGE_SHIFT)
        pages: list[memoryview] = []
        places: list[int] = []
        base = member.place(0, 0)
        for gfn, pfn, frames in rows:
            first = base + gfn * MOST + pfn  # as `place`, which is a call for each row
            pages += self._pages[pfn - low : pfn - low + frames]
            places += range(first, first + frames * NEXT, NEXT)
        self.scanned += len(pages)
        numbers = list(map(self._hash, pages, repeat(member.salt)))
        known = list(map(self._found.setdefault, numbers, places))
        if known == places:
            return []
        met = zip(numbers, places, known, strict=True)
        return [(number, place) for number, place, other in met if other != place]

    def _meet(self, met: list[tuple[int, int]]) -> None:
        """(hash, place): another guest frame had the same hash, when it was looked at."""
        while met:
            refused = self._merger.merge(self._matches(met))
            met = [
                (number, self._place(match.one) + n * NEXT)
                for match in refused for n, number in enumerate(match.numbers)
            ]  # fmt: skip
            # What was there has gone or changed, or is as rare: others are compared with this one.
            self._found.update(reversed(met))

    def _matches(self, met: list[tuple[int, int]]) -> Iterator[Match]:
        """The same as rows, each with those that the table has; without who is in the table."""
        numbers: list[int] = []
        begin = other = last = there = step = 0
        for number, place in met:
            known = self._found[number]
            if known == place:
                continue
            apart = known - there
            if not numbers or place != last + NEXT or (apart != step and (apart or numbers[1:])):
                if numbers:
                    yield Match(numbers, self._at(begin), self._at(other), step // NEXT)
                numbers, begin, other, apart = [], place, known, NEXT
            numbers.append(number)
            last, there, step = place, known, apart
        if numbers:
            yield Match(numbers, self._at(begin), self._at(other), step // NEXT)

    def _end_sharing(self, p2m: P2m, gfn: int, pfn: int, frames: int) -> None:
        """What has no other owner any more needs no protection, and pages may be large again."""
        if sole := self._frames.sole(pfn, frames):
            with p2m.batch():
                if sole == frames:
                    p2m.unprotect(gfn, frames, Flag.SHARED)
                    return
                for n in range(frames):
                    if self._frames.references(pfn + n) == 1:
                        p2m.unprotect(gfn + n, 1, Flag.SHARED)


class Use(NamedTuple):
    """What guests have of their host's frames; the first three add up to what they see."""

    own: int  # guest frames whose host frame is theirs alone
    shared: int  # guest frames whose host frame has other owners, too
    absent: int  # guest frames that were taken away
    zero: int  # of the shared: those that are all zero
    consumed: int  # host frames behind all of them
    saved: int  # host frames that there would be more without sharing


def use(host: Host, p2ms: list[P2m]) -> Use:
    """The accounts of these guests together; of one alone, `saved` counts what it shares inside."""
    own = shared = absent = zero = 0
    seen: dict[int, bool] = {}  # pfn of a shared frame -> whether it is all zero
    for p2m in p2ms:
        for _, word, frames in p2m.pieces():
            if not word & PRESENT:
                absent += frames
                continue
            first = word >> PAGE_SHIFT
            single = host.frames.sole(first, frames)
            own += single
            if single == frames:
                continue
            for pfn in range(first, first + frames):
                if host.frames.references(pfn) > 1:
                    shared += 1
                    if pfn not in seen:
                        seen[pfn] = not any(host.contents(pfn))
                    zero += seen[pfn]
    return Use(own, shared, absent, zero, own + len(seen), shared - len(seen))
