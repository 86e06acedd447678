"""Walks a guest's own page tables: for faults, and for instructions carried out in its stead.

Source: SDM 3A, "Paging", "Page-Fault Exceptions", "Access Rights".  The formats and the walker
itself are in `arch/paging_formats.py`; here is what a guest may do by what a walk has found.

Invariants: a walk raises the fault that the processor would raise, with its error code, and
nothing else for whatever a guest's tables contain; a table outside RAM reads as not present.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, Protocol

from understudy.arch import paging_formats
from understudy.arch.address import FRAME, is_canonical
from understudy.arch.cr import CR0, CR4
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER
from understudy.arch.paging_entry import PTE
from understudy.arch.paging_formats import (
    ACCESSED,
    DIRTY,
    LARGE,
    NO_EXECUTE,
    PDPTE_RESERVED,
    PRESENT,
    USER,
    WRITABLE,
    End,
    Format,
    Path,
    ReadEntry,
    descend,
    frame_of,
)

__all__ = [
    "ACCESSED",
    "ADDRESS",
    "DIRTY",
    "E_FETCH",
    "E_KEY",
    "E_USER",
    "E_WRITE",
    "INTEL64",
    "KEY",
    "KEY_SHIFT",
    "LARGE",
    "NO_EXECUTE",
    "NO_KEYS",
    "PAE_FORMAT",
    "PRESENT",
    "USER",
    "WRITABLE",
    "Format",
    "Found",
    "GuestFault",
    "Path",
    "PhysicalMemory",
    "ReadEntry",
    "Regime",
    "Translation",
    "entries_of",
    "frame_of",
    "key_refuses",
    "marks",
]  # and so all that a technique needs of an entry

E_PRESENT: Final = 1 << 0  # of a page fault's error code
E_WRITE: Final = 1 << 1
E_USER: Final = 1 << 2
E_RESERVED: Final = 1 << 3
E_FETCH: Final = 1 << 4
E_KEY: Final = 1 << 5

WP: Final = CR0.WP.mask
SMEP: Final = CR4.SMEP.mask
SMAP: Final = CR4.SMAP.mask
NXE: Final = EFER.NXE.mask
RIGHTS: Final = WRITABLE | USER

PAGE: Final = End.PAGE
RESERVED: Final = End.RESERVED
ADDRESS: Final = FRAME
PAE_FORMAT: Final = paging_formats.PAE
INTEL64: Final = paging_formats.LEVEL4
KEY: Final = PTE.KEY.mask
KEY_SHIFT: Final = PTE.KEY.low
Keys = tuple[int, int]
"""PKRU, for user pages, and IA32_PKRS, for supervisor pages; 0 where it is not in force."""
NO_KEYS: Final[Keys] = (0, 0)


class GuestFault(Exception):
    """The access is not allowed: this exception, with this error code; gva goes to CR2."""

    def __init__(self, gva: int, error: int, vector: Vector = Vector.PF) -> None:
        super().__init__(gva, error)
        self.gva, self.error, self.vector = gva, error, vector

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


class Found(NamedTuple):
    """A walk that reached a page."""

    gpa: int  # of the byte, not of the page
    shift: int  # log2 of the page's size
    rights: int  # WRITABLE | USER, combined over the levels
    no_execute: bool
    path: Path  # but for the PDPTEs of PAE paging, which have no flags


class Regime:
    """What decides how a guest's linear addresses translate, prepared for many walks."""

    def __init__(
        self, cr0: int, cr3: int, cr4: int, efer: int, pdptes: tuple[int, ...] | None = None
    ) -> None:
        self.cr0, self.cr3, self.cr4, self.efer, self.pdptes = cr0, cr3, cr4, efer, pdptes
        self.format = form = paging_formats.choose(cr0, cr4, efer)
        self.is_pae = form is PAE_FORMAT
        self.wp, self.smep, self.smap = bool(cr0 & WP), bool(cr4 & SMEP), bool(cr4 & SMAP)
        if form is None:
            self.entry_bytes, self.address_mask, self.root = 8, FRAME, cr3 & FRAME
        else:
            self.entry_bytes, self.address_mask = form.entry_bytes, form.frame
            self.root = cr3 & form.root
        has_xd = self.entry_bytes == 8
        self.nx = bool(efer & NXE) and has_xd
        self.reserved_nx = NO_EXECUTE if has_xd and not self.nx else 0
        self.error_mask = E_WRITE | E_USER | (E_FETCH if self.nx or self.smep else 0)

    def walk(
        self, read: ReadEntry, gva: int, error: int, smap: bool = False, keys: Keys = NO_KEYS
    ) -> Found:
        """Where the access goes that `error` describes (E_WRITE, E_USER, E_FETCH); no effects.

        `smap`: a supervisor access that SMAP keeps from user pages.  Raises GuestFault.
        """
        form = self.format
        if form is None:
            return Found(gva & 0xFFFF_FFFF, 30, RIGHTS, False, ())
        code = error & self.error_mask
        table = self._directory(read, gva, code) if self.is_pae else self.root
        rows = form.rows if self.nx else form.rows_without_nx
        end, shift, rights, some, steps = descend(form, rows, read, table, gva)
        if end != PAGE:
            if end == RESERVED:
                code |= E_PRESENT | E_RESERVED
            raise GuestFault(gva, code)
        rights &= RIGHTS
        no_execute = bool(some & NO_EXECUTE)
        entry = steps[-1][1]
        if keys != NO_KEYS and key_refuses(entry, rights, error, keys, self.wp):
            code |= E_KEY
        if code & E_KEY or self._refuses(error, rights, no_execute, smap):
            raise GuestFault(gva, code | E_PRESENT)
        if shift == 12:
            gpa = entry & form.frame | gva & 0xFFF
        else:
            gpa = frame_of(entry, shift, form.entry_bytes) | gva & (1 << shift) - 1
        return Found(gpa, shift, rights, no_execute, tuple(steps))

    def _directory(self, read: ReadEntry, gva: int, code: int) -> int:
        """The page directory under PAE paging: by a register, if it is known what they hold."""
        index = gva >> 30 & 3
        entry = read(self.root + 8 * index, 8) if self.pdptes is None else self.pdptes[index]
        if not entry & PRESENT:
            raise GuestFault(gva, code)
        return entry & FRAME

    def maps(self, level: int, entry: int) -> bool:
        """Whether an entry of this level (2 and up; 1 is the last) maps a large page."""
        form = self.format
        return bool(entry & LARGE) and form is not None and form.levels[-level].may_map

    def is_reserved(self, level: int, entry: int, is_page: bool) -> bool:
        """Whether an entry of this level (1 is the last) sets a reserved bit."""
        assert self.format is not None
        row = self.format.levels[-level]
        reserved = row.reserved_page if is_page else row.reserved_table
        return bool(entry & (reserved | self.reserved_nx))

    def _refuses(self, error: int, rights: int, no_execute: bool, smap: bool) -> bool:
        user, write, fetch = error & E_USER, error & E_WRITE, error & E_FETCH
        if user and not rights & USER:
            return True
        if fetch:
            return no_execute or bool(not user and self.smep and rights & USER)
        if not user and smap and rights & USER:
            return True
        return bool(write and not rights & WRITABLE and (user or self.wp))

    def load_pdptes(self, read: ReadEntry) -> tuple[int, ...]:
        """What MOV to CR3 loads under PAE paging (SDM 3A, "PDPTE Registers").

        Raises GuestFault with #GP(0) if a present one sets reserved bits.
        """
        entries = tuple(read(self.root + 8 * n, 8) for n in range(4))
        if any(entry & PRESENT and entry & PDPTE_RESERVED for entry in entries):
            raise GuestFault(0, 0, Vector.GP)
        return entries


def key_refuses(entry: int, rights: int, error: int, keys: Keys, wp: bool) -> bool:
    """Whether the key of a page refuses the access (SDM 3A, "Protection Keys").

    Only the entries of 4-level and 5-level paging have keys; in others these bits are 0.
    """
    if error & E_FETCH:
        return False
    own = keys[0 if rights & USER else 1] >> 2 * ((entry & KEY) >> KEY_SHIFT)
    return bool(own & 1 or (own & 2 and error & E_WRITE and (error & E_USER or wp)))


def entries_of(memory: PhysicalMemory) -> ReadEntry:
    """How to read a guest's tables in this memory."""

    def read(at: int, size: int) -> int:
        if memory.hpa(at) is None:
            return 0
        return memory.read_u64(at) if size == 8 else memory.read_u32(at)

    return read


@dataclass(frozen=True)
class Translation:
    """What a guest's linear addresses mean now, at one privilege level.

    `ac`: RFLAGS.AC, with which a supervisor lifts SMAP.  `keys`: what protection keys leave.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    cpl: int = 0
    pdptes: tuple[int, ...] | None = None
    ac: bool = False
    keys: Keys = NO_KEYS

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
        return self.find(memory, gva, write=write, fetch=fetch, mark=mark).gpa

    def find(
        self, memory: PhysicalMemory, gva: int, *, write: bool = False, fetch: bool = False,
        mark: bool = True,
    ) -> Found:  # fmt: skip
        """The same, with what else the walk has found."""
        regime = self.regime
        if regime.format is not None and regime.format.linear_bits > 32:
            if not is_canonical(gva, regime.format.linear_bits):
                raise GuestFault(gva, 0, Vector.GP)
        else:
            gva &= 0xFFFF_FFFF
        error = write * E_WRITE | (self.cpl == 3) * E_USER | fetch * E_FETCH
        smap = regime.smap and self.cpl < 3 and not self.ac
        found = regime.walk(entries_of(memory), gva, error, smap, self.keys)
        if mark:
            put = memory.write_u64 if regime.entry_bytes == 8 else memory.write_u32
            for (at, entry), wanted in zip(found.path, marks(found.path, write), strict=True):
                if wanted & ~entry:
                    put(at, entry | wanted)
        return found

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
