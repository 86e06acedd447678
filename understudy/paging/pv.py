"""Paravirtual paging: the processor walks the guest's own tables, which the hypervisor checks.

Idea: a guest that knows of its hypervisor names host frames in its page tables itself, asks for
each change of them, and gets it if it can do no harm.  So there are no shadows: no hidden fault, no
trace.
Source: P. Barham et al., "Xen and the Art of Virtualization", SOSP 2003, section 3.3.3; lecture,
"Para-virtualization".  Cost: a call of the hypervisor for each batch of changes; none for a fault.

Each host frame of the guest is of a kind while anybody uses it so: a page table of a level, or data
that somebody may write.  It changes its kind only when nobody does, and processors have forgotten
what they knew of it.

Invariants: an entry that the processor may walk names a frame of this VM; no frame is a page table
and writable at once; a table is checked, with all below it, before the processor walks it.
"""

from typing import Final

from understudy.arch.address import FRAME, PAGE, PAGE_SHIFT, is_canonical
from understudy.arch.cr import CR0
from understudy.arch.msr import EFER
from understudy.guest import Guest
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging import BUDGET, Answer, Memory, Paging, View
from understudy.paging.guest_walk import (
    ACCESSED,
    DIRTY,
    E_FETCH,
    E_PRESENT,
    E_USER,
    E_WRITE,
    NO_EXECUTE,
    PRESENT,
    USER,
    WRITABLE,
    GuestFault,
)
from understudy.paging.machine_frames import HostMemory, MachineFrames

DATA: Final = 0
"""The kind of a frame that is mapped writable; page tables have that of their level, 1 to 4."""
ENTRIES: Final = PAGE // 8
MOST_TABLES: Final = 4096
"""Page tables that a guest may have in use: all of them are walked when the first is named."""
PDPTES: Final = 4
FOR_SOFTWARE: Final = 0xE00
ALLOWED: Final = (
    PRESENT | WRITABLE | USER | ACCESSED | DIRTY | FOR_SOFTWARE | FRAME | NO_EXECUTE
)  # fmt: skip
ALLOWED_PDPTE: Final = PRESENT | FOR_SOFTWARE | FRAME
ERROR: Final = E_PRESENT | E_WRITE | E_USER | E_FETCH


class Refused(Exception):
    """What a guest asks for would do harm, in words; nothing of it has happened."""


class PvPaging(Paging, name="pv", is_for_any=False):
    """The kinds of a VM's frames, and who uses them so."""

    def __init__(
        self, host: Host, p2m: P2m, *, largest: int | str = "1G", budget: int = BUDGET
    ) -> None:
        """`largest` and `budget` do not matter: there are no tables of ours."""
        super().__init__(host, p2m, largest=largest, budget=budget)
        self.memory = host.memory
        self.machine_frames = MachineFrames(p2m)
        self.kinds: dict[int, int] = {}  # by pfn, of frames that have been of one
        self.users: dict[int, int] = {}  # by pfn: how many use it as it is, mapped or named
        self.readers: dict[int, int] = {}  # by pfn: how many entries map it to be read
        self.places: dict[int, int] = {}  # by pfn: the gfn when it was last named
        self.walked = 0  # tables that were taken or let go of
        self.pinned: set[int] = set()  # pfn of roots that are kept while nothing has loaded them
        self.levels = 4
        self.is_stale = False  # processors may know of a mapping that is gone
        self.problem = ""  # why the guest cannot go on
        self.traced: set[int] = set()  # gfn of each page table
        p2m.tracers.append(self)

    def attach(self, guest: Guest) -> "PvView":
        self.guests.append(guest)
        return PvView(self, guest)

    def most_tables(self) -> int:
        return 0

    def frames(self) -> list[int]:
        return []

    @property
    def table_count(self) -> int:
        """Page tables of the guest that are in use."""
        return len(self.traced)

    def begin(self) -> None:
        """Nothing has been loaded."""
        for known in (
            self.kinds, self.users, self.readers, self.places, self.pinned, self.traced,
        ):  # fmt: skip
            known.clear()
        self.is_stale, self.problem = False, ""

    def p2m_change(self, runs: Runs) -> None:
        """What the guest has named must not move: its tables say where it is."""
        named = {self.places[pfn] for pfn in self.users.keys() | self.readers.keys()}
        for gfn, count in runs if named else ():
            if not named.isdisjoint(range(gfn, gfn + count)):
                self.problem = f"guest frames {gfn:#x}+{count} have moved under its page tables"
        self.machine_frames.forget()
        self.is_stale = False
        self.invalidate()  # a frame that nobody names may still be known to a processor

    def table_written(self, gpa: int, length: int) -> None:
        self.problem = f"a device has written to a page table, at gpa {gpa:#x}"

    # --- kinds of frames ---

    def take(self, pfn: int, kind: int) -> None:
        """One more uses this frame as what it is.  Refused: it is something else, or not its."""
        gfn = self.machine_frames.gfn(pfn)
        if gfn is None:
            raise Refused(f"frame {pfn:#x} is not the guest's")
        if used := self.users.get(pfn, 0):
            if self.kinds[pfn] != kind:
                raise Refused(f"frame {pfn:#x} is {name(self.kinds[pfn])}, not {name(kind)}")
            self.users[pfn] = used + 1
            return
        if self.kinds.get(pfn, kind) != kind and self.is_stale:
            self.is_stale = False
            self.invalidate()
        self.kinds[pfn], self.users[pfn], self.places[pfn] = kind, 1, gfn
        if kind != DATA:
            try:
                self._take_table(pfn, kind)
            except Refused:
                del self.users[pfn]
                raise
            self.traced.add(gfn)

    def release(self, pfn: int) -> None:
        """One less."""
        if left := self.users[pfn] - 1:
            self.users[pfn] = left
            return
        del self.users[pfn]
        if (kind := self.kinds[pfn]) != DATA:
            self.traced.discard(self.places[pfn])
            self.walked += 1
            for entry in self._entries(pfn, kind):
                self._drop(entry, kind)

    def _entries(self, pfn: int, level: int) -> list[int]:
        data = self.memory.read(pfn << PAGE_SHIFT, PAGE)
        count = PDPTES if level == 3 and self.levels == 3 else ENTRIES
        return [entry for entry in memoryview(data).cast("Q")[:count] if entry & PRESENT]

    def _take_table(self, pfn: int, level: int) -> None:
        if len(self.traced) >= MOST_TABLES:
            raise Refused(f"more than {MOST_TABLES} page tables")
        self.walked += 1
        taken: list[int] = []
        try:
            for entry in self._entries(pfn, level):
                self._hold(entry, level)
                taken.append(entry)
        except Refused:
            for entry in taken:
                self._drop(entry, level)
            raise

    def _hold(self, entry: int, level: int) -> None:
        """An entry of a table of this level names what it names."""
        is_root = level == 3 and self.levels == 3
        if extra := entry & ~(ALLOWED_PDPTE if is_root else ALLOWED):
            raise Refused(f"entry {entry:#x} of a table of level {level} has bits {extra:#x}")
        pfn = (entry & FRAME) >> PAGE_SHIFT
        if level > 1:
            self.take(pfn, level - 1)
        elif entry & WRITABLE:
            self.take(pfn, DATA)
        elif (gfn := self.machine_frames.gfn(pfn)) is None:
            raise Refused(f"frame {pfn:#x} is not the guest's")
        else:
            self.readers[pfn], self.places[pfn] = self.readers.get(pfn, 0) + 1, gfn

    def _drop(self, entry: int, level: int) -> None:
        self.is_stale = True
        pfn = (entry & FRAME) >> PAGE_SHIFT
        if level > 1 or entry & WRITABLE:
            self.release(pfn)
        elif left := self.readers[pfn] - 1:
            self.readers[pfn] = left
        else:
            del self.readers[pfn]

    # --- what a guest asks for ---

    def update(self, at: int, value: int) -> None:
        """Write an entry of a page table, at this hpa."""
        pfn = at >> PAGE_SHIFT
        level = self.kinds.get(pfn, DATA)
        if at % 8 or level == DATA or not self.users.get(pfn):
            raise Refused(f"{at:#x} is no entry of a page table")
        if level == 3 and self.levels == 3 and at % PAGE >= 8 * PDPTES:
            raise Refused(f"{at:#x} is none of the four entries of a root")
        if value & PRESENT:
            self._hold(value, level)
        old = self.memory.read_u64(at)
        self.memory.write_u64(at, value)
        if old & PRESENT:
            self._drop(old, level)

    def pin(self, pfn: int) -> None:
        """Check a root now, and keep it so until it is unpinned."""
        if pfn in self.pinned:
            raise Refused(f"root {pfn:#x} is pinned already")
        self.take(pfn, self.levels)
        self.pinned.add(pfn)

    def unpin(self, pfn: int) -> None:
        """It may become something else when nothing has loaded it."""
        if pfn not in self.pinned:
            raise Refused(f"root {pfn:#x} is not pinned")
        self.pinned.remove(pfn)
        self.release(pfn)

    # --- its first tables ---

    def adopt(self, root: int) -> int:
        """Tables that name gfns, as a loader has made them, become the first: hpa of the root."""
        where = {root >> PAGE_SHIFT: self._own(root >> PAGE_SHIFT)}
        tables = [(root >> PAGE_SHIFT, self.levels)]
        while tables:
            gfn, level = tables.pop()
            at = where[gfn] << PAGE_SHIFT
            for n in range(PDPTES if level == 3 and self.levels == 3 else ENTRIES):
                entry = self.memory.read_u64(at + 8 * n)
                if not entry & PRESENT:
                    continue
                named = (entry & FRAME) >> PAGE_SHIFT
                if level > 1 and named not in where:
                    where[named] = self._own(named)
                    tables.append((named, level - 1))
                hpa = (where[named] if level > 1 else self._own(named)) << PAGE_SHIFT
                self.memory.write_u64(at + 8 * n, entry & ~FRAME | hpa)
        pfn = where[root >> PAGE_SHIFT]
        self.pin(pfn)
        return pfn << PAGE_SHIFT

    def _own(self, gfn: int) -> int:
        pfn = self.machine_frames.pfn(gfn)
        if pfn is None:
            raise Refused(f"guest frame {gfn:#x} is no memory that stays where it is")
        return pfn


class PvView(View):
    """What a processor has of them: the root that it has loaded."""

    paging: PvPaging

    def __init__(self, paging: PvPaging, guest: Guest) -> None:
        super().__init__(paging, guest)
        self.root = 0  # hpa; 0: none yet

    def begin(self) -> None:
        """As after power-on."""
        self.root = 0
        self.paging.begin()

    def mode_change(self) -> None:
        """All registers were set: the guest starts, unless it has."""
        control, paging = self.guest.paging_control(), self.paging
        if self.root:
            if control.cr3 != self.root:
                paging.problem = f"CR3 was set to {control.cr3:#x} from outside"
            return
        if not control.cr0 & CR0.PG.mask:
            paging.problem = "the kernel does not start with page tables: it is not paravirtual"
            return
        paging.begin()
        paging.levels = 4 if control.efer & EFER.LMA.mask else 3
        try:
            self.load(paging.adopt(control.cr3))
        except Refused as problem:
            paging.problem = f"its first page tables: {problem}"

    def load(self, hpa: int) -> None:
        """Translate by this root.  Refused: it is none."""
        paging = self.paging
        if hpa % PAGE or (paging.levels == 3 and hpa >> 32):
            raise Refused(f"a root cannot be at {hpa:#x}")
        paging.take(hpa >> PAGE_SHIFT, paging.levels)
        old, self.root = self.root, hpa
        if old:
            paging.release(old >> PAGE_SHIFT)
        self.guest.note_cr3(self.root, (0, 0, 0, 0))
        self.guest.load_root(self.root)

    def tables_memory(self, memory: Memory) -> HostMemory:
        return HostMemory(self.paging.host)

    def page_fault(self, gva: int, error: int) -> Answer:
        """The processor has asked the guest's own tables: it is the guest's."""
        raise GuestFault(gva, error & ERROR)

    def reach(self, gva: int, *, write: bool) -> int:
        """The hpa behind an address of the kernel.  GuestFault: there is none, or not to write."""
        paging, error = self.paging, E_WRITE if write else 0
        is_address = not gva >> 32 if paging.levels == 3 else gva >= 0 and is_canonical(gva)
        if not is_address:
            raise GuestFault(gva & (1 << 64) - 1, error)
        table = self.root
        for level in range(paging.levels, 0, -1):
            pfn = table >> PAGE_SHIFT
            if pfn not in paging.users or paging.kinds[pfn] != level:
                raise GuestFault(gva, error)
            shift = PAGE_SHIFT + 9 * (level - 1)
            entry = paging.memory.read_u64(table + 8 * (gva >> shift & ENTRIES - 1))
            if not entry & PRESENT:
                raise GuestFault(gva, error)
            is_root = level == 3 and paging.levels == 3
            if write and not entry & WRITABLE and not is_root:
                raise GuestFault(gva, error | E_PRESENT)
            table = entry & FRAME
        return table | gva & PAGE - 1


def name(kind: int) -> str:
    """A kind in words."""
    return f"a page table of level {kind}" if kind else "writable data"
