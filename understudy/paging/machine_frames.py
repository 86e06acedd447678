"""Which host frames a VM has, by either number, for a guest that is told of them.

Source: P. Barham et al., "Xen and the Art of Virtualization", SOSP 2003 ("machine" and "physical"
memory).  Invariant: a frame is named here only while it is the VM's alone, and to be written.
"""

from bisect import bisect_right
from operator import itemgetter

from understudy.arch.address import PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import PRESENT, PROTECTED


class HostMemory:
    """Host-physical memory, as walks of tables that name host frames want it."""

    def __init__(self, host: Host) -> None:
        self.read, self.write = host.memory.read, host.memory.write
        self.read_u32, self.write_u32 = host.memory.read_u32, host.memory.write_u32
        self.read_u64, self.write_u64 = host.memory.read_u64, host.memory.write_u64

    def hpa(self, hpa: int) -> int:
        """It is one."""
        return hpa


class MachineFrames:
    """One VM's, read off its p2m."""

    def __init__(self, p2m: P2m) -> None:
        self.p2m = p2m
        self._runs: list[tuple[int, int, int]] = []  # pfn, gfn, frames; in order
        self._is_known = False

    def forget(self) -> None:
        """The p2m has changed."""
        self._is_known = False

    def _known(self) -> list[tuple[int, int, int]]:
        if not self._is_known:
            self._runs = sorted(
                (word >> PAGE_SHIFT, start, frames)
                for start, word, frames in self.p2m.pieces()
                if word & PRESENT and not word & PROTECTED
            )
            self._is_known = True
        return self._runs

    def gfn(self, pfn: int) -> int | None:
        """The guest frame that this host frame is; None: it is not the VM's."""
        runs = self._known()
        at = bisect_right(runs, pfn, key=itemgetter(0)) - 1
        if at < 0:
            return None
        first, gfn, frames = runs[at]
        return gfn + pfn - first if pfn < first + frames else None

    def pfn(self, gfn: int) -> int | None:
        """The host frame behind a guest frame; None: there is none that stays."""
        word = self.p2m.word(gfn)
        return word >> PAGE_SHIFT if word & PRESENT and not word & PROTECTED else None
