"""Lazy shadow paging: the first write to a page table unprotects it, until it must be believed.

Idea: a guest edits its tables in groups, and a change need not take effect before the guest says
so.  So only the first write to a table traps; from then on the guest writes freely, and at the next
synchronization point (a load of CR3, INVLPG, any flush) the shadow catches up and the table is
protected again.  Source: lecture, "The lazy shadow update approach".  Cost: one trace fault for
each group of writes to a table, and the comparison at the synchronization point.

Invariant: a shadow differs from the guest's table only if the table is in `unsync`; after a
synchronization point none is.
"""

from typing import Any

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging import BUDGET, Answer, Fault
from understudy.paging.entering import Place
from understudy.paging.guest_walk import Found
from understudy.paging.mirror import Mirror, MirrorView
from understudy.paging.shadow_page import indices
from understudy.paging.view import NOW_AND_THEN
from understudy.state import U9, restore

TRACED = Answer(Fault.TRACE)
LINE = 64  # bytes compared at once
PLACE_BYTES = 256  # of one that was entered
ENTRY = 8  # bytes, of the longest
SMALLEST = 4  # bytes that a write to a table likely has at least


class Lazy(Mirror, name="lazy"):
    """Trap once, catch up later."""

    headroom = Mirror.headroom + NOW_AND_THEN * PLACE_BYTES

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.unsync: dict[int, bytes] = {}  # gfn -> the table when its shadow last agreed with it
        self.entered: set[Place] = set()  # entries made since, which a table may not show any more
        self.resyncs = 0  # tables that were compared

    def may_write(self, gfn: int) -> bool:
        return gfn not in self.traced or gfn in self.unsync

    def trace(self, view: MirrorView, gva: int, error: int, found: Found) -> Answer:
        gfn = found.gpa >> PAGE_SHIFT
        self.make_room()
        self.unsync[gfn] = self.theirs.read_page(gfn)
        self.note_write(gfn, found.gpa & PAGE - 1, SMALLEST)
        view.enter(gva, error, found)
        if gfn not in self.traced:
            del self.unsync[gfn]
        self.settle()
        return TRACED

    def note_entered(self, places: list[Place]) -> None:
        self.entered.update(places)

    def table_written(self, gpa: int, length: int) -> None:
        """Of more than an entry, what it was before is not known any more: compare all there is."""
        gfn = gpa >> PAGE_SHIFT
        self.note_write(gfn, gpa & PAGE - 1, length)
        if length <= ENTRY and gfn not in self.unsync:
            self.apply(gpa, length)
        elif gfn in self.traced:
            self.unsync.setdefault(gfn, b"")
        self.settle()

    def synchronize(self) -> None:
        self.forget_regions()
        while self.unsync:
            gfn, before = self.unsync.popitem()
            pages = list(self.traced.get(gfn, ()))
            hpa = self.hpas.get(gfn) or self.look_up(gfn)
            if not pages or not hpa:
                continue
            self.resyncs += 1
            self.tables.protect(gfn)
            now = self.memory.read(hpa, PAGE)
            for page in pages:
                size = page.role.entry_bytes
                for offset in changed(before, now, size):
                    for index in indices(page, offset, size):
                        if page.hpa:  # else it has gone with what it hung from
                            self.resync(page, index)

        entered, self.entered = self.entered, set()
        for page, index in entered:
            if page.hpa and page.quadrant >= 0:
                self.resync(page, index)

    def kept_bytes(self) -> int:
        noted = PAGE * len(self.unsync) + PLACE_BYTES * len(self.entered)
        return super().kept_bytes() + noted

    def evict(self, target: int) -> None:
        """First what waits for a synchronization point, which may come at any time."""
        self.synchronize()
        super().evict(target)

    def save_tables(self) -> dict[str, Any]:
        unsync = [[gfn, before.hex()] for gfn, before in self.unsync.items()]
        entered = sorted([*page.key, index] for page, index in self.entered if page.hpa)
        kept = {"unsync": unsync, "entered": entered, "resyncs": self.resyncs}
        return super().save_tables() | kept

    def load_tables(self, saved: dict[str, Any]) -> None:
        self.unsync = {gfn: bytes.fromhex(before) for gfn, before in saved["unsync"]}
        super().load_tables(saved)
        pages, self.resyncs = self.tables.pages, saved["resyncs"]
        entered = restore(list[tuple[int, int, int, int, U9]], saved["entered"], "entered")
        self.entered = {(pages[tuple(key)], index) for *key, index in entered}


def changed(before: bytes, after: bytes, size: int) -> list[int]:
    """The offsets of the entries that differ; all, if it is not known what was before."""
    if not before:
        return list(range(0, PAGE, size))
    found: list[int] = []
    for line in range(0, PAGE, LINE):
        if before[line : line + LINE] != after[line : line + LINE]:
            entries = range(line, line + LINE, size)
            found += [at for at in entries if before[at : at + size] != after[at : at + size]]
    return found
