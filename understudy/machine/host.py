"""The physical machine: its memory, who owns which frame, and its processors.

Invariant: what the last owner has released is given back to the computer, and reads as zero.
"""

from collections.abc import Callable

from understudy.clock import ManualClock
from understudy.machine.bus import Bus
from understudy.machine.frames import PAGE, PAGE_SHIFT, Frames
from understudy.machine.machine import Machine
from understudy.quantities import bytes_of
from understudy.silicon import Memory, Processor


class BareMemory:
    """All of a host's memory, as a loader for the bare machine sees it."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.size = memory, memory.size

    def read(self, gpa: int, length: int) -> bytes:
        """IndexError outside."""
        return self._memory.read(gpa, length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """IndexError outside."""
        self._memory.write(gpa, data)

    def ranges(self) -> list[tuple[int, int]]:
        """All of it, but for frame 0, which belongs to nobody."""
        return [(PAGE, self.size - PAGE)]


class BareBoard:
    """A board without a chip: nobody answers on its bus, and its clock stands still."""

    def __init__(self) -> None:
        self.bus, self.clock = Bus(), ManualClock()


class Host:
    """One physical machine.  Several VMs may share it; each vCPU gets a processor of its own."""

    def __init__(self, ram: int | str = "4G") -> None:
        size = bytes_of(ram) & ~(PAGE - 1)
        if size < 64 * PAGE:
            raise ValueError(f"Host(ram={ram!r}): expected at least {64 * PAGE} bytes")
        self.memory = Memory(size)
        self.frames = Frames(1, size // PAGE - 1, _discarder(self.memory))
        self.processors: list[Processor] = []
        self.machine = Machine(BareMemory(self.memory), self.processors, BareBoard())

    def plug(self, engine: str, clock: str) -> Processor:
        """A new processor on this host's memory, at reset."""
        processor = Processor(self.memory, engine, clock, 0)
        self.processors.append(processor)
        return processor

    def unplug(self, processor: Processor) -> None:
        """Remove a processor."""
        if processor in self.processors:
            self.processors.remove(processor)

    def frame(self) -> int:
        """The hpa of one zeroed frame for the hypervisor's own structures."""
        hpa = self.frames.allocate() << PAGE_SHIFT
        self.memory.fill(hpa, PAGE)
        return hpa

    def release(self, pfn: int, count: int = 1) -> None:
        """Give frames back; the contents go with the last owner."""
        self.frames.free(pfn, count)

    def inspect(self) -> dict[str, object]:
        """What there is and what it costs, for people."""
        return {
            "bytes": self.memory.size,
            "resident_bytes": self.memory.resident_bytes(),
            "free_bytes": self.frames.free_count * PAGE,
            "processors": len(self.processors),
        }


def _discarder(memory: Memory) -> Callable[[int, int], None]:
    """Forgets the contents of frames (pfn, count); it knows the memory, not the host."""
    return lambda pfn, count: memory.discard(pfn << PAGE_SHIFT, count << PAGE_SHIFT)
