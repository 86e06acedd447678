"""Host frames that are set aside for one user, so that no other can take them.

What is set aside costs the computer nothing until it is used, and nothing again once it was given
back.

Source: ours; docs/decisions/0039-tables-have-a-budget.md.
Invariants: what is handed out is zero; more than was set aside is never handed out.
"""

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host


class Reserve:
    """So many frames of a host; OutOfFrames if it has not as many that are free."""

    def __init__(self, host: Host, count: int) -> None:
        self.count, self.in_use = count, 0
        host.expect(count)
        self._host, self._runs = host, host.frames.allocate_runs(count) if count else []
        self._unused = list(self._runs)  # (pfn, count), the last is used first
        self._returned: list[int] = []  # pfns

    def frame(self) -> int:
        """The hpa of a zeroed frame; OutOfFrames if all are in use."""
        if self.in_use == self.count:
            raise OutOfFrames(f"all of the {self.count} frames that were set aside are in use")
        self.in_use += 1
        if self._returned:
            return self._returned.pop() << PAGE_SHIFT
        pfn, count = self._unused.pop()
        if count > 1:
            self._unused.append((pfn + 1, count - 1))
        return pfn << PAGE_SHIFT

    def release(self, pfn: int) -> None:
        """A frame is not in use any more; what was in it is forgotten."""
        self._host.memory.discard(pfn << PAGE_SHIFT, PAGE)
        self._returned.append(pfn)
        self.in_use -= 1

    def close(self) -> None:
        """Give all of them back to the host."""
        if self._runs:
            self._host.frames.free_all(self._runs)
        self._runs, self.count, self.in_use = [], 0, 0
