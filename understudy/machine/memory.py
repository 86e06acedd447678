"""Guest-physical memory: reads and writes through the p2m.

The map of a PC: RAM from 0 up to 3 GiB, the rest of it from 4 GiB on; between them lie the
devices.  0xA0000-0xFFFFF is RAM, too (firmware tables are written there), and so is firmware's
last KiB below it, but `ranges` does not report them as usable.  Nor does it report a ROM, which
ends at 4 GiB and is RAM with something in it.

Invariant: whoever traces a frame hears of every write to it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NewType

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.memory_map import HIGH_START, LOW_END, usable
from understudy.machine.host import Host
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.machine.physical import BYTES, PhysicalMemory
from understudy.machine.reserve import Reserve
from understudy.machine.words import ABSENT, ADDRESS, PRESENT, PROTECTED, Flag

Gpa = NewType("Gpa", int)
Gva = NewType("Gva", int)
Hpa = NewType("Hpa", int)

GIGABYTE_FRAMES: Final = 1 << 18
STRIDE: Final = 1 << 20  # bytes that are accessed at once while what is there may go
SPARE: Final = 32  # pages that one instruction may be lent; more than it can touch


class GuestMemory(PhysicalMemory):
    """A VM's RAM, addressed by gpa."""

    def __init__(self, host: Host, size: int, rom: int = 0) -> None:
        """`rom`: bytes of one; `size`: bytes of RAM beside it."""
        self.host, self.size, self.rom, self.p2m = host, size, rom, P2m()
        self.is_lazy = False
        """Frames are taken when they are needed, by whoever owns `Flag.FREE`."""
        self.is_idle: Callable[[], bool] = lambda: False
        """Whether none of its guest's exits is being answered: then what it has may go as well."""
        self.spare = Reserve(host, SPARE)  # to lie for a moment where there is no RAM
        self._memory = host.memory

    def populate(self) -> None:
        """Take the frames: gigabyte-aligned runs if there are any, so that pages can be large."""
        with self.p2m.batch():
            for gfn, count in self.layout():
                if self.is_lazy:
                    self.p2m.take(gfn, count, Flag.FREE)
                    continue
                align = GIGABYTE_FRAMES if count >= GIGABYTE_FRAMES else 512
                for pfn, part in self.host.frames.allocate_runs(count, align):
                    self.p2m.map(gfn, pfn, part)
                    gfn += part

    def clear(self) -> None:
        """Make every byte zero, with frames of its own; OutOfFrames has changed nothing."""
        runs = [(pfn, frames) for _, pfn, frames in self.p2m]
        needed = 0 if self.is_lazy else self.pages
        with self.p2m.batch(), self.host.frames.exchange(runs, needed):
            self._release()
            self.populate()

    def close(self) -> None:
        """Give all frames back to the host."""
        if self.p2m.keeper is not None:
            self.p2m.keeper.drop(self.p2m)
        self._release()
        self.p2m.owners.clear()  # they know this memory, and nobody asks them any more
        self.spare.close()

    def _release(self) -> None:
        for _, pfn, frames in self.p2m.clear():
            self.host.release(pfn, frames)

    def layout(self) -> list[tuple[int, int]]:
        """Where RAM lies: (gfn, frames)."""
        low = min(self.size, LOW_END)
        parts = [(0, low >> PAGE_SHIFT)]
        if self.rom:
            parts.append((HIGH_START - self.rom >> PAGE_SHIFT, self.rom >> PAGE_SHIFT))
        if self.size > low:
            parts.append((HIGH_START >> PAGE_SHIFT, (self.size - low) >> PAGE_SHIFT))
        return parts

    @property
    def pages(self) -> int:
        """Guest frames in all, those of a ROM as well."""
        return sum(count for _, count in self.layout())

    def ranges(self) -> list[tuple[int, int]]:
        """Usable RAM as (gpa, bytes)."""
        return usable(self.size)

    def hpa(self, gpa: int) -> int | None:
        """The host-physical address behind `gpa`, or None where there is no RAM."""
        word = self.p2m.word(gpa >> 12)
        if word & PRESENT:
            return word & ADDRESS | gpa & 0xFFF
        if word & ABSENT and self.p2m.touch(gpa >> 12):
            return self.p2m.word(gpa >> 12) & ADDRESS | gpa & 0xFFF
        return None

    def read(self, gpa: int, length: int, /) -> bytes:
        """The bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        if length <= PAGE - (gpa & 0xFFF) and (pfn := self.p2m.lookup(gpa >> 12)) is not None:
            return self._memory.read(pfn << 12 | gpa & 0xFFF, length)
        if self.is_lazy and self.is_idle():
            return b"".join([self._read(at, part) for at, part in self._strides(gpa, length)])
        return self._read(gpa, length)

    def _read(self, gpa: int, length: int) -> bytes:
        pieces = [self._memory.read(hpa, part) for hpa, part in self._pieces(gpa, length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def gather(self, runs: Sequence[tuple[int, int]]) -> bytes:
        """What stands in several runs (gpa, bytes); GuestMemoryError if any of it is not RAM."""
        places = self.p2m.places(runs)
        return super().gather(runs) if places is None else self._memory.gather(places)

    def scatter(self, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview) -> int:
        """Write to several runs, until data or runs end; how many bytes that were.

        GuestMemoryError if any of it is not RAM.
        """
        p2m, count = self.p2m, len(data)
        if (
            p2m.protected
            or sum(map(BYTES, runs)) != count
            or (p2m.tracers and any(tracer.traced for tracer in p2m.tracers))
            or (places := p2m.places(runs)) is None
        ):
            return super().scatter(runs, data)
        self._memory.scatter(places, data if type(data) is bytes else bytes(data))
        return count

    def expect_write(self, gpa: int) -> None:
        """A page is going to be written, if it is RAM: what that needs is there afterwards.

        OutOfFrames if it needs a frame that the host has not.
        """
        if self.p2m.protected or self.p2m.absent:
            self.p2m.touch(gpa >> PAGE_SHIFT, write=True)

    @property
    def is_whole(self) -> bool:
        """Whether no frame is away, and none is protected."""
        return not (self.p2m.absent or self.p2m.protected)

    def make_room(self, length: int) -> None:
        """So many bytes are about to be accessed, and no exit of this guest is being answered.

        What it has itself may go for that.
        """
        if self.is_lazy:
            self.host.expect((length >> PAGE_SHIFT) + 2)

    def expect(self, runs: Sequence[tuple[int, int]], most: int, /, *, write: bool) -> None:
        """The same of the first `most` bytes of runs (gpa, bytes) to be written, or else read."""
        flags = ABSENT | PROTECTED if write else ABSENT
        if self.p2m.absent or (write and self.p2m.protected):
            for gpa, size in runs:
                self._touch(gpa, min(size, most), flags, write=write)
                if (most := most - size) <= 0:
                    break

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        view = data if type(data) is bytes else memoryview(data).cast("B")
        if len(view) > STRIDE and self.is_lazy and self.is_idle():
            rest = memoryview(view)
            for at, part in self._strides(gpa, len(view)):
                self._write(at, rest[at - gpa : at - gpa + part])
        else:
            self._write(gpa, view)

    def _strides(self, gpa: int, length: int) -> Iterator[tuple[int, int]]:
        """(gpa, bytes) one after the other, for each of which there are frames at that time."""
        for at in range(gpa, gpa + length, STRIDE):
            part = min(STRIDE, gpa + length - at)
            self.make_room(part)
            yield at, part

    def _write(self, gpa: int, view: bytes | memoryview) -> None:
        size, p2m = len(view), self.p2m
        if p2m.protected or p2m.absent:
            self._touch(gpa, size, PROTECTED | ABSENT, write=True)
        if 0 < size <= PAGE - (gpa & 0xFFF) and (pfn := p2m.lookup(gpa >> 12)) is not None:
            self._memory.write(pfn << 12 | gpa & 0xFFF, view)
        else:
            at, rest = 0, memoryview(view)
            for hpa, part in self._pieces(gpa, size):
                self._memory.write(hpa, rest[at : at + part])
                at += part
        for tracer in p2m.tracers:
            if tracer.traced:
                self._tell(gpa, size)
                break

    def exchange(self, gpa: int, byte: int) -> int:
        """Put a byte there, and return the one before, in one step for processors that run.

        GuestMemoryError if it is not RAM.
        """
        if self.p2m.protected or self.p2m.absent:
            self._touch(gpa, 1, PROTECTED | ABSENT, write=True)
        ((hpa, _),) = self._pieces(gpa, 1)
        old = self._memory.exchange(hpa, byte)
        for tracer in self.p2m.tracers:
            if tracer.traced:
                self._tell(gpa, 1)
                break
        return old

    def _tell(self, gpa: int, length: int) -> None:
        """Those who trace a frame hear of writes by the hypervisor, page by page."""
        end = gpa + length
        while gpa < end:
            part = min(end - gpa, PAGE - (gpa & (PAGE - 1)))
            self.p2m.written(gpa, part)
            gpa += part

    def read_u64(self, gpa: int) -> int:
        """The little-endian word of 64 bits at `gpa`."""
        hpa = self.hpa(gpa)
        if hpa is None or gpa & (PAGE - 1) > PAGE - 8:
            return int.from_bytes(self.read(gpa, 8), "little")
        return self._memory.read_u64(hpa)

    def read_u32(self, gpa: int) -> int:
        """The little-endian word of 32 bits at `gpa`."""
        hpa = self.hpa(gpa)
        if hpa is None or gpa & (PAGE - 1) > PAGE - 4:
            return int.from_bytes(self.read(gpa, 4), "little")
        return self._memory.read_u32(hpa)

    def write_u64(self, gpa: int, value: int) -> None:
        """Write a little-endian word of 64 bits."""
        self.write(gpa, value.to_bytes(8, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """Write a little-endian word of 32 bits."""
        self.write(gpa, value.to_bytes(4, "little"))

    def _pieces(self, gpa: int, length: int) -> list[tuple[int, int]]:
        """[gpa, gpa+length) as runs (hpa, length)."""
        if length <= PAGE - (gpa & 0xFFF) and (hpa := self.hpa(gpa)) is not None:
            return [(hpa, length)] if length else []
        if self.p2m.absent:
            self._touch(gpa, length, ABSENT)
        pieces, at, end = [], gpa, gpa + length
        while at < end:
            word, frames = self.p2m.row(at >> PAGE_SHIFT, (end - at >> PAGE_SHIFT) + 2)
            if not word & PRESENT:
                break
            offset = at & 0xFFF
            part = min((frames << PAGE_SHIFT) - offset, end - at)
            pieces.append((word & ADDRESS | offset, part))
            at += part
        if at < end:
            raise GuestMemoryError(
                f"gpa {at:#x} ({end - at} bytes): expected RAM, which lies at "
                + ", ".join(f"{start:#x}+{size:#x}" for start, size in self.ranges())
            )
        return pieces

    def _touch(self, gpa: int, length: int, flags: int, *, write: bool = False) -> None:
        """Ask the owners of all frames here that have one of these flags."""
        first, count = _frames(gpa, length)
        for at, word, frames in list(self.p2m.pieces(first, first + count)):
            if not word & flags:
                continue
            for gfn in range(at, at + frames):
                if not self.p2m.touch(gfn, write=write):
                    raise GuestMemoryError(f"guest frame {gfn:#x}: its owner gives no access to it")


def _frames(gpa: int, length: int) -> tuple[int, int]:
    """(gfn, count) of all frames that these bytes touch; none where there can be no RAM."""
    first = gpa >> PAGE_SHIFT
    return (first, (gpa + length - 1 >> PAGE_SHIFT) + 1 - first) if gpa >= 0 else (0, 0)
