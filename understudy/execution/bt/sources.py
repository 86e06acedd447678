"""What translations depend on: the frames that the code lies in, and the tables that lead there.

Frames with translated code are protected (`p2m`): whoever writes one, the guest, a device, the
hypervisor for the guest, makes what was translated from it go first.  Entries of the guest's tables
are compared with what they were whenever the guest may expect its changes to be believed: so a
translation is as stale as a TLB may be, and never more.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
for traces on code; SDM 3A, "Caching Translation Information".
"""

from collections.abc import Iterable
from typing import Final, Protocol

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER
from understudy.execution.emulate.linear import Ram
from understudy.guest import Control
from understudy.machine.p2m import GuestMemoryError, P2m, Runs
from understudy.machine.words import Flag
from understudy.paging.guest_walk import ACCESSED, DIRTY, Found, Regime

PG: Final = CR0.PG.mask
OF_CR4: Final = int(CR4(PAE=1, PSE=1, SMEP=1))
OF_EFER: Final = int(EFER(NXE=1, LMA=1))
TABLES_KEPT: Final = 1024
"""Tables by which code was found; what is noted of one takes some 9 KBytes."""


class Translated(Protocol):
    """A vCPU with translated code."""

    def code_written(self, gfn: int) -> None:
        """This frame is going to be written."""

    def has_code(self, gfn: int) -> bool:
        """Whether something was translated from this frame."""

    def frames_changed(self, runs: Runs) -> None:
        """The p2m says something else of these frames."""


class CodeFrames:
    """Owns `Flag.TRANSLATED` in one p2m: frames with code that some vCPU has translated."""

    def __init__(self) -> None:
        self.guests: list[Translated] = []

    @classmethod
    def of(cls, p2m: P2m) -> "CodeFrames":
        """Those of this memory."""
        owner = p2m.owners.get(Flag.TRANSLATED)
        if not isinstance(owner, CodeFrames):
            owner = p2m.owners[Flag.TRANSLATED] = cls()
            p2m.watchers.append(owner.changed)
        return owner

    def changed(self, runs: Runs) -> None:
        """What is not protected any more may be another frame, with other code."""
        for guest in self.guests:
            guest.frames_changed(runs)

    def hold(self, p2m: P2m, gfns: Iterable[int]) -> None:
        """Something is translated from these frames."""
        for gfn in gfns:
            if not p2m.word(gfn) & Flag.TRANSLATED:
                p2m.protect(gfn, 1, Flag.TRANSLATED)

    def let_go(self, p2m: P2m, gfns: Iterable[int]) -> None:
        """Some vCPU has nothing more from these frames."""
        for gfn in gfns:
            if not any(guest.has_code(gfn) for guest in self.guests):
                p2m.unprotect(gfn, 1, Flag.TRANSLATED)

    def write(self, p2m: P2m, gfn: int) -> None:
        """A frame is going to be written."""
        for guest in self.guests:
            guest.code_written(gfn)
        p2m.unprotect(gfn, 1, Flag.TRANSLATED)

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever taken away."""
        raise GuestMemoryError(f"guest frame {gfn:#x} was taken away, but not by a translator")


class Entries:
    """Some entries of one table: a mask over its bytes, and what is under it."""

    def __init__(self) -> None:
        self.mask = self.value = 0

    def note(self, offset: int, size: int, entry: int) -> None:
        """One more, but for the dirty flag.  Where code was fetched the other is set; if the guest
        clears it, the next fetch sets it again.
        """
        mask = (1 << 8 * size) - 1 & ~DIRTY
        shift = 8 * offset
        self.value = self.value & ~(mask << shift) | (entry & mask) << shift
        self.mask |= mask << shift

    def are_in(self, table: bytes) -> bool:
        """Whether this table has them."""
        return int.from_bytes(table, "little") & self.mask == self.value


class Tables:
    """The entries of the guest's tables by which code was found."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing was found."""
        self.mode: tuple[int, int, int] | None = None
        self.pdptes: dict[int, int] = {}  # by number
        self.root = Entries()
        self.others: dict[int, Entries] = {}  # by gfn of the table

    @property
    def are_many(self) -> bool:
        """Whether it is time to begin anew: what is noted takes memory, and time to compare."""
        return len(self.others) >= TABLES_KEPT

    def note(self, regime: Regime, control: Control, gva: int, found: Found) -> None:
        """A walk to code."""
        self.mode = mode_of(control)
        size = regime.entry_bytes
        if regime.is_pae and regime.pdptes is not None:
            self.pdptes[gva >> 30 & 3] = regime.pdptes[gva >> 30 & 3]
        for n, (at, entry) in enumerate(found.path):
            if n or regime.is_pae:
                table = self.others.setdefault(at >> PAGE_SHIFT, Entries())
            else:
                table = self.root
            table.note(at & PAGE - 1, size, entry | ACCESSED)  # as the walk has left it

    def are_same(self, regime: Regime, control: Control, ram: Ram) -> bool:
        """Whether walks to all that was found would find it there now."""
        if self.mode is None:
            return True
        if mode_of(control) != self.mode:
            return False
        if any((regime.pdptes or ())[n : n + 1] != (was,) for n, was in self.pdptes.items()):
            return False
        tables = [(gfn << PAGE_SHIFT, entries) for gfn, entries in self.others.items()]
        if self.root.mask:
            tables.append((regime.root, self.root))
        for gpa, entries in tables:
            if (hpa := ram.hpa(gpa)) is None or not entries.are_in(ram.memory.read(hpa, PAGE)):
                return False
        return True


def mode_of(control: Control) -> tuple[int, int, int]:
    """What decides how tables are read, and whether code may be executed."""
    return control.cr0 & PG, control.cr4 & OF_CR4, control.efer & OF_EFER
