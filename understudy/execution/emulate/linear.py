"""A guest's memory by linear addresses, as the interpreter reaches it: its own tables are walked.

Source: SDM 3A, "Paging", "Caching Translation Information".

Invariants: what is kept of walks is forgotten whenever the guest could notice; a refused access, or
one to where there is no RAM, has no effect and raises Refused.
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import ADDRESS, PRESENT
from understudy.paging.guest_walk import GuestFault, Translation

OFFSET: Final = PAGE - 1
MASK64: Final = (1 << 64) - 1


class Refused(GuestFault):
    """It is not for the interpreter to access this."""


class Ram:
    """Guest-physical memory, as `guest_walk.PhysicalMemory`."""

    def __init__(self, host: Host, p2m: P2m) -> None:
        self.memory, self.p2m = host.memory, p2m

    def hpa(self, gpa: int) -> int | None:
        """Where it lies on the host; None: no RAM."""
        word = self.p2m.word(gpa >> PAGE_SHIFT)
        if not word & PRESENT:
            if not self.p2m.touch(gpa >> PAGE_SHIFT):
                return None
            word = self.p2m.word(gpa >> PAGE_SHIFT)
        return word & ADDRESS | gpa & OFFSET

    def here(self, gpa: int, *, write: bool = False) -> int:
        """Where it lies on the host, to be read or written.  Refused: no RAM."""
        if write and (self.p2m.protected or self.p2m.absent):
            self.p2m.touch(gpa >> PAGE_SHIFT, write=True)
        hpa = self.hpa(gpa)
        if hpa is None:
            raise Refused(gpa, 0)
        return hpa

    def read(self, gpa: int, length: int) -> bytes:
        """Bytes inside one page."""
        return self.memory.read(self.here(gpa), length)

    def read_u32(self, gpa: int) -> int:
        """A word of 32 bits."""
        return self.memory.read_u32(self.here(gpa))

    def read_u64(self, gpa: int) -> int:
        """A word of 64 bits."""
        return self.memory.read_u64(self.here(gpa))

    def write(self, gpa: int, data: bytes) -> None:
        """Bytes inside one page; who traces it hears."""
        self.memory.write(self.here(gpa, write=True), data)
        if self.p2m.tracers:
            self.p2m.written(gpa, len(data))

    def write_u32(self, gpa: int, value: int) -> None:
        """A word of 32 bits."""
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """A word of 64 bits."""
        self.write(gpa, value.to_bytes(8, "little"))


class Linear:
    """Loads, stores and fetches; each page is walked once until `forget`."""

    def __init__(self, ram: Ram) -> None:
        self.ram, self.memory = ram, ram.memory
        self.translation = Translation(0, 0, 0, 0)
        self.reads: dict[int, int] = {}  # page of a linear address: hpa of the page
        self.writes: dict[int, int] = {}
        self.fetches: dict[int, int] = {}

    def follow(self, translation: Translation) -> None:
        """Linear addresses mean this now."""
        if translation != self.translation:
            self.translation = translation
            self.forget()

    def forget(self) -> None:
        """Walk again."""
        for kept in (self.reads, self.writes, self.fetches):
            kept.clear()

    def _walk(self, gva: int, kept: dict[int, int], write: bool, fetch: bool) -> int:
        ram = self.ram
        gpa = self.translation.gpa(ram, gva, write=write, fetch=fetch)
        page = kept[gva >> PAGE_SHIFT] = ram.here(gpa, write=write) & -PAGE
        return page

    def load(self, gva: int, size: int) -> int:
        """The value there."""
        offset = gva & OFFSET
        if offset + size > PAGE:
            first = PAGE - offset
            low = self.load(gva, first)
            return low | self.load(gva + first & MASK64, size - first) << 8 * first
        page = self.reads.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._walk(gva, self.reads, False, False)
        if size == 8:
            return self.memory.read_u64(page | offset)
        if size == 4:
            return self.memory.read_u32(page | offset)
        return int.from_bytes(self.memory.read(page | offset, size), "little")

    def store(self, gva: int, size: int, value: int) -> None:
        """Set it."""
        offset = gva & OFFSET
        page = self.writes.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._walk(gva, self.writes, True, False)
        if offset + size > PAGE:
            first, rest = PAGE - offset, offset + size - PAGE
            after = gva + first & MASK64
            if after >> PAGE_SHIFT not in self.writes:
                self._walk(after, self.writes, True, False)
            self.store(gva, first, value & (1 << 8 * first) - 1)
            self.store(after, rest, value >> 8 * first)
        elif self.ram.p2m.tracers:
            self.ram.write(self.translation.gpa(self.ram, gva, write=True),
                           value.to_bytes(size, "little"))  # fmt: skip
        elif size == 8:
            self.memory.write_u64(page | offset, value)
        elif size == 4:
            self.memory.write_u32(page | offset, value)
        else:
            self.memory.write(page | offset, value.to_bytes(size, "little"))

    def code(self, gva: int, longest: int) -> bytes:
        """As many bytes of code as are in this page, at most `longest`."""
        page = self.fetches.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._walk(gva, self.fetches, False, True)
        offset = gva & OFFSET
        return self.memory.read(page | offset, min(longest, PAGE - offset))
