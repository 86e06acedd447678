"""Guests of a few instructions, with page tables built by hand in any of the three formats.

Source: SDM 3A, "Paging".  A program is a listing: bytes in hex and what they say; a test
disassembles every one.  The listings use 32-bit operands and addresses below 4 GBytes, so one
listing means the same in 64-bit and in 32-bit code.

Layout: the program at 1 MByte, page tables from 2 MBytes on, frames for data above them; all
of the first 4 MBytes is mapped to itself.

Invariant: whoever starts a program knows every table entry, so the references of a walk and the
traps of an edit can be foretold.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from understudy.arch import paging_formats
from understudy.arch.cr import CR4
from understudy.arch.paging_formats import ACCESSED, DIRTY, LARGE, PRESENT, WRITABLE, Format
from understudy.guests.entry import (
    CODE_32,
    CODE_64,
    Entry,
    GuestMemory,
    long_mode,
    protected_mode,
    write_gdt,
)
from understudy.verdict import StopKind

if TYPE_CHECKING:
    from understudy.vm import VM

CODE: Final = 0x10_0000
TABLES: Final = 0x20_0000
TABLES_END: Final = 0x40_0000
P_RW: Final = PRESENT | WRITABLE
ACCESSED_DIRTY: Final = ACCESSED | DIRTY
FORMATS: Final = ("ia32", "pae", "intel64")
FIVE: Final = "intel64-5"
"""Intel 64 with five levels: no processor here runs it, but the walker knows it."""

CR0_PAGED: Final = 0x8000_0031  # PG, NE, ET, PE

Listing = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """A format, and what CR4 chooses it."""

    form: Format
    cr4: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return self.form.entry_bytes

    @property
    def pages(self) -> tuple[int, ...]:
        """Sizes that entries can map, as shifts."""
        return self.form.pages

    @property
    def memory_levels(self) -> int:
        """Levels that a walk reads in memory for a 4-KByte page."""
        return len(self.form.rows)


LAYOUTS: Final = {
    "ia32": Layout(paging_formats.IA32_PSE, CR4.PSE.mask),
    "pae": Layout(paging_formats.PAE, CR4.PAE.mask),
    "intel64": Layout(paging_formats.LEVEL4, CR4.PAE.mask),
    FIVE: Layout(paging_formats.LEVEL5, CR4.PAE.mask | CR4.LA57.mask),
}


class Tables:
    """Page tables of one format in a guest's memory, one address space each."""

    def __init__(self, memory: GuestMemory, format: str, first: int = TABLES) -> None:
        self.memory, self.format, self.layout = memory, format, LAYOUTS[format]
        self.next = first
        self.root = self._frame()
        self.of_level: dict[tuple[int, int], int] = {}  # (depth, gva >> shift): the table below
        for at in range(0, TABLES_END, 1 << 12):
            self.map(at, at)

    def _frame(self) -> int:
        frame, self.next = self.next, self.next + 0x1000
        if frame >= TABLES_END:
            raise ValueError(f"page tables: no room below {TABLES_END:#x}")
        self.memory.write(frame, bytes(0x1000))
        return frame

    def entry(self, gva: int, shift: int = 12) -> int:
        """The gpa of the entry that maps (or will map) a page of this size at `gva`."""
        table, layout = self.root, self.layout
        for depth, level in enumerate(layout.form.levels):
            low = level.shift
            at = table + (gva >> low & (1 << level.bits) - 1) * layout.entry_bytes
            if low == shift:
                return at
            if (depth, gva >> low) not in self.of_level:
                below = self._frame()
                self.of_level[depth, gva >> low] = below
                is_register = depth < layout.form.registers  # under PAE paging: it has no flags
                self.write(at, below | (PRESENT if is_register else P_RW | ACCESSED))
            table = self.of_level[depth, gva >> low]
        raise ValueError(f"{self.format} has no pages of 2^{shift} bytes")

    def write(self, at: int, value: int) -> None:
        """Put an entry at a gpa."""
        self.memory.write(at, value.to_bytes(self.layout.entry_bytes, "little"))

    def map(self, gva: int, gpa: int, shift: int = 12) -> None:
        """Map a page, writable; accessed and dirty already, so that a walk writes nothing."""
        large = LARGE if shift > 12 else 0
        self.write(self.entry(gva, shift), gpa | P_RW | ACCESSED_DIRTY | large)


def assemble(listing: Listing) -> bytes:
    """The bytes of a listing."""
    return bytes.fromhex("".join(row for row, _ in listing))


TURN_ON: Final[Listing] = (
    ("0f 22 e6", "mov cr4,esi"),
    ("0f 22 df", "mov cr3,edi"),
    ("0f 22 c5", "mov cr0,ebp"),
)
"""How 32-bit code turns paging on: CR4 is in ESI, CR3 in EDI, CR0 in EBP."""


def entry(memory: GuestMemory, tables: Tables, program: Listing, **registers: int) -> Entry:
    """Load a program; returns how it begins.  In 32-bit code it first runs `TURN_ON`."""
    if tables.format == "intel64":
        write_gdt(memory, CODE_64)
        memory.write(CODE, assemble(program))
        start = long_mode(memory, "bare", CODE, **registers)
        return Entry(start.registers | {"cr3": tables.root}, "bare")
    write_gdt(memory, CODE_32)
    memory.write(CODE, assemble(TURN_ON + program))
    paging = {"esi": tables.layout.cr4, "edi": tables.root, "ebp": CR0_PAGED}
    wide = {f"r{name[1:]}": value for name, value in paging.items()}
    return protected_mode("bare", CODE, **(registers | wide))


STEPS: Final = 1000
LONGEST: Final = 10_000_000  # instructions between two marks


def step_to(vm: "VM", address: int) -> None:
    """Run, instruction by instruction, until the one at `address` is next."""
    for _ in range(STEPS):
        stop = vm.go(budget=1)
        if stop.kind != StopKind.BUDGET:
            raise RuntimeError(f"the guest ended: {stop.kind} {stop.detail}")
        if vm.processors[0].registers()["rip"] == address:
            return
    raise RuntimeError(f"the guest did not come to {address:#x} within {STEPS} instructions")


def mark(vm: "VM") -> int:
    """Run to the next OUT to the debug-exit port; what was written there."""
    stop = vm.go(budget=LONGEST)
    if stop.kind != StopKind.DEBUG_EXIT:
        raise RuntimeError(f"the guest ended: {stop.kind} {stop.detail}")
    return stop.status
