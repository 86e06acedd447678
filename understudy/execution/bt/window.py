"""The window in the shadow tables: a copy of their root that leads to the cache as well.

The processor gets the copy, so that the shadow tables know nothing of the window.  A shadow changes
only while the hypervisor runs, so the copy is made anew before the guest goes on.  With 64-bit code
the window hangs from an entry of the root of its own; with 32-bit code (PAE tables, see
`paging/shadow.py`) the last of the four page directories is copied, too.

Source: SDM 3A, "4-Level Paging and 5-Level Paging", "PAE Paging".
"""

from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.execution.bt.cache import CHUNK, Cache
from understudy.execution.bt.layout import (
    CODE,
    IF,
    OPENING,
    PAGE_TABLES,
    TAGS,
    TARGETS,
    WINDOW,
    Layout,
)
from understudy.guest import Control
from understudy.machine.host import Host
from understudy.machine.words import ADDRESS
from understudy.paging.guest_walk import ACCESSED, DIRTY, PRESENT, WRITABLE, ReadEntry, Regime

TABLE: Final = PRESENT | WRITABLE | ACCESSED
PAGE_RO: Final = PRESENT | ACCESSED | DIRTY
PAGE_RW: Final = PAGE_RO | WRITABLE
OWN_FRAMES: Final = 4 + PAGE_TABLES
ALL_BYTES: Final = WINDOW + CODE + OWN_FRAMES * PAGE
"""With the data and the table of a new cache, while the one before is still there."""
FIRST64, LAST64 = 256, 510
"""Entries of a root in the upper half that may lead to the window."""
FIRST32, LAST32 = 0xC000_0000, 0xFE00_0000 - WINDOW
PREFERRED32: Final = 0xF000_0000
STEP32: Final = 1 << 22
LAST_QUARTER: Final = 3 << 30
DIRECTORY: Final = 3


class Window:
    """One vCPU's tables."""

    def __init__(self, host: Host) -> None:
        self.host, self.memory = host, host.memory
        self._at = host.frame(OWN_FRAMES)
        self.root = self._at
        self._above = [self._at + PAGE * n for n in range(1, 4)]  # PDPT and PD; PD of 32-bit code
        self._tables = self._at + 4 * PAGE
        self.layout = Layout(0, 0)
        self.flag_frame = 0

    def frames(self) -> list[int]:
        """The pfns of its tables."""
        return [(self._at >> PAGE_SHIFT) + n for n in range(OWN_FRAMES)]

    def close(self) -> None:
        """Give them back."""
        self.host.release(self._at >> PAGE_SHIFT, OWN_FRAMES)

    def show(self, cache: Cache) -> None:
        """Lead to this cache."""
        self.layout = layout = cache.layout
        self.memory.fill(self._at, OWN_FRAMES * PAGE)
        write, (pdpt, directory, _) = self.memory.write_u64, self._above
        if layout.bits == 64:
            write(pdpt, directory | TABLE)
            for n in range(PAGE_TABLES):
                write(directory + 8 * n, self._tables + n * PAGE | TABLE)
        self._map(0, cache.data, 2, PAGE_RW)
        self.flag_frame = cache.data + IF
        self._map(OPENING, self.flag_frame, 1, PAGE_RW)
        pages = (1 << 16) * layout.word >> PAGE_SHIFT
        self._map(TAGS, cache.tags, pages, PAGE_RO)
        self._map(TARGETS, cache.targets, pages, PAGE_RO)
        for n, chunk in enumerate(cache.chunks):
            self.show_code(n, chunk, CHUNK)

    def show_code(self, number: int, hpa: int, frames: int) -> None:
        """One more chunk of code."""
        self._map(CODE + number * frames * PAGE, hpa, frames, PAGE_RO)

    def let_flag_change(self, may: bool) -> None:
        """Whether the guest may set its IF; the processor is told by who calls."""
        self._map(OPENING, self.flag_frame, 1, PAGE_RW if may else PAGE_RO)

    def _map(self, offset: int, hpa: int, count: int, flags: int) -> None:
        first = self._tables + 8 * (offset >> PAGE_SHIFT)
        for n in range(count):
            self.memory.write_u64(first + 8 * n, hpa + n * PAGE | flags)

    def copy(self, shadow_root: int) -> None:
        """The root of the shadow tables is this one, and they may have changed."""
        memory, layout = self.memory, self.layout
        read, write = memory.read, memory.write
        if layout.bits == 64:
            write(self.root, read(shadow_root, PAGE))
            memory.write_u64(self.root + (layout.base >> 36 & 0xFF8), self._above[0] | TABLE)
            return
        write(self.root, read(shadow_root, 32))
        last = memory.read_u64(shadow_root + 8 * DIRECTORY)
        directory = self._above[2]
        if last & PRESENT:
            write(directory, read(last & ADDRESS, PAGE))
        else:
            memory.fill(directory, PAGE)
        first = directory + ((layout.base & ~LAST_QUARTER) >> 18)
        for n in range(PAGE_TABLES):
            memory.write_u64(first + 8 * n, self._tables + n * PAGE | TABLE)
        memory.write_u64(self.root + 8 * DIRECTORY, directory | PRESENT)


def is_free(layout: Layout, regime: Regime, read: ReadEntry) -> bool:
    """Whether the guest's tables map nothing where the window is."""
    if layout.bits == 64:
        return not read(regime.root + (layout.base >> 36 & 0xFF8), 8) & PRESENT
    if (table := table_of(layout, regime)) is None:
        return True
    shift, size = (21, 8) if regime.is_pae else (22, 4)
    at = layout.base & ~LAST_QUARTER if regime.is_pae else layout.base
    return not any(
        read(table + (at + offset >> shift) * size, size) & PRESENT
        for offset in range(0, WINDOW, 1 << shift)
    )


def table_of(layout: Layout, regime: Regime) -> int | None:
    """The gpa of the guest's table with the entries where the window is; None: there is none."""
    if layout.bits == 64 or (regime.format is not None and not regime.is_pae):
        return regime.root
    if regime.format is None:
        return None
    assert regime.pdptes is not None
    entry = regime.pdptes[DIRECTORY]
    return entry & ADDRESS if entry & PRESENT else None


def choose(bits: int, control: Control, read: ReadEntry) -> Layout | None:
    """Where the guest maps nothing; None: nowhere."""
    regime = Regime(control.cr0, control.cr3, control.cr4, control.efer, control.pdptes)
    if bits == 64:
        bases = [0xFFFF << 48 | n << 39 for n in range(FIRST64, LAST64 + 1)]
    else:
        bases = [PREFERRED32, *range(FIRST32, LAST32 + 1, STEP32)]
    layouts = (Layout(base, bits) for base in bases)
    return next((layout for layout in layouts if is_free(layout, regime, read)), None)
