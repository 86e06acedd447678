"""Memory virtualisation: how a guest's page tables become something the processor may use.

One technique a file.  The interface is the events that a guest causes; a technique answers those
it cares about.  Modules here that are not techniques: `guest_walk` reads a guest's own tables;
`ept_entry` is what an EPT's entry says; `shadow` is what all techniques without EPT share, with
`view`, what each processor has of them, `guest_tables`, `real_mode`, and `portable`, tables as a
snapshot keeps them; `mirror` is what `eager` and `lazy` share, with `entering`, `shadow_pages`,
`reverse_map`, `roles` and `untrace`.

What belongs to a VM is in its `Paging`; what belongs to one of its processors, which has loaded
registers and a root of its own, in that one's `View`.

Invariants of every technique, for every processor, every gva and at every guest instruction:
  * never stale: what the processor may do, the guest's tables allow, or allowed when it last
    had to flush;
  * eventually complete: an access that they allow succeeds, after finitely many exits.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from understudy.closed import let_go
from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.machine.reserve import Reserve
from understudy.paging.machine_frames import HostMemory
from understudy.state import plain, restore

NOTHING: frozenset[int] = frozenset()
BUDGET: Final = 8 << 20  # bytes


Memory = TypeVar("Memory")


class PagingError(Exception):
    """The tables and the processor disagree: a defect of ours, or of the silicon."""


class Fault:
    """What a fault is (Adams and Agesen, "A Comparison of Software and Hardware Techniques for
    x86 Virtualization")."""

    TRUE: Final = "true"  # the guest's own: its tables refuse the access
    HIDDEN: Final = "hidden"  # they allow it, and now the hypervisor's do, too
    TRACE: Final = "trace"  # a write to a table that is write-protected to see it
    DEVICE: Final = "device"  # there is no RAM: an access to a device


class Answer(NamedTuple):
    """What a technique says of a fault that is not the guest's own."""

    kind: str  # one of `Fault`
    gpa: int | None = None  # where the access goes, if it is to be carried out


class View:
    """What one virtual processor has of a technique: the events that its guest causes."""

    takes_turns: ClassVar[bool] = False
    """Its guest's events change tables that others use: one processor executes at a time."""

    def __init__(self, paging: "Paging", guest: Guest) -> None:
        self.paging, self.guest = paging, guest
        self.eptp = paging.eptp  # 0: the processor translates by shadows now
        self.watched_cr0 = 0  # with EPT: bits of CR0 whose changes decide how it translates

    def begin_turn(self) -> None:
        """This processor is going to execute, perhaps after another."""

    def adapt(self, cr0: int) -> bool:
        """CR0 is going to be this: whether the processor translates by EPT, or not any more.

        True: it has changed; `eptp` says how it is now.  OutOfFrames: nothing has changed.
        """
        return False

    def violation(self, gpa: int, qualification: int) -> bool:
        """An access that the EPT refused.  True: it now allows it, resume the guest."""
        return self.paging.violation(gpa, qualification)

    def misconfiguration(self, gpa: int) -> PagingError:
        """The processor has met an EPT entry that no processor accepts: what is wrong, in words."""
        return self.paging.misconfiguration(gpa)

    def store(self, gpa: int, size: int, value: int) -> None:
        """Carry out the guest's write to a traced table, inside one page."""
        self.paging.store(gpa, size, value)

    def page_fault(self, gva: int, error: int) -> Answer:
        """A #PF reached the hypervisor.  Raises GuestFault if it is the guest's own."""
        raise PagingError(f"#PF at {gva:#x}, error code {error:#x}: none was asked for")

    def single_step(self, gva: int, error: int) -> None:
        """The write of a trace fault cannot be carried out: let the processor do it, watched."""
        raise PagingError(f"a step at {gva:#x}, error code {error:#x}: nothing is traced")

    def finish_step(self) -> None:
        """The instruction that was let through is done."""

    def mode_change(self) -> None:
        """The guest has written CR0, CR4 or EFER, or all its registers were set."""

    def cr3_write(self) -> None:
        """The guest has loaded CR3."""
        self.flush()

    def invlpg(self, gva: int) -> None:
        """The guest has dropped its translations of one page."""
        self.guest.invalidate([gva])

    def flush(self) -> None:
        """The guest has dropped all translations of its address space."""
        self.guest.invalidate()

    def tables_memory(self, memory: Memory) -> "Memory | HostMemory":
        """What the guest's own tables name addresses of: its memory, unless it names the host's."""
        return memory

    def fetch(self, gva: int, length: int) -> bytes:
        """Guest code that a processor does not find by these tables, which need not be complete.

        Fewer bytes, or none, where the guest's own tables lead to none either.
        """
        return b""


@dataclass
class PagingState:
    """What every technique counts."""

    fills: int
    flushes: int
    evictions: int
    faults: dict[str, int]


class Paging(ABC):
    """One technique for one VM.  Subclass with `class Ept(Paging, name="ept")`."""

    ALL: ClassVar[dict[str, type["Paging"]]] = {}
    """Those under which any guest runs."""
    PV: ClassVar[dict[str, type["Paging"]]] = {}
    """Those of which a guest has to know."""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str = "", is_for_any: bool = True) -> None:
        """A subclass without a name is no technique but what several share."""
        super().__init_subclass__()
        if not name:
            return
        if name in Paging.ALL | Paging.PV:
            raise TypeError(f"two paging techniques are named {name!r}")
        cls.name = name
        (Paging.ALL if is_for_any else Paging.PV)[name] = cls

    @classmethod
    def named(cls, name: str) -> type["Paging"]:
        """The technique of this name.  KeyError if there is none."""
        return cls.ALL.get(name) or cls.PV[name]

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        """The frames that the tables may ever take are set aside now.

        largest: the largest page that the technique's own tables may use.  budget: the most bytes
        for tables that grow with what the guest does, and for what is noted of them.
        OutOfFrames if the host has no room.
        """
        self.host, self.p2m, self.budget = host, p2m, budget
        self.reserve = Reserve(host, self.most_tables())
        self.guests: list[Guest] = []  # who translate by these tables
        self.fills = 0  # entries added because an access needed them
        self.flushes = 0  # times that all entries of an address space were dropped
        self.evictions = 0  # tables dropped because the budget was used up
        self.faults = dict.fromkeys((Fault.TRUE, Fault.HIDDEN, Fault.TRACE, Fault.DEVICE), 0)
        self.traced: Container[int] = NOTHING  # frames of the guest that hold tables we protect
        p2m.watchers.append(self.p2m_change)

    def attach(self, guest: Guest) -> View:
        """A virtual processor is going to use this technique's tables: what it has of them."""
        self.guests.append(guest)
        return View(self, guest)

    def prepare(self, cr0: int) -> None:  # noqa: B027
        """A processor with this CR0 is going to be attached: OutOfFrames now, not then."""

    def invalidate(self) -> None:
        """Make every processor forget what it keeps of these tables, before it goes on."""
        for guest in self.guests:
            guest.invalidate()

    def thin(self) -> None:  # noqa: B027
        """Between two exits: tables go that can be made again, and with them what they protect."""

    def continue_counts(self, other: "Paging") -> None:
        """Count on from what the technique before this one has counted."""
        self.fills, self.flushes, self.faults = other.fills, other.flushes, other.faults
        self.evictions = other.evictions

    def close(self) -> None:
        """Give the tables' frames back; the p2m's changes do not matter any more."""
        self.p2m.watchers.remove(self.p2m_change)
        if self in self.p2m.tracers:
            self.p2m.tracers.remove(self)
        self.reserve.close()
        let_go(self)

    @abstractmethod
    def most_tables(self) -> int:
        """How many tables there can be at once, whatever the guest does."""

    @property
    def eptp(self) -> int:
        """The EPT pointer for the VMCS; 0 for techniques without EPT."""
        return 0

    # --- events ---

    @abstractmethod
    def p2m_change(self, runs: Runs) -> None:
        """These guest frames have moved, come or gone, or may be written or not any more."""

    def violation(self, gpa: int, qualification: int) -> bool:
        """An access that the EPT refused.  True: it now allows it, resume the guest.

        False: there is no RAM, the access is for a device.  PagingError: the EPT does not agree
        with the p2m.
        """
        return False

    def misconfiguration(self, gpa: int) -> PagingError:
        """The processor has met an EPT entry that no processor accepts: what is wrong, in words."""
        return PagingError(f"EPT misconfiguration at gpa {gpa:#x}: no EPT is in use")

    def table_written(self, gpa: int, length: int) -> None:  # noqa: B027
        """The hypervisor has written to a frame that is `traced`, inside one page."""

    def may_write(self, gfn: int) -> bool:
        """Whether entries may let the guest write this frame, without a trace fault."""
        return True

    def store(self, gpa: int, size: int, value: int) -> None:
        """Carry out a guest's write to a traced table, inside one page."""
        raise PagingError(f"a write to gpa {gpa:#x}: nothing is traced")

    def finish_steps(self) -> None:  # noqa: B027
        """No processor shall have rights any more that were lent to it for one instruction."""

    # --- looking, saving ---

    @property
    def real_mode_spells(self) -> int:
        """Times that a processor was translated by an EPT only because it left protected mode."""
        return 0

    @property
    def table_count(self) -> int:
        """Tables (shadow pages, EPT pages) that are alive."""
        return len(self.frames())

    def save(self) -> dict[str, Any]:
        """What a snapshot must keep, as plain values: counts, and the tables in gfns."""
        counts = PagingState(self.fills, self.flushes, self.evictions, dict(self.faults))
        return {"counts": plain(counts)}

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved: tables are made anew.  The guest's registers are restored."""
        counts = restore(PagingState, saved["counts"], "paging")
        self.fills, self.flushes, self.evictions = counts.fills, counts.flushes, counts.evictions
        self.faults |= counts.faults

    @abstractmethod
    def frames(self) -> list[int]:
        """The host frames (pfn) that the tables occupy."""


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
