"""Shadow paging: what all techniques without EPT share.

Idea: the processor translates by tables of the hypervisor's own, from gva straight to hpa, that
combine the guest's tables with the p2m.  Source: lecture, "A reminder on shadow page tables"; Adams
and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".

The tables are Intel 64 ones for a guest in IA-32e mode and PAE ones for every other (also for one
that does not page yet: its tables map each gpa to its hpa).  Their accessed and dirty flags are
always set; the guest's are set by the walk that a hidden fault makes: an entry appears only when
the guest's entry has been used, and allows writes only when the guest's is dirty.

What each processor has for itself is its `view`; the guest's tables, the budget and all that the
p2m says are the VM's.

Invariants: the guest's tables are read where they lie; a frame is named only while the p2m names
it; every processor that can reach it hears (INVVPID) of each entry that was present and allows
less than it did.
"""

from abc import abstractmethod
from typing import Any, Final, Generic, TypeVar

from understudy.guest import Guest
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging import BUDGET, Paging
from understudy.paging.budget import Budgeted
from understudy.paging.guest_tables import GuestTables
from understudy.paging.guest_walk import ACCESSED, DIRTY, PRESENT, USER, WRITABLE
from understudy.paging.real_mode import RealMode
from understudy.paging.reverse_map import ENTRY_BYTES
from understudy.paging.view import NOW_AND_THEN, PE, ShadowView
from understudy.state import restore

TABLE: Final = PRESENT | WRITABLE | USER | ACCESSED
"""An entry that names a table and leaves all rights to the entries below."""
PAGE_ENTRY: Final = PRESENT | ACCESSED | DIRTY
AnyView = TypeVar("AnyView", bound=ShadowView)


class Shadow(Budgeted, Generic[AnyView]):
    """Tables of the hypervisor's own for the processors of one VM."""

    headroom = Budgeted.headroom + NOW_AND_THEN * ENTRY_BYTES

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.theirs, self.real_mode = GuestTables(host, p2m), RealMode(host, p2m)
        self.views: list[AnyView] = []
        self.lent: dict[int, ShadowView] = {}  # slots that lend for one instruction: whose it is
        self.read_u64, self.write_u64 = host.memory.read_u64, host.memory.write_u64
        self.hpas, self.look_up = self.theirs.hpas, self.theirs.look_up
        self.read_entry, self.large_frame = self.theirs.read_entry, self.theirs.large_frame

    def attach(self, guest: Guest) -> AnyView:
        super().attach(guest)
        self.views.append(self.new_view(guest))
        return self.views[-1]

    def prepare(self, cr0: int) -> None:
        if not cr0 & PE:
            self.real_mode.prepare()

    @abstractmethod
    def new_view(self, guest: Guest) -> AnyView:
        """What one more processor has of these tables."""

    def continue_counts(self, other: Paging) -> None:
        super().continue_counts(other)
        if isinstance(other, Shadow):
            self.real_mode.spells = other.real_mode.spells

    def close(self) -> None:
        self.real_mode.close()
        super().close()

    def store(self, gpa: int, size: int, value: int) -> None:
        self.theirs.store(gpa, size, value)

    def finish_steps(self) -> None:
        for view in self.views:
            view.finish_step()

    def put_back(self) -> None:
        """The same, without a look at what the instructions have written."""
        for view in self.views:
            view.put_back()

    def end_lending(self, slot: int) -> None:
        """The entry is about to be another: what it was before a step is not to come back."""
        if (view := self.lent.get(slot)) is not None:
            view.put_back()

    def forget(self, runs: Runs) -> None:
        """The p2m has changed here."""
        for view in self.views:
            view.forget()
        self.theirs.forget(runs)

    def forget_regions(self) -> None:
        """Tables of ours are other ones now."""
        for view in self.views:
            view.regions.clear()

    # --- looking, saving ---

    @property
    def real_mode_spells(self) -> int:
        return self.real_mode.spells

    @abstractmethod
    def save_tables(self) -> dict[str, Any]:
        """The tables, as plain values without host frames."""

    @abstractmethod
    def load_tables(self, saved: dict[str, Any]) -> None:
        """Make the tables anew."""

    def save(self) -> dict[str, Any]:
        steps = [view.save_step() for view in self.views]
        patched = [one for view in self.views for one in view.patched]
        now = [(slot, self.read_u64(slot)) for slot, _ in patched]
        for slot, entry in reversed(patched):
            self.write_u64(slot, entry)
        tables = self.save_tables()
        for slot, entry in now:
            self.write_u64(slot, entry)
        own = {"tables": tables, "steps": steps, "pool": len(self.pool)}
        return super().save() | own | {"spells": self.real_mode.spells}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self.hpas.clear()
        self.real_mode.spells = restore(int, saved["spells"], "spells")
        for view in self.views:
            view.read_regime()
        try:
            self.load_tables(saved["tables"])
            while len(self.pool) < saved["pool"]:
                self.pool.append(self.reserve.frame())
        except OutOfFrames as problem:
            raise ValueError(f"snapshot: tables beyond the budget: {problem}") from None
        if self.kept_bytes() > self.budget:
            raise ValueError("snapshot: more is noted of the tables than the budget allows")
        for view, step in zip(self.views, saved["steps"], strict=True):
            view.load_step(step)
