"""Eager shadow paging: every write to a page table traps, and takes effect at once.

Idea: a guest's tables are write-protected from their first use as tables; a write is carried out
in the guest's stead, and the shadow's entry changes with it.  Source: lecture, "How to efficiently
manage shadow page tables?" (the approach that the next slides improve on).  Cost: one trace fault
for each write to a table; no faults after a load of CR3, because the shadows are kept.

Invariant: between two instructions of the guest, every entry of a shadow says what the guest's
entry says.
"""

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.paging import Answer, Fault
from understudy.paging.guest_walk import Found
from understudy.paging.mirror import Mirror, MirrorView


class Eager(Mirror, name="eager"):
    """Trap, emulate, apply."""

    def may_write(self, gfn: int) -> bool:
        return gfn not in self.traced

    def trace(self, view: MirrorView, gva: int, error: int, found: Found) -> Answer:
        return Answer(Fault.TRACE, found.gpa)

    def table_written(self, gpa: int, length: int) -> None:
        self.note_write(gpa >> PAGE_SHIFT, gpa & PAGE - 1, length)
        self.apply(gpa, length)
        self.settle()
