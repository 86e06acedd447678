"""The paging modes, each as a table of its levels, and the one walker that reads them all.

What: the formats of a guest's tables and of the EPT; `choose` says which one is in force;
`descend` follows a linear or guest-physical address from the root to where the tables end.
Source: SDM 3A, "Paging", the figures "Formats of CR3 and Paging-Structure Entries"; SDM 3C, "EPT
Translation Mechanism".

What is reserved follows from the layouts: the bits that no field names (so it depends on
`address.MAXPHYADDR`), and what a level or a mode reserves beside that.
Invariants: a walk ends after as many entries as the format has levels, whatever they contain; it
reads nothing but entries, each once, and calls nothing but `read`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from understudy.arch.address import FRAME
from understudy.arch.bits import Bits
from understudy.arch.cr import CR0, CR4
from understudy.arch.msr import EFER
from understudy.arch.paging_entry import (
    PDE2M,
    PDE4M,
    PDE32,
    PDPTE1G,
    PTE,
    PTE32,
    EptPage,
    EptTable,
    PdpteRegister,
    Table,
)

PRESENT: Final = PTE.P.mask
WRITABLE: Final = PTE.RW.mask
USER: Final = PTE.US.mask
ACCESSED: Final = PTE.A.mask
DIRTY: Final = PTE.D.mask
LARGE: Final = PDE2M.PS.mask
NO_EXECUTE: Final = PTE.XD.mask
READ_WRITE_EXECUTE: Final = EptPage.R.mask | EptPage.W.mask | EptPage.X.mask

ReadEntry = Callable[[int, int], int]
"""Reads an entry by its address and its bytes; 0 where there is no memory."""
Row = tuple[int, int, int, int, int]
"""A level for `descend`: shift, mask of the index, the bits of which one says that the entry maps
a page, and the bits reserved in an entry that names a table and in one that maps a page."""
Path = tuple[tuple[int, int], ...]
"""(address, entry) from the root down."""


class Level(NamedTuple):
    """One level of a format."""

    name: str  # of its entries, as the manual has it
    shift: int
    bits: int  # of its index
    table: type[Bits] | None  # the layout of an entry that names a table
    page: type[Bits] | None  # of one that maps a page
    may_map: bool  # an entry with PS maps a page
    reserved_table: int  # bits that must be 0 in an entry that names a table
    reserved_page: int  # in one that maps a page


def _level(
    name: str,
    shift: int,
    bits: int,
    table: type[Bits] | None,
    page: type[Bits] | None,
    also_reserved: int = 0,
) -> Level:
    """`also_reserved`: bits that this level reserves though a field of the layout names them."""
    in_table = in_page = 0
    if table is not None:
        in_table = unnamed(table) | also_reserved
    if page is not None:
        fields = {f.name: f for f in page.FIELDS}
        inside = (1 << shift) - 1  # address bits below the page's size
        in_page = unnamed(page) | also_reserved | fields["ADDR"].mask & inside
    may_map = table is not None and page is not None
    return Level(name, shift, bits, table, page, may_map, in_table, in_page)


def unnamed(layout: type[Bits]) -> int:
    """The bits that no field of a layout names."""
    named = sum(f.mask for f in layout.FIELDS)
    return (1 << layout.WIDTH) - 1 & ~named


@dataclass(frozen=True, eq=False)
class Format:
    """A paging mode: bytes of an entry, and its levels from the root down."""

    name: str  # as the manual has it
    entry_bytes: int
    levels: tuple[Level, ...]
    present: int = PRESENT  # one of these bits makes an entry present
    registers: int = 0  # levels, from the root, whose entries are registers and have no flags

    @cached_property
    def frame(self) -> int:
        """The bits of an entry that name a table."""
        return FRAME & (1 << 8 * self.entry_bytes) - 1

    @cached_property
    def root(self) -> int:
        """The bits of CR3, or of the EPTP, that name the root."""
        return 0xFFFF_FFE0 if self.registers else self.frame

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The levels in memory, as `descend` takes them."""
        return tuple(
            # Whatever is present at the last level maps a page.
            (level.shift, (1 << level.bits) - 1,
             self.present if level.table is None else LARGE * level.may_map,
             level.reserved_table, level.reserved_page)
            for level in self.levels[self.registers :]
        )  # fmt: skip

    @cached_property
    def rows_without_nx(self) -> tuple[Row, ...]:
        """The same while IA32_EFER.NXE is 0: XD is reserved."""
        xd = NO_EXECUTE if self.entry_bytes == 8 else 0
        return tuple((*row[:3], row[3] | xd, row[4] | xd) for row in self.rows)

    @cached_property
    def lenient_rows(self) -> tuple[Row, ...]:
        """The same for a look that goes on over reserved bits."""
        return tuple((*row[:3], 0, 0) for row in self.rows)

    @cached_property
    def linear_bits(self) -> int:
        """How wide the addresses are that it translates."""
        return self.levels[0].shift + self.levels[0].bits

    @cached_property
    def pages(self) -> tuple[int, ...]:
        """The sizes of its pages as shifts, the smallest first."""
        return tuple(level.shift for level in reversed(self.levels) if level.page is not None)


def _four_levels(first: Level) -> tuple[Level, ...]:
    return (
        first,
        _level("PDPTE", 30, 9, Table, PDPTE1G),
        _level("PDE", 21, 9, Table, PDE2M),
        _level("PTE", 12, 9, None, PTE),
    )


_NOT_IGNORED: Final = Table.IGNORED.mask  # by PAE paging, which reserves bits 62:52
_PML4E: Final = _level("PML4E", 39, 9, Table, None, LARGE)

IA32: Final = Format(
    "32-bit paging", 4, (_level("PDE", 22, 10, PDE32, None), _level("PTE", 12, 10, None, PTE32))
)
IA32_PSE: Final = Format(
    "32-bit paging", 4, (_level("PDE", 22, 10, PDE32, PDE4M), _level("PTE", 12, 10, None, PTE32))
)
PAE: Final = Format(
    "PAE paging",
    8,
    (
        _level("PDPTE", 30, 2, PdpteRegister, None),
        _level("PDE", 21, 9, Table, PDE2M, _NOT_IGNORED),
        _level("PTE", 12, 9, None, PTE, _NOT_IGNORED),
    ),
    registers=1,
)
LEVEL4: Final = Format("4-level paging", 8, _four_levels(_PML4E))
LEVEL5: Final = Format(
    "5-level paging", 8, (_level("PML5E", 48, 9, Table, None, LARGE), *_four_levels(_PML4E))
)
EPT: Final = Format(
    "EPT",
    8,
    (
        _level("PML4E", 39, 9, EptTable, None, LARGE),
        _level("PDPTE", 30, 9, EptTable, EptPage),
        _level("PDE", 21, 9, EptTable, EptPage),
        _level("PTE", 12, 9, None, EptPage),
    ),
    READ_WRITE_EXECUTE,
)
PDPTE_RESERVED: Final = PAE.levels[0].reserved_table

_ADDR, _ADDR_HIGH = PDE4M.ADDR.mask, PDE4M.ADDR_HIGH.mask
_PG, _PAE, _PSE, _LA57 = CR0.PG.mask, CR4.PAE.mask, CR4.PSE.mask, CR4.LA57.mask
_LMA: Final = EFER.LMA.mask


def choose(cr0: int, cr4: int, efer: int) -> Format | None:
    """The paging mode in force; None while paging is off."""
    if not cr0 & _PG:
        return None
    if efer & _LMA:
        return LEVEL5 if cr4 & _LA57 else LEVEL4
    if cr4 & _PAE:
        return PAE
    return IA32_PSE if cr4 & _PSE else IA32


class End:
    """How a walk has ended."""

    PAGE: Final = 0  # at an entry that maps a page
    ABSENT: Final = 1  # at one that is not present
    RESERVED: Final = 2  # at one that sets a reserved bit


Descent = tuple[int, int, int, int, list[tuple[int, int]]]
"""(how it ended, shift of the last level, AND of the entries, OR of them, the path).  The path
ends in the entry at which the walk ended."""


def descend(
    form: Format, rows: tuple[Row, ...], read: ReadEntry, table: int, place: int
) -> Descent:
    """Walk from a table to the page behind `place`.  `rows`: those of `form` that are left."""
    size, present, frame = form.entry_bytes, form.present, form.frame
    every, some = -1, 0
    path: list[tuple[int, int]] = []
    for shift, index_mask, maps, reserved_table, reserved_page in rows:
        at = table + (place >> shift & index_mask) * size
        entry = read(at, size)
        path.append((at, entry))
        if not entry & present:
            return 1, shift, every, some, path
        every &= entry
        some |= entry
        if entry & maps:
            return 2 if entry & reserved_page else 0, shift, every, some, path
        if entry & reserved_table:
            return 2, shift, every, some, path
        table = entry & frame
    raise AssertionError("the last level maps a page")


def frame_of(entry: int, shift: int, entry_bytes: int) -> int:
    """The address of the page that an entry maps."""
    if entry_bytes == 8:
        return entry & FRAME & -(1 << shift)
    if shift == 22:  # PSE-36: bits 20:13 are address bits 39:32
        return entry & _ADDR | (entry & _ADDR_HIGH) << 19
    return entry & 0xFFFF_F000
