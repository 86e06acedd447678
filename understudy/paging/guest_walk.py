"""Walks a guest's own page tables: for faults, and for instructions carried out in its stead.

Source: SDM 3A, "Paging", "Page-Fault Exceptions", "Access Rights".  The formats are data: IA-32,
PAE and Intel 64.

Invariants: a walk raises the fault that the processor would raise, with its error code, and
nothing else for whatever a guest's tables contain; a table outside RAM reads as not present.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, Protocol

from understudy.arch.cr import CR0, CR4
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
LARGE: Final = 1 << 7
NO_EXECUTE: Final = 1 << 63
ADDRESS: Final = 0xF_FFFF_FFFF_F000
PHYSICAL: Final = (1 << 46) - 1  # the addresses that there are

E_PRESENT: Final = 1 << 0  # of a page fault's error code
E_WRITE: Final = 1 << 1
E_USER: Final = 1 << 2
E_RESERVED: Final = 1 << 3
E_FETCH: Final = 1 << 4

PG: Final = CR0.PG.mask
WP: Final = CR0.WP.mask
PAE: Final = CR4.PAE.mask
PSE: Final = CR4.PSE.mask
PGE: Final = CR4.PGE.mask
PCIDE: Final = CR4.PCIDE.mask
SMEP: Final = CR4.SMEP.mask
SMAP: Final = CR4.SMAP.mask
LMA: Final = EFER.LMA.mask
NXE: Final = EFER.NXE.mask


Path = tuple[tuple[int, int], ...]
"""(gpa, entry) from the root down; the PDPTEs of PAE paging, which have no flags, are left out."""


class GuestFault(Exception):
    """The access is not allowed: this exception, with this error code; gva goes to CR2."""

    def __init__(self, gva: int, error: int, vector: Vector = Vector.PF, path: "Path" = ()) -> None:
        """`path`: the tables that the walk went through, whose entries count as accessed."""
        super().__init__(gva, error)
        self.gva, self.error, self.vector, self.path = gva, error, vector, path

    def __str__(self) -> str:
        return f"#{self.vector.name} at {self.gva:#x}, error code {self.error:#x}"


class PhysicalMemory(Protocol):
    """Guest-physical memory as a walk needs it."""

    def hpa(self, gpa: int) -> int | None: ...
    def read_u32(self, gpa: int) -> int: ...
    def read_u64(self, gpa: int) -> int: ...
    def write_u32(self, gpa: int, value: int) -> None: ...
    def write_u64(self, gpa: int, value: int) -> None: ...
    def read(self, gpa: int, length: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...


class Level(NamedTuple):
    """One level of a format.  `reserved`: bits that must be 0, in a table's entry and a page's."""

    shift: int
    index_mask: int
    may_map: bool  # an entry with PS maps a page
    has_rights: bool  # R/W, U/S, accessed (not the PDPTEs of PAE paging)
    reserved_table: int
    reserved_page: int


class Format(NamedTuple):
    """A paging mode: bytes of an entry, and its levels from the root."""

    name: str
    entry_bytes: int
    levels: tuple[Level, ...]


def _intel64() -> Format:
    high = ADDRESS & ~PHYSICAL
    top = Level(39, 511, False, True, high | LARGE, 0)
    middle = (Level(n, 511, True, True, high, high | (1 << n) - 0x2000) for n in (30, 21))
    return Format("Intel 64", 8, (top, *middle, Level(12, 511, False, True, 0, high)))


def _pae() -> Format:
    high = (1 << 63) - 1 & ~PHYSICAL
    return Format("PAE", 8, (
        Level(30, 3, False, False, 0, 0),  # PDPTEs are checked when they are loaded
        Level(21, 511, True, True, high, high | (1 << 21) - 0x2000),
        Level(12, 511, False, True, 0, high),
    ))  # fmt: skip


def _ia32(has_large: bool) -> Format:
    return Format("IA-32 with PSE" if has_large else "IA-32", 4, (
        Level(22, 1023, has_large, True, 0, 1 << 21), Level(12, 1023, False, True, 0, 0),
    ))  # fmt: skip


IA32: Final = _ia32(False)
IA32_PSE: Final = _ia32(True)
PAE_FORMAT: Final = _pae()
INTEL64: Final = _intel64()
PDPTE_RESERVED: Final = 0x1E6 | (1 << 64) - 1 & ~PHYSICAL


class Found(NamedTuple):
    """A walk that reached a page."""

    gpa: int  # of the byte, not of the page
    shift: int  # log2 of the page's size
    rights: int  # WRITABLE | USER, combined over the levels
    no_execute: bool
    path: Path


class Regime:
    """What decides how a guest's linear addresses translate, prepared for many walks."""

    def __init__(
        self, cr0: int, cr3: int, cr4: int, efer: int, pdptes: tuple[int, ...] | None = None
    ) -> None:
        self.cr0, self.cr3, self.cr4, self.efer, self.pdptes = cr0, cr3, cr4, efer, pdptes
        self.format = form = self._choose()
        self.is_pae = form is PAE_FORMAT
        self.entry_bytes = form.entry_bytes if form is not None else 8
        self.nx = bool(efer & NXE) and self.entry_bytes == 8
        self.wp, self.smep, self.smap = bool(cr0 & WP), bool(cr4 & SMEP), bool(cr4 & SMAP)
        self.root = cr3 & (0xFFFF_FFE0 if self.is_pae else ADDRESS & PHYSICAL)
        if self.entry_bytes == 4:
            self.root &= 0xFFFF_F000
        self.reserved_nx = 0 if self.nx or self.entry_bytes == 4 else NO_EXECUTE
        self.error_mask = E_WRITE | E_USER | (E_FETCH if self.nx or self.smep else 0)
        self.address_mask = 0xFFFF_F000 if self.entry_bytes == 4 else ADDRESS

    def _choose(self) -> Format | None:
        if not self.cr0 & PG:
            return None
        if self.efer & LMA:
            return INTEL64
        if self.cr4 & PAE:
            return PAE_FORMAT
        return IA32_PSE if self.cr4 & PSE else IA32

    def walk(self, read: "ReadEntry", gva: int, error: int, smap: bool = False) -> Found:
        """Where the access goes that `error` describes (E_WRITE, E_USER, E_FETCH); no effects.

        `smap`: a supervisor access that SMAP keeps from user pages.  Raises GuestFault.
        """
        form = self.format
        if form is None:
            return Found(gva & 0xFFFF_FFFF, 30, WRITABLE | USER, False, ())
        code = error & self.error_mask
        rights, no_execute = WRITABLE | USER, False
        path: list[tuple[int, int]] = []
        table, size = self.root, self.entry_bytes
        for shift, index_mask, may_map, has_rights, reserved_table, reserved_page in form.levels:
            index = gva >> shift & index_mask
            at = table + index * size
            kept = None if has_rights else self.pdptes
            entry = read(at, size) if kept is None else kept[index]
            if not entry & PRESENT:
                raise GuestFault(gva, code, path=tuple(path))
            is_page = shift == 12 or (may_map and bool(entry & LARGE))
            if has_rights:
                reserved = reserved_page if is_page else reserved_table
                if entry & (reserved | self.reserved_nx):
                    raise GuestFault(gva, code | E_PRESENT | E_RESERVED, path=tuple(path))
                rights &= entry
                no_execute = no_execute or bool(entry & NO_EXECUTE)
                path.append((at, entry))
            if is_page:
                if self._refuses(error, rights, no_execute, smap):
                    raise GuestFault(gva, code | E_PRESENT, path=tuple(path[:-1]))
                frame = frame_of(entry, shift, size)
                return Found(frame | gva & (1 << shift) - 1, shift, rights, no_execute, tuple(path))
            table = entry & self.address_mask
        raise AssertionError("the last level maps a page")

    def _refuses(self, error: int, rights: int, no_execute: bool, smap: bool) -> bool:
        user, write, fetch = error & E_USER, error & E_WRITE, error & E_FETCH
        if user and not rights & USER:
            return True
        if fetch:
            return no_execute or bool(not user and self.smep and rights & USER)
        if not user and smap and rights & USER:
            return True
        return bool(write and not rights & WRITABLE and (user or self.wp))

    def load_pdptes(self, read: "ReadEntry") -> tuple[int, ...]:
        """What MOV to CR3 loads under PAE paging (SDM 3A, "PDPTE Registers").

        Raises GuestFault with #GP(0) if a present one sets reserved bits.
        """
        entries = tuple(read(self.root + 8 * n, 8) for n in range(4))
        if any(entry & PRESENT and entry & PDPTE_RESERVED for entry in entries):
            raise GuestFault(0, 0, Vector.GP)
        return entries


ReadEntry = Callable[[int, int], int]
"""Reads a table's entry by gpa and size; 0 where there is no RAM."""


def entries_of(memory: PhysicalMemory) -> ReadEntry:
    """How to read a guest's tables in this memory."""

    def read(at: int, size: int) -> int:
        if memory.hpa(at) is None:
            return 0
        return memory.read_u64(at) if size == 8 else memory.read_u32(at)

    return read


def frame_of(entry: int, shift: int, size: int) -> int:
    """The address of the page that an entry maps."""
    if size == 4:
        if shift == 22:  # PSE-36: bits 20:13 are address bits 39:32
            return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
        return entry & 0xFFFF_F000
    return entry & ADDRESS & ~((1 << shift) - 1)


@dataclass(frozen=True)
class Translation:
    """What a guest's linear addresses mean now, at one privilege level.

    `ac`: RFLAGS.AC, with which a supervisor lifts SMAP.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    cpl: int = 0
    pdptes: tuple[int, ...] | None = None
    ac: bool = False

    @cached_property
    def regime(self) -> Regime:
        """The same without the privilege level."""
        return Regime(self.cr0, self.cr3, self.cr4, self.efer, self.pdptes)

    @property
    def format(self) -> Format | None:
        """None while paging is off."""
        return self.regime.format

    def gpa(
        self, memory: PhysicalMemory, gva: int, *, write: bool = False, fetch: bool = False,
        mark: bool = True,
    ) -> int:  # fmt: skip
        """The address behind `gva`; GuestFault if the access is refused.

        With `mark`, accessed and dirty flags are set as the processor would.
        """
        regime = self.regime
        if regime.format is INTEL64:
            if (gva + (1 << 47)) >> 48 & 0xFFFF:  # not canonical
                raise GuestFault(gva, 0, Vector.GP)
        else:
            gva &= 0xFFFF_FFFF
        error = write * E_WRITE | (self.cpl == 3) * E_USER | fetch * E_FETCH
        smap = regime.smap and self.cpl < 3 and not self.ac
        found = regime.walk(entries_of(memory), gva, error, smap)
        if mark:
            put = memory.write_u64 if regime.entry_bytes == 8 else memory.write_u32
            for (at, entry), wanted in zip(found.path, marks(found.path, write), strict=True):
                if wanted & ~entry:
                    put(at, entry | wanted)
        return found.gpa

    def read(self, memory: PhysicalMemory, gva: int, length: int, *, fetch: bool = False) -> bytes:
        """Bytes at a linear address.  IndexError if they are not RAM."""
        out = b""
        while length:
            part = min(length, 0x1000 - (gva & 0xFFF))
            out += memory.read(self.gpa(memory, gva, fetch=fetch), part)
            gva, length = gva + part, length - part
        return out


def marks(path: Path, write: bool) -> list[int]:
    """The flags that an access sets in the entries of a path."""
    return [ACCESSED] * (len(path) - 1) + [ACCESSED | DIRTY if write else ACCESSED] * bool(path)
