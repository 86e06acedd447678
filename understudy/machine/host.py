"""The physical machine: its memory, who owns which frame, and its processors.

Invariants: what the last owner has released is given back to the computer, and reads as zero;
a closed host has given back everything, whoever still refers to it.
"""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol, Self

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.clock import ManualClock
from understudy.closed import says_closed
from understudy.machine.bus import Bus
from understudy.machine.desk import Desk, Vpids
from understudy.machine.frames import Frames
from understudy.machine.machine import Machine
from understudy.machine.p2m import P2m
from understudy.machine.physical import PhysicalMemory
from understudy.quantities import bytes_of
from understudy.silicon import Memory, Processor


class BareMemory(PhysicalMemory):
    """All of a host's memory, as a loader for the bare machine sees it."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.size = memory, memory.size

    def read(self, gpa: int, length: int, /) -> bytes:
        """IndexError outside."""
        return self._memory.read(gpa, length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        """IndexError outside."""
        self._memory.write(gpa, data)

    def ranges(self) -> list[tuple[int, int]]:
        """All of it, but for frame 0, which belongs to nobody."""
        return [(PAGE, self.size - PAGE)]


class BareBoard:
    """A board without a chip: nobody answers on its bus, and its clock stands still."""

    def __init__(self) -> None:
        self.bus, self.clock = Bus(), ManualClock()


class Room(Protocol):
    """Who sees to it that there are free frames on a host whose VMs have more memory than it."""

    @property
    def is_ample(self) -> bool:
        """Whether so many are free that a guest may get some before it needs them."""

    def expect(self, count: int, p2m: P2m | None = None) -> None:
        """So many frames are going to be taken: have others give some up, if there are less.

        `p2m`: of the guest for which one is taken, while an exit of its is being answered.  None
        of its frames goes, and none of its rights, for whoever answers has looked at them already.

        OutOfFrames if nobody can give any.
        """

    def keep(self, image: P2m, source: P2m) -> None:
        """A second p2m has the frames of a guest, and nobody looks at it for a while.

        ValueError if there would be no room for them when the guest has written to all of its own.
        """

    def let_go(self, image: P2m) -> None:
        """That one is no more."""

    def later(self, action: Callable[[], None]) -> None:
        """Do this when nobody is at work on frames.  From any thread, at any moment."""


@says_closed("release", "leave", "unplug", "held", "later")
class Host:
    """One physical machine.  Several VMs may share it; each vCPU gets a processor of its own."""

    name = "this host"

    def __init__(self, ram: int | str = "4G", *, is_private: bool = False) -> None:
        """`is_private`: it was made for a VM, and is closed with the last VM or image on it."""
        size = bytes_of(ram) & ~(PAGE - 1)
        if size < 64 * PAGE:
            raise ValueError(f"Host(ram={ram!r}): expected at least {64 * PAGE} bytes")
        self.memory = Memory(size)
        self.frames = Frames(1, size // PAGE - 1, _discarder(self.memory))
        self.processors: list[Processor] = []
        self.desk, self.vpids = Desk(self.memory), Vpids()
        self.entered: dict[Processor, object] = {}
        """What a technique of execution has made of a processor that vCPUs share."""
        self.room: Room | None = None
        self.copied = 0
        """Frames that several had, and that one of them got a copy of, to write to it; ever."""
        self.spins_exit = False  # whether loops of PAUSE exit, in VMs of several vCPUs
        self.is_closed, self._is_private = False, is_private
        self._tenants = 0
        self._lock = threading.Lock()
        self.machine = Machine(BareMemory(self.memory), self.processors, BareBoard())

    def contents(self, pfn: int) -> bytes:
        """What is in a frame.  By the file, because looking at a hole of a mapping fills it."""
        return os.pread(self.memory.fd, PAGE, pfn << PAGE_SHIFT)

    # --- who lives here, and until when ---

    def held(self) -> AbstractContextManager[None]:
        """Inside, no other thread answers an exit of a VM that shares the processors here."""
        return nullcontext()

    def later(self, action: Callable[[], None]) -> None:
        """Do this when nobody is at work on frames, now or soon.  From any thread, at any time."""
        (self.room or self.frames.quiet).later(action)

    def join(self) -> None:
        """One more VM or image has frames here."""
        with self._lock:
            self._tenants += 1

    def keep(self, image: P2m, source: P2m) -> None:
        """The same of what an image keeps of a VM's.  ValueError if there is no room for it."""
        if self.room is not None:
            self.room.keep(image, source)
        self.join()

    def leave(self) -> None:
        """One less; a private host ends with the last of them."""
        with self._lock:
            self._tenants -= 1
            is_last = not self._tenants
        if is_last and self._is_private:
            with suppress(BufferError):  # somebody looks at the memory, and keeps it alive
                self.close()

    def close(self) -> None:
        """Give memory and processors back at once; the VMs on it can only be closed from now on.

        RuntimeError while one of the processors runs, BufferError while there is a memoryview of
        the memory: then nothing has changed.
        """
        if self.is_closed:
            return
        self.memory.close()
        self.is_closed = True
        self.processors.clear()
        self.entered.clear()
        self.desk.close()
        self.frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- what there is ---

    def plug(self, engine: str, clock: str) -> Processor:
        """A new processor on this host's memory, at reset."""
        processor = Processor(self.memory, engine, clock, 0)
        self.processors.append(processor)
        return processor

    def unplug(self, processor: Processor) -> None:
        """Remove a processor; whoever still refers to it, it is gone."""
        if processor in self.processors:
            self.processors.remove(processor)
        processor.close()

    def expect(self, count: int) -> None:
        """The hypervisor is going to take so many frames for itself."""
        if self.room is not None:
            self.room.expect(count)

    def frame_for(self, p2m: P2m) -> int:
        """The pfn of a frame for a guest that misses one.  OutOfFrames if none can be had."""
        if self.room is not None:
            self.room.expect(1, p2m)
        return self.frames.allocate()

    def frame(self, count: int = 1) -> int:
        """The hpa of zeroed frames for the hypervisor's own structures: one, or some in a row."""
        self.expect(count)
        hpa = self.frames.allocate(count) << PAGE_SHIFT
        self.memory.fill(hpa, count << PAGE_SHIFT)
        return hpa

    def each(self, count: int) -> list[int]:
        """The hpas of so many zeroed frames, in a row or not: all of them, or OutOfFrames."""
        self.expect(count)
        runs = self.frames.allocate_runs(count)
        hpas = [pfn + n << PAGE_SHIFT for pfn, part in runs for n in range(part)]
        for hpa in hpas:
            self.memory.fill(hpa, PAGE)
        return hpas

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
    """Forgets the contents of frames (pfn, count); it knows the memory, not the host.

    In a process that was forked from the one where the memory is they are that one's.
    """

    def discard(pfn: int, count: int) -> None:
        if memory.is_here:
            memory.discard(pfn << PAGE_SHIFT, count << PAGE_SHIFT)

    return discard
