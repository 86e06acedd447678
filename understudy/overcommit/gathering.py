"""Large pages again: frames that were shared one by one, and are not any more, come into a row.

Idea: who writes to a shared frame gets a copy, which lies anywhere.  Where nothing in 2 MBytes of
a guest is shared, protected or away, the contents are copied into frames that lie in a row, so that
one entry can map them all.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Sharing Memory"; SDM 3C,
"EPT Translation Mechanism" (pages of 2 MBytes).
Cost: 2 MBytes are read and written, while nobody of the VM executes.
Invariants: what a guest can read does not change; a frame with a second owner (an image, a clone, a
device that uses it) stays where it is; a hole stays one.
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import FLAGS, FRAMES, PRESENT

AT_ONCE: Final = 8  # large pages of one guest
ZEROS: Final = bytes(PAGE)


class Gathering:
    """Looks for large pages of guests that could be whole."""

    def __init__(self, host: Host) -> None:
        self.gathered = 0
        """Large pages that were made whole, ever."""
        self._host = host
        self._next: dict[P2m, int] = {}  # gfn at which the look goes on

    def leave(self, p2m: P2m) -> None:
        """A guest is no more."""
        self._next.pop(p2m, None)

    def look(self, p2m: P2m) -> int:
        """Go through a guest once, or until some large pages are whole again; how many are.

        For want of frames in a row nothing happens.
        """
        first, made = self._next.get(p2m, 0), 0
        blocks = p2m.blocks()
        for gfn in [gfn for gfn in blocks if gfn >= first] + [gfn for gfn in blocks if gfn < first]:
            if made == AT_ONCE:
                self._next[p2m] = gfn
                break
            made += self._is_fit(p2m, gfn) and self._gather(p2m, gfn)
        return made

    def _is_fit(self, p2m: P2m, gfn: int) -> bool:
        """All there and nobody else's, but not in a row."""
        whole, frames = p2m.row(gfn, FRAMES)
        if frames == FRAMES and whole >> PAGE_SHIFT & FRAMES - 1 == 0:
            return False
        sole, there = self._host.frames.sole, 0
        for _, word, n in p2m.pieces(gfn, gfn + FRAMES):
            if word & FLAGS != PRESENT or sole(word >> PAGE_SHIFT, n) < n:
                return False
            there += n
        return there == FRAMES

    def _gather(self, p2m: P2m, gfn: int) -> bool:
        host = self._host
        try:
            new = host.frames.allocate(FRAMES, FRAMES)
        except OutOfFrames:
            return False
        p2m.halt()  # nobody writes from here on
        old = [(word >> PAGE_SHIFT, n) for _, word, n in p2m.pieces(gfn, gfn + FRAMES)]
        pfns = [pfn for first, n in old for pfn in range(first, first + n)]
        for to, pfn in enumerate(pfns, new):
            if (contents := host.contents(pfn)) != ZEROS:
                host.memory.write(to << PAGE_SHIFT, contents)
        p2m.map(gfn, new, FRAMES)
        host.frames.free_all(old)
        self.gathered += 1
        return True
