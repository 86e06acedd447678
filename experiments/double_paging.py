"""What the host has swapped out, its guest swaps out, too: read in only to be written again.

Claim: a guest of F frames uses more pages than that and swaps by itself, the one used longest ago
first. Its host has H < F frames for it. If the host swaps, pages are read from its swap file only
to be written to the guest's disk, whatever frame it chooses; the fewest if it chooses at random.
If the guest's balloon takes F - H frames, there is none, and the guest reads and writes
exactly as much as in a machine of H frames.

Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, "Reclamation
Mechanisms": the double paging problem; "Page Replacement": random, so that host and guest do not
conspire.

Control: a host with all F frames reads nothing.

Note: the guest's pager is a few lines here; its frames, the host's swap file and the balloon are
the real ones. The counts are pages.
"""

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from understudy.arch.address import PAGE
from understudy.lab import Bar, Experiment, Row, Table, absent, control, every, true
from understudy.machine.ballooned import Ballooned
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.swap import Swap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES: Final = 128
FEWER: Final = 96  # H
PAGES: Final = 160  # that the guest uses
STEPS: Final = 3000
BALLOON, SMALLER, ALL = "balloon", "a smaller machine", "all frames there"
SWAPS: Final = ("random", "clock", "oldest")


class Pager:
    """A guest that swaps: its pages by number, in frames or on its disk."""

    def __init__(self, memory: GuestMemory, frames: int, swap: Swap) -> None:
        self._memory, self._swap = memory, swap
        self._free = list(range(frames))
        self._there: OrderedDict[int, int] = OrderedDict()  # page: gfn, the last one used last
        self._disk: dict[int, bytes] = {}
        self._stamps: dict[int, int] = {}  # what was written to a page last
        self.written = self.read = self.twice = self.wrong = 0

    def use(self, page: int, stamp: int) -> None:
        """Read what is in a page, and write to it."""
        if page not in self._there:
            gfn = self._free.pop() if self._free else self._evict()
            if page in self._disk:
                self._memory.write(gfn * PAGE, self._disk.pop(page))
                self.read += 1
            self._there[page] = gfn
        self._there.move_to_end(page)
        gpa = self._there[page] * PAGE
        found = self._memory.read_u64(gpa)
        self.wrong += page in self._stamps and found != self._stamps[page]
        self._stamps[page] = stamp
        self._memory.write_u64(gpa, stamp)

    def _evict(self) -> int:
        """The page that was used longest ago: its disk takes it."""
        page, gfn = self._there.popitem(last=False)
        before = self._swap.read
        self._disk[page] = self._memory.read(gfn * PAGE, PAGE)
        self.twice += self._swap.read - before
        self.written += 1
        return gfn

    def give(self, count: int) -> list[tuple[int, int]]:
        """Frames for the balloon."""
        return [(self._free.pop() if self._free else self._evict(), 1) for _ in range(count)]


def measure(means: str) -> Row:
    """The guest uses pages at random; after each step the host has no more frames than it may."""
    frames = FEWER if means == SMALLER else FRAMES
    most = FRAMES if means == ALL else FEWER
    chance = random.Random(1)
    with Host((FRAMES + 64) * PAGE) as host:
        memory = GuestMemory(host, frames * PAGE)
        memory.spare.close()
        memory.populate()
        ballooned = Ballooned(memory)
        policy = means if means in SWAPS else "random"
        with Swap(host, FRAMES * PAGE, policy) as swap:
            swap.join(memory.p2m)
            pager = Pager(memory, frames, swap)
            if means == BALLOON:
                ballooned.inflate(pager.give(FRAMES - FEWER))
            most_there = 0
            for step in range(STEPS):
                pager.use(chance.randrange(PAGES), step)
                there = frames - memory.p2m.absent
                if there > most:
                    swap.reclaim(memory.p2m, there - most)
                most_there = max(most_there, frames - memory.p2m.absent)
            row = {
                "guest_written": pager.written, "guest_read": pager.read,
                "host_written": swap.written, "host_read": swap.read, "twice": pager.twice,
                "out": swap.swapped, "wrong": pager.wrong, "most_there": most_there,
            }  # fmt: skip
            swap.drop(memory.p2m)
        memory.close()
    return row


def name(row: Row) -> str:
    """Which point it is."""
    return str(row["means"])


def check(table: Table) -> list[Bar]:
    """What is read only to be written, and what the guest does by itself."""
    by = {row["means"]: row for row in table}
    swaps = [by[means] for means in SWAPS if means in by]
    twice = {row["means"]: row["twice"] for row in swaps}
    found = ", ".join(f"{means}: {count}" for means, count in twice.items())

    def some(means: str) -> Bar:
        has = by[means]["twice"] > 0 if means in by else None
        return true("pages are read in only to be written out", has, means)

    small, whole = by.get(SMALLER, {}), by.get(ALL, {})
    return [
        true("if the host swaps, pages are read in only to be written out",
             all(twice.values()) if swaps else None, found),
        true("the fewest if it chooses at random",
             min(twice, key=twice.__getitem__) == "random" if len(twice) == len(SWAPS) else None,
             found),
        every("what was read was written before, or is still out", table,
              lambda r: r["host_read"] + r["out"], lambda r: r["host_written"], name=name),
        every("of its host's swapping the guest notices nothing", swaps,
              lambda r: (r["guest_written"], r["guest_read"]),
              lambda r: (whole.get("guest_written"), whole.get("guest_read")), name=name),
        every("with a balloon the guest does exactly what it does in a smaller machine",
              table.where(means=BALLOON), lambda r: (r["guest_written"], r["guest_read"]),
              lambda r: (small.get("guest_written"), small.get("guest_read")), name=name),
        every("and its host reads and writes nothing", table.where(means=BALLOON),
              lambda r: (r["host_read"], r["host_written"]), lambda r: (0, 0), name=name),
        every("no byte is another one afterwards", table,
              lambda r: r["wrong"], lambda r: 0, name=name),
        every("the host has no more frames than it may", table, lambda r: r["most_there"],
              lambda r: FRAMES if r["means"] == ALL else FEWER, name=name),
        absent(every("a host with all frames reads nothing", table.where(means=ALL),
                     lambda r: r["host_read"], lambda r: 0, name=name)),
        control("under a balloon none is read only to be written", some(BALLOON)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """What both read and write."""
    from understudy.lab.figure import bars

    counts = ("guest_written", "guest_read", "host_written", "host_read", "twice")
    rows = list(table)
    series = {what.replace("_", " "): [row[what] for row in rows] for what in counts}
    bars(figure.add_subplot(), [row["means"] for row in rows], series, "pages")


EXPERIMENT = Experiment(
    measure=measure,
    guest="a pager, whose memory is filled from outside",
    sweep={"means": [*SWAPS, BALLOON, SMALLER, ALL]},
    slide=37,
    check=check,
    draw=draw,
)
