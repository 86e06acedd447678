"""Where the hypervisor looks at a vCPU that is on no processor; and the numbers of vCPUs.

Source: SDM 3C, "Virtual Processor Identifiers (VPIDs)".
Invariants: one vCPU at a time is at the desk; no guest runs there; no two vCPUs of a host have the
same VPID at the same time, and none has 0.
"""

import heapq
from collections.abc import Callable
from typing import Final

from understudy.silicon import Memory, Processor

LAST_VPID: Final = 0xFFFF


class Desk:
    """A processor on which a vCPU's registers are read and written, and nothing else."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._processor: Processor | None = None
        self._leave: Callable[[], None] | None = None

    def take(self, leave: Callable[[], None]) -> Processor:
        """For the vCPU that leaves again by `leave`; the one that is there goes."""
        if self._leave is not None:
            self._leave()
        self._leave = leave
        if self._processor is None:
            self._processor = Processor(self._memory, "reference", "virtual", 0)
            self._power_on = self._processor.save_live()
        return self._processor

    def clear(self, processor: Processor) -> None:
        """Nothing is left there of others."""
        processor.load_live(self._power_on)

    def left(self) -> None:
        """Nobody is there."""
        self._leave = None

    def is_at(self, processor: Processor) -> bool:
        """Whether this processor is the desk."""
        return processor is self._processor

    def close(self) -> None:
        """Nobody comes any more."""
        if self._processor is not None:
            self._processor.close()
        self._leave = None


class Vpids:
    """Which VPIDs are free."""

    def __init__(self) -> None:
        self._next, self._free = 1, list[int]()

    def allocate(self) -> int:
        """The lowest that is free.  RuntimeError if there is none."""
        if self._free:
            return heapq.heappop(self._free)
        if self._next > LAST_VPID:
            raise RuntimeError(f"a host has {LAST_VPID} vCPUs at most")
        self._next += 1
        return self._next - 1

    def free(self, vpid: int) -> None:
        """Its vCPU is no more."""
        heapq.heappush(self._free, vpid)
