"""A guest's own tables, read and written where they lie.

Source: SDM 3A, "Accessed and Dirty Flags"; lecture, "A reminder on shadow page tables".
Invariants: a frame is named only while the p2m names it; nothing is written to a frame before its
owner was asked; a table outside RAM reads as not present.
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.guest import Control
from understudy.machine import words
from understudy.machine.host import Host
from understudy.machine.p2m import P2m, Runs
from understudy.paging.guest_walk import ACCESSED, DIRTY, E_WRITE, Found, Regime
from understudy.paging.roles import Role, role_of

LARGE_FRAMES: Final = 512
NOT_LARGE: Final = (
    words.PROTECTED | LARGE_FRAMES - 1 << PAGE_SHIFT
)  # in the word of its first frame
REGIMES_KEPT: Final = 64


class GuestTables:
    """Those of one VM, for all its processors."""

    def __init__(self, host: Host, p2m: P2m) -> None:
        self.p2m, self.memory = p2m, host.memory
        self.read_u64, self.write_u64 = host.memory.read_u64, host.memory.write_u64
        self.read_u32, self.write_u32 = host.memory.read_u32, host.memory.write_u32
        self.hpas: dict[int, int] = {}  # by gfn: what was looked up in the p2m lately
        self._regimes: dict[Control, tuple[Regime, Role]] = {}  # address spaces come back again

    def regime(self, values: Control) -> tuple[Regime, Role]:
        """How a processor with these registers translates, and reads its tables."""
        known = self._regimes.get(values)
        if known is None:
            if len(self._regimes) >= REGIMES_KEPT:
                self._regimes.clear()
            regime = Regime(*values)
            known = self._regimes[values] = regime, role_of(regime)
        return known

    def forget(self, runs: Runs) -> None:
        """The p2m has changed here."""
        if sum(count for _, count in runs) > len(self.hpas):
            self.hpas.clear()
            return
        for gfn, count in runs:
            for frame in range(gfn, gfn + count):
                self.hpas.pop(frame, None)

    def here(self, gfn: int) -> int:
        """The hpa of a guest frame, 0 if it has none now.  Nobody is asked, nothing changes."""
        if not (hpa := self.hpas.get(gfn, 0)) and (pfn := self.p2m.lookup(gfn)) is not None:
            self.hpas[gfn] = hpa = pfn << PAGE_SHIFT
        return hpa

    def look_up(self, gfn: int) -> int:
        """The hpa of a guest frame, 0 if it has none.  Others may leave for it."""
        pfn = self.p2m.lookup(gfn)
        if pfn is None:
            if not self.p2m.touch(gfn):
                return 0
            pfn = self.p2m.lookup(gfn)
            assert pfn is not None
        self.hpas[gfn] = hpa = pfn << PAGE_SHIFT
        return hpa

    def read_entry(self, at: int, size: int) -> int:
        """An entry of a guest's table; 0 where there is no RAM."""
        gfn = at >> PAGE_SHIFT
        hpa = self.hpas.get(gfn) or self.look_up(gfn)
        if not hpa:
            return 0
        hpa += at & PAGE - 1
        return self.read_u64(hpa) if size == 8 else self.read_u32(hpa)

    def read_page(self, gfn: int) -> bytes:
        """A table as it is now; nothing where no frame is there.  Nobody is asked for one."""
        hpa = self.here(gfn)
        return self.memory.read(hpa, PAGE) if hpa else b""

    def mark(self, found: Found, error: int, size: int) -> None:
        """Set the accessed and dirty flags that the access sets, in entries of this size."""
        path = found.path
        for n, (at, entry) in enumerate(path, 1 - len(path)):
            wanted = ACCESSED | DIRTY if error & E_WRITE and n == 0 else ACCESSED
            if wanted & ~entry:
                self._set_entry(at, entry | wanted, size)

    def _hpa_to_write(self, gpa: int) -> int:
        """Where a gpa is, once what protects its frame from writes was asked."""
        gfn = gpa >> PAGE_SHIFT
        if self.p2m.protected and self.p2m.is_protected(gfn):
            self.p2m.touch(gfn, write=True)
        return (self.hpas.get(gfn) or self.look_up(gfn)) + (gpa & PAGE - 1)

    def _set_entry(self, at: int, entry: int, size: int) -> None:
        """Write an entry in the processor's stead."""
        hpa = self._hpa_to_write(at)
        if size == 8:
            self.write_u64(hpa, entry)
        else:
            self.write_u32(hpa, entry)

    def store(self, gpa: int, size: int, value: int) -> None:
        """Carry out the guest's write to a table, inside one page."""
        hpa = self._hpa_to_write(gpa)
        if size == 8:
            self.write_u64(hpa, value)
        elif size == 4:
            self.write_u32(hpa, value)
        else:
            self.memory.write(hpa, value.to_bytes(size, "little"))
        self.p2m.written(gpa, size)

    def large_frame(self, gfn: int) -> int:
        """The hpa of the 2-MByte page that holds `gfn`, if there is one behind it; or 0."""
        word = self.p2m.uniform(gfn & -LARGE_FRAMES, 2)
        if word is None or not word & words.PRESENT or word & NOT_LARGE:
            return 0
        return word & words.ADDRESS
