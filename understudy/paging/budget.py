"""A budget for tables that grow with what the guest does, and for what is noted of them.

A guest can make its tables so that a hypervisor's own would grow without end.  So there is a limit
in bytes.  Before a walk that would go over it, tables are dropped that no fault has needed for
long; the guest's next access there makes them again.

Which tables the processor has used since is not asked: its accessed flags depend on what its TLB
holds, of which a snapshot knows nothing, and two runs must evict the same.

Source: ours; docs/decisions/0039-tables-have-a-budget.md.
Invariant: tables, and what is noted of them, take no more bytes than the budget, and their frames
are set aside from the beginning.
"""

from abc import abstractmethod
from typing import ClassVar, Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.paging import BUDGET, Paging

TABLE_BYTES: Final = PAGE + 1024  # a table, and the objects beside it
DEEPEST: Final = 4  # tables that one walk may add


class Budgeted(Paging):
    """What such techniques share: tables in use, and tables kept for the next use."""

    headroom: ClassVar[int] = DEEPEST * TABLE_BYTES  # bytes that may come before anybody looks

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.memory = host.memory
        self.limit = budget - self.headroom
        self.pool: list[int] = []  # frames for tables, not in use now

    def most_tables(self) -> int:
        return self.budget // PAGE

    @abstractmethod
    def kept_bytes(self) -> int:
        """What tables, and what is noted of them, take now."""

    @abstractmethod
    def evict(self, target: int) -> None:
        """Drop tables, those first that were not needed lately, until no more bytes are kept."""

    @property
    def is_over(self) -> bool:
        """Whether the next walk may take more than the budget."""
        return self.kept_bytes() > self.limit

    def new_table(self) -> int:
        """The hpa of an empty table."""
        if self.pool:
            hpa = self.pool.pop()
            self.memory.fill(hpa, PAGE)
            return hpa
        return self.reserve.frame()

    def make_room(self) -> None:
        """See to it that one walk more does not take more than the budget.

        Only where the guest goes on with the instruction that faulted: what carries it out in the
        guest's stead fetches it by these tables.
        """
        if not self.is_over:
            return
        self.drain()
        target = self.limit - self.limit // 8  # so that not each new table costs another
        if self.kept_bytes() > target:
            self.evict(target)

    def thin(self) -> None:
        self.evict(0)
        self.drain()

    def drain(self) -> None:
        """Keep no tables for later."""
        while self.pool:
            self.reserve.release(self.pool.pop() >> PAGE_SHIFT)
