"""Guest-physical memory: reads and writes through the p2m.

The map of a PC: RAM from 0 up to 3 GiB, the rest of it from 4 GiB on; between them lie the
devices.  0xA0000-0xFFFFF is RAM, too (firmware tables are written there), but `ranges` does
not report it as usable.

Invariant: whoever traces a frame hears of every write to it.
"""

from typing import Final, NewType

from understudy.machine.frames import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import GuestMemoryError, P2m

Gpa = NewType("Gpa", int)
Gva = NewType("Gva", int)
Hpa = NewType("Hpa", int)

LOW_END: Final = 0xC000_0000  # RAM below the devices ends here
HIGH_START: Final = 0x1_0000_0000
LEGACY_HOLE: Final = (0xA_0000, 0x10_0000)
GIGABYTE_FRAMES: Final = 1 << 18


class GuestMemory:
    """A VM's RAM, addressed by gpa."""

    def __init__(self, host: Host, size: int) -> None:
        self.host, self.size, self.p2m = host, size, P2m()
        self._memory = host.memory

    def populate(self) -> None:
        """Take the frames: gigabyte-aligned runs if there are any, so that pages can be large."""
        for gfn, count in self.layout():
            align = GIGABYTE_FRAMES if count >= GIGABYTE_FRAMES else 512
            for pfn, part in self.host.frames.allocate_runs(count, align):
                self.p2m.map(gfn, pfn, part)
                gfn += part

    def clear(self) -> None:
        """Make every byte zero."""
        for extent in self.p2m:
            self._memory.discard(extent.pfn << PAGE_SHIFT, extent.frames << PAGE_SHIFT)

    def layout(self) -> list[tuple[int, int]]:
        """Where RAM lies: (gfn, frames)."""
        low = min(self.size, LOW_END)
        parts = [(0, low >> PAGE_SHIFT)]
        if self.size > low:
            parts.append((HIGH_START >> PAGE_SHIFT, (self.size - low) >> PAGE_SHIFT))
        return parts

    def ranges(self) -> list[tuple[int, int]]:
        """Usable RAM as (gpa, bytes)."""
        low = min(self.size, LOW_END)
        hole, resume = LEGACY_HOLE
        parts = [(0, min(low, hole))]
        if low > resume:
            parts.append((resume, low - resume))
        if self.size > low:
            parts.append((HIGH_START, self.size - low))
        return parts

    def hpa(self, gpa: int) -> int | None:
        """The host-physical address behind `gpa`, or None where there is no RAM."""
        if self.p2m.absent:
            self.p2m.touch(gpa >> PAGE_SHIFT)
        extent = self.p2m.find(gpa >> PAGE_SHIFT)
        return None if extent is None else gpa + ((extent.pfn - extent.gfn) << PAGE_SHIFT)

    def read(self, gpa: int, length: int) -> bytes:
        """The bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        pieces = [self._memory.read(hpa, part) for hpa, part in self._pieces(gpa, length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at `gpa`; GuestMemoryError if any of them is not RAM."""
        view = memoryview(data).cast("B")
        if self.p2m.protected:
            for gfn in range(gpa >> PAGE_SHIFT, (gpa + len(view) + PAGE - 1) >> PAGE_SHIFT):
                self.p2m.touch(gfn, write=True)
        at = 0
        for hpa, part in self._pieces(gpa, len(view)):
            self._memory.write(hpa, view[at : at + part])
            at += part
        if self.p2m.traced:
            self._tell(gpa, len(view))

    def _tell(self, gpa: int, length: int) -> None:
        """Those who trace a frame hear of writes by the hypervisor, page by page."""
        end = gpa + length
        while gpa < end:
            part = min(end - gpa, PAGE - (gpa & (PAGE - 1)))
            if gpa >> PAGE_SHIFT in self.p2m.traced:
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
        pieces = []
        if self.p2m.absent:
            for gfn in range(gpa >> PAGE_SHIFT, (gpa + length + PAGE - 1) >> PAGE_SHIFT):
                self.p2m.touch(gfn)
        while length:
            extent = self.p2m.find(gpa >> PAGE_SHIFT)
            if extent is None or gpa < 0:
                raise GuestMemoryError(
                    f"gpa {gpa:#x} ({length} bytes): expected RAM, which lies at "
                    + ", ".join(f"{start:#x}+{size:#x}" for start, size in self.ranges())
                )
            part = min(length, ((extent.gfn + extent.frames) << PAGE_SHIFT) - gpa)
            pieces.append((gpa + ((extent.pfn - extent.gfn) << PAGE_SHIFT), part))
            gpa, length = gpa + part, length - part
        return pieces
