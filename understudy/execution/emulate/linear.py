"""A guest's memory by linear addresses, as the interpreter reaches it: its own tables are walked.

Source: SDM 3A, "Paging", "Caching Translation Information".

Invariants: what is kept of walks is forgotten whenever the guest could notice; a refused access, or
one to where there is no RAM, has no effect and raises Refused.
"""

from collections.abc import Callable
from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.guest import Control
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import ADDRESS, PRESENT
from understudy.paging.guest_walk import NO_KEYS, GuestFault, Keys, Translation

OFFSET: Final = PAGE - 1
MASK64: Final = (1 << 64) - 1
PAGES_KEPT: Final = 1 << 16  # that walks have led to, of each kind and privilege
LARGE_SHIFTS: Final = (21, 22, 30)
ANY: Final = (0, 0)  # in place of more large pages than are kept
PRIVILEGES_KEPT: Final = 16
Privilege = tuple[int, bool, Keys]
"""CPL, RFLAGS.AC, and what protection keys leave."""
NOWHERE: Final = Control(0, 0, 0, 0)


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


class Rewritten(Exception):
    """An instruction is about to write over code that has been decoded, or had its frames moved.

    It has changed nothing yet.
    """


class Pages:
    """What walks have found at one privilege: page of a linear address to hpa of the page."""

    def __init__(self) -> None:
        self.reads: dict[int, int] = {}
        self.writes: dict[int, int] = {}  # but those where decoded code lies
        self.guarded: dict[int, int] = {}  # those
        self.fetches: dict[int, int] = {}


class Linear:
    """Loads, stores and fetches; each page is walked once until `forget`.

    `epoch` tells decoded code that it may not be what is in memory any more.
    """

    def __init__(self, ram: Ram) -> None:
        self.ram, self.memory = ram, ram.memory
        self.epoch = 0
        self.covered: dict[int, int] = {}  # hpa of a page: a bit for each byte that is decoded code
        self._all: dict[Privilege, Pages] = {}
        self.large: set[tuple[int, int]] = set()  # (shift, gva >> shift) of pages that were large
        self._control, self._privilege = NOWHERE, (0, False, NO_KEYS)
        self._changes = ram.p2m.changes  # when walks were looked at last
        self._mean()

    def _mean(self) -> None:
        cr0, cr3, cr4, efer, pdptes = self._control
        cpl, ac, keys = self._privilege
        self.translation = Translation(cr0, cr3, cr4, efer, cpl, pdptes, ac, keys)
        pages = self._all.get(self._privilege)
        if pages is None:
            if len(self._all) >= PRIVILEGES_KEPT:
                self._all.clear()
            pages = self._all[self._privilege] = Pages()
        self.pages = pages
        self.reads, self.writes, self.fetches = pages.reads, pages.writes, pages.fetches

    def follow(self, control: Control, privilege: Privilege) -> None:
        """Linear addresses mean this now; others than `store` may have changed memory."""
        self.epoch += 1
        changes = self.ram.p2m.changes
        if control != self._control or changes != self._changes:
            self._control, self._changes = control, changes
            self._all.clear()
            self.large.clear()
        elif privilege == self._privilege:
            return
        self._privilege = privilege
        self._mean()

    def become_supervisor(self) -> None:
        """From here on accesses are the processor's own, until `follow` says otherwise."""
        privilege = 0, False, self._privilege[2]
        if privilege != self._privilege:
            self._privilege = privilege
            self._mean()

    def forget(self) -> None:
        """Walk again."""
        self._all.clear()
        self.large.clear()
        self._mean()
        self.epoch += 1

    def invalidate(self, gva: int) -> None:
        """Walk to this address again; what is kept of a large page goes with all else."""
        large = self.large
        if ANY in large or any((shift, gva >> shift) in large for shift in LARGE_SHIFTS):
            self.forget()
            return
        number = gva >> PAGE_SHIFT
        for pages in self._all.values():
            for kept in (pages.reads, pages.writes, pages.guarded, pages.fetches):
                kept.pop(number, None)
        self.epoch += 1

    def forget_code(self) -> None:
        """No code is decoded."""
        self.covered.clear()
        self.epoch += 1

    def _walk(self, gva: int, kept: dict[int, int], write: bool, fetch: bool) -> int:
        ram = self.ram
        found = self.translation.find(ram, gva, write=write, fetch=fetch)
        if len(kept) >= PAGES_KEPT:
            kept.clear()
        if found.shift > PAGE_SHIFT:
            if len(self.large) >= PAGES_KEPT:
                self.large = {ANY}
            self.large.add((found.shift, gva >> found.shift))
        page = ram.here(found.gpa, write=write) & -PAGE
        if ram.p2m.changes != self._changes:
            self._moved()
        kept[gva >> PAGE_SHIFT] = page
        return page

    def _moved(self) -> None:
        """A walk had frames moved: what was kept may lead to where they were.

        Rewritten: where decoded code lies is not known any more.
        """
        self._changes = self.ram.p2m.changes
        self.forget()
        if self.covered:
            self.forget_code()
            raise Rewritten

    # --- data ---

    def load(self, gva: int, size: int) -> int:
        """The value there."""
        offset = gva & OFFSET
        if offset + size > PAGE:
            return self._load_both(gva, size, self.load)
        page = self.reads.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._walk(gva, self.reads, False, False)
        if size == 8:
            return self.memory.read_u64(page | offset)
        if size == 4:
            return self.memory.read_u32(page | offset)
        return int.from_bytes(self.memory.read(page | offset, size), "little")

    def load_to_write(self, gva: int, size: int) -> int:
        """The same of what will be written: refused, and marked as dirty, as a write is."""
        offset = gva & OFFSET
        if offset + size > PAGE:
            return self._load_both(gva, size, self.load_to_write)
        page = self.writes.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._to_write(gva, size)
        if size == 8:
            return self.memory.read_u64(page | offset)
        if size == 4:
            return self.memory.read_u32(page | offset)
        return int.from_bytes(self.memory.read(page | offset, size), "little")

    def _load_both(self, gva: int, size: int, load: Callable[[int, int], int]) -> int:
        first = PAGE - (gva & OFFSET)
        low = load(gva, first)
        return low | load(gva + first & MASK64, size - first) << 8 * first

    def store(self, gva: int, size: int, value: int) -> None:
        """Set it.  Rewritten: decoded code is there."""
        offset = gva & OFFSET
        page = self.writes.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._to_write(gva, min(size, PAGE - offset))
        if offset + size > PAGE:
            first, rest = PAGE - offset, offset + size - PAGE
            after = gva + first & MASK64
            if after >> PAGE_SHIFT not in self.writes:
                self._to_write(after, rest)
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

    def _to_write(self, gva: int, size: int) -> int:
        """The page, to be written, of bytes inside it that `writes` does not know."""
        pages, number = self.pages, gva >> PAGE_SHIFT
        page = pages.guarded.get(number)
        if page is None:
            page = self._walk(gva, pages.writes, True, False)
            if page not in self.covered:
                return page
            pages.guarded[number] = pages.writes.pop(number)
        if self.covered.get(page, 0) >> (gva & OFFSET) & (1 << size) - 1:
            del self.covered[page]
            self.epoch += 1
            raise Rewritten
        return page

    # --- code ---

    def code(self, gva: int, longest: int) -> bytes:
        """As many bytes of code as are in this page, at most `longest`."""
        page = self.fetches.get(gva >> PAGE_SHIFT)
        if page is None:
            page = self._walk(gva, self.fetches, False, True)
        offset = gva & OFFSET
        return self.memory.read(page | offset, min(longest, PAGE - offset))

    def cover(self, gva: int, length: int) -> None:
        """Bytes that `code` has given, at most up to the next page's end, are decoded now."""
        if len(self.covered) >= PAGES_KEPT:
            self.forget_code()
        while length:
            offset = gva & OFFSET
            part = min(length, PAGE - offset)
            page = self.fetches.get(gva >> PAGE_SHIFT)
            if page is None:  # the next one's frame took its place
                page = self._walk(gva, self.fetches, False, True)
            if page not in self.covered:
                self._guard(page)
            self.covered[page] = self.covered.get(page, 0) | (1 << part) - 1 << offset
            gva, length = gva + part & MASK64, length - part

    def _guard(self, page: int) -> None:
        """Stores to this page are looked at from now on."""
        for pages in self._all.values():
            numbers = [number for number, hpa in pages.writes.items() if hpa == page]
            for number in numbers:
                pages.guarded[number] = pages.writes.pop(number)
