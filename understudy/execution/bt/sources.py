"""What translations depend on: the frames that the code lies in, and the tables that lead there.

Frames with translated code are protected (`p2m`): whoever writes one, the guest, a device, the
hypervisor for the guest, makes what was translated from it go first.  Entries of the guest's tables
are compared with what they were whenever the guest may expect its changes to be believed: so a
translation is as stale as a TLB may be, and never more.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
for traces on code; SDM 3A, "Caching Translation Information".
"""

from typing import Final, Protocol

from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER
from understudy.guest import Control
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.words import Flag
from understudy.paging.guest_walk import ACCESSED, DIRTY, Found, ReadEntry, Regime

PG: Final = CR0.PG.mask
OF_CR4: Final = int(CR4(PAE=1, PSE=1, SMEP=1))
OF_EFER: Final = int(EFER(NXE=1, LMA=1))
USED: Final = ACCESSED | DIRTY


class Translated(Protocol):
    """A vCPU with translated code."""

    def code_written(self, gfn: int) -> None:
        """This frame is going to be written."""


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
        return owner

    def write(self, p2m: P2m, gfn: int) -> None:
        """A frame is going to be written."""
        for guest in self.guests:
            guest.code_written(gfn)
        p2m.unprotect(gfn, 1, Flag.TRANSLATED)

    def touch(self, p2m: P2m, gfn: int) -> None:
        """Nothing was ever taken away."""
        raise GuestMemoryError(f"guest frame {gfn:#x} was taken away, but not by a translator")


class Tables:
    """The entries of the guest's tables by which code was found."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing was found."""
        self.mode: tuple[int, int, int] | None = None
        self.pdptes: dict[int, int] = {}  # by number
        self.of_root: dict[int, int] = {}  # by offset in the root
        self.others: dict[int, int] = {}  # by gpa

    def note(self, regime: Regime, control: Control, gva: int, found: Found) -> None:
        """A walk to code."""
        self.mode = mode_of(control)
        path = list(found.path)
        if regime.is_pae and regime.pdptes is not None:
            self.pdptes[gva >> 30 & 3] = regime.pdptes[gva >> 30 & 3]
        elif path:
            at, entry = path.pop(0)
            self.of_root[at - regime.root] = entry & ~USED
        for at, entry in path:
            self.others[at] = entry & ~USED

    def are_same(self, regime: Regime, control: Control, read: ReadEntry) -> bool:
        """Whether walks to all that was found would find it there now."""
        if self.mode is None:
            return True
        if mode_of(control) != self.mode:
            return False
        size, root = regime.entry_bytes, regime.root
        if any((regime.pdptes or ())[n : n + 1] != (was,) for n, was in self.pdptes.items()):
            return False
        for offset, was in self.of_root.items():
            if read(root + offset, size) & ~USED != was:
                return False
        return all(read(at, size) & ~USED == was for at, was in self.others.items())


def mode_of(control: Control) -> tuple[int, int, int]:
    """What decides how tables are read, and whether code may be executed."""
    return control.cr0 & PG, control.cr4 & OF_CR4, control.efer & OF_EFER
