"""Walks a guest's own page tables, for instructions that the hypervisor carries out itself.

Source: SDM 3A, "Paging".  The formats are data: IA-32, PAE and Intel 64.

Invariants: a walk raises the fault that the processor would raise, with its error code, and
nothing else for whatever a guest's tables contain; a table outside RAM reads as not present.
"""

from dataclasses import dataclass
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

PG: Final = CR0.PG.mask
WP: Final = CR0.WP.mask
PAE: Final = CR4.PAE.mask
PSE: Final = CR4.PSE.mask
LMA: Final = EFER.LMA.mask
NXE: Final = EFER.NXE.mask


class GuestFault(Exception):
    """The access is not allowed: this exception, with this error code; gva goes to CR2."""

    def __init__(self, gva: int, error: int, vector: Vector = Vector.PF) -> None:
        super().__init__(f"#{vector.name} at {gva:#x}, error code {error:#x}")
        self.gva, self.error, self.vector = gva, error, vector


class PhysicalMemory(Protocol):
    """Guest-physical memory as a walk needs it."""

    def hpa(self, gpa: int) -> int | None: ...
    def read_u32(self, gpa: int) -> int: ...
    def read_u64(self, gpa: int) -> int: ...
    def write_u32(self, gpa: int, value: int) -> None: ...
    def write_u64(self, gpa: int, value: int) -> None: ...
    def read(self, gpa: int, length: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...


class Format(NamedTuple):
    """A paging mode: bytes of an entry, and (shift, index bits, may map a page) from the root."""

    name: str
    entry_bytes: int
    levels: tuple[tuple[int, int, bool], ...]


IA32 = Format("IA-32", 4, ((22, 10, False), (12, 10, True)))
IA32_PSE = Format("IA-32 with PSE", 4, ((22, 10, True), (12, 10, True)))
PAE_FORMAT = Format("PAE", 8, ((30, 2, False), (21, 9, True), (12, 9, True)))
INTEL64 = Format("Intel 64", 8, ((39, 9, False), (30, 9, True), (21, 9, True), (12, 9, True)))


@dataclass(frozen=True)
class Translation:
    """What a guest's linear addresses mean now: the registers that decide it."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    cpl: int = 0

    @property
    def format(self) -> Format | None:
        """None while paging is off."""
        if not self.cr0 & PG:
            return None
        if self.efer & LMA:
            return INTEL64
        if self.cr4 & PAE:
            return PAE_FORMAT
        return IA32_PSE if self.cr4 & PSE else IA32

    def gpa(
        self, memory: PhysicalMemory, gva: int, *, write: bool = False, fetch: bool = False,
        mark: bool = True,
    ) -> int:  # fmt: skip
        """The address behind `gva`; GuestFault if the access is refused.

        With `mark`, accessed and dirty flags are set as the processor would.
        """
        form = self.format
        if form is None:
            return gva & 0xFFFF_FFFF
        if form is not INTEL64:
            gva &= 0xFFFF_FFFF
        elif (gva + (1 << 47)) >> 48 & 0xFFFF:  # not canonical
            raise GuestFault(gva, 0, Vector.GP)
        nx = bool(self.efer & NXE) and form.entry_bytes == 8
        error = write << 1 | (self.cpl == 3) << 2 | (fetch and nx) << 4
        table = self.cr3 & (0xF_FFFF_FFFF_F000 if form is not PAE_FORMAT else 0xFFFF_FFE0)
        rights = WRITABLE | USER
        path: list[tuple[int, int]] = []
        for shift, bits, may_map in form.levels:
            at = table + (gva >> shift & (1 << bits) - 1) * form.entry_bytes
            entry = self._entry(memory, at, form.entry_bytes)
            if not entry & PRESENT:
                raise GuestFault(gva, error)
            path.append((at, entry))
            if not (form is PAE_FORMAT and shift == 30):  # PDPTEs carry no rights
                rights &= entry
                if entry & NO_EXECUTE and nx and fetch:
                    raise GuestFault(gva, error | 1)
            if shift == 12 or (may_map and entry & LARGE):
                self._check(gva, rights, write, error)
                if mark:
                    self._mark(memory, path, form, write)
                return self._frame(entry, shift, form) | gva & (1 << shift) - 1
            table = entry & 0xF_FFFF_FFFF_F000
        raise AssertionError("the last level maps a page")

    def _check(self, gva: int, rights: int, write: bool, error: int) -> None:
        is_user = self.cpl == 3
        if is_user and not rights & USER:
            raise GuestFault(gva, error | 1)
        if write and not rights & WRITABLE and (is_user or self.cr0 & WP):
            raise GuestFault(gva, error | 1)

    @staticmethod
    def _entry(memory: PhysicalMemory, at: int, size: int) -> int:
        if memory.hpa(at) is None:
            return 0
        return memory.read_u64(at) if size == 8 else memory.read_u32(at)

    @staticmethod
    def _frame(entry: int, shift: int, form: Format) -> int:
        if form.entry_bytes == 4 and shift == 22:  # PSE-36: bits 20:13 are address bits 39:32
            return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
        return entry & 0xF_FFFF_FFFF_F000 & ~((1 << shift) - 1)

    @staticmethod
    def _mark(
        memory: PhysicalMemory, path: list[tuple[int, int]], form: Format, write: bool
    ) -> None:
        put = memory.write_u64 if form.entry_bytes == 8 else memory.write_u32
        for depth, (at, entry) in enumerate(path):
            if form is PAE_FORMAT and depth == 0:
                continue
            wanted = entry | ACCESSED
            if write and depth == len(path) - 1:
                wanted |= DIRTY
            if wanted != entry:
                put(at, wanted)

    def read(self, memory: PhysicalMemory, gva: int, length: int, *, fetch: bool = False) -> bytes:
        """Bytes at a linear address.  IndexError if they are not RAM."""
        out = b""
        while length:
            part = min(length, 0x1000 - (gva & 0xFFF))
            out += memory.read(self.gpa(memory, gva, fetch=fetch), part)
            gva, length = gva + part, length - part
        return out
