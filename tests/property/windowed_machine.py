"""The machine of `paging_machine`, whose programs have windows.

What: its user code of 64 bits and its stack lie where those of programs do, so that it has a window
of the arena in which its pages are; that of 32 bits has one as it is.
Source: `silicon/src/mmu/window.rs`.  Invariant: none of its own.
"""

from collections import Counter
from typing import Any, ClassVar

from tests.property.paging_machine import FIXED_GFN, ROOTS, Machine
from tests.windows import force_windows, window_counts
from understudy.arch.vmcs import Vmcs
from understudy.vcpu.loop import Vcpu

PROGRAMS = 2
"""The entry of the root for the code: no address of the state machine lies there."""
STACK = 0x7FFF_0000_0000


class WindowedMachine(Machine):
    """With windows forced on."""

    windows: ClassVar[Counter[str]] = Counter()
    """What all of them together have done."""

    def _begin(self, vcpu: Vcpu) -> None:
        force_windows(self.vm)
        super()._begin(vcpu)

    def _fixed_tables(self) -> None:
        super()._fixed_tables()
        if not self.is_long:
            return
        for gfn in ROOTS:
            entry = (FIXED_GFN << 12 | 0x67).to_bytes(8, "little")
            self.oracle.memory[gfn][8 * PROGRAMS : 8 * PROGRAMS + 8] = entry
            self.vm.memory.write((gfn << 12) + 8 * PROGRAMS, entry)
        self.user_code = PROGRAMS << 39 | self.user_code & (1 << 39) - 1

    def begin(self, rip: int, *, user: bool = False, **registers: Any) -> None:
        """Have it execute from there, with a stack pointer that is a program's."""
        super().begin(rip, user=user, **registers)
        self.guest.write(Vmcs.GUEST_RSP, STACK if self.is_long and user else 0)

    def close(self) -> None:
        type(self).windows += Counter(window_counts(self.vm))
        super().close()
