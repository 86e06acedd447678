"""The entries of paging structures, bit by bit, and what each bit says in the manual's words.

Source: SDM 3A, "32-Bit Paging", "PAE Paging", "4-Level Paging and 5-Level Paging"; SDM 3C, "EPT
Translation Mechanism".

What the processor ignores is a field here, too (AVL, IGNORED), so that what no field names is
reserved (but for what `paging_formats` adds level by level).
"""

from typing import Final

from understudy.arch.address import TOP
from understudy.arch.bits import Bit, Bits, Field


class PTE32(Bits, width=32):
    """Page-table entry that maps a 4-KByte page, 32-bit paging."""

    ADDR = Field(31, 12)  # physical address of the page, >> 12
    AVL = Field(11, 9)  # ignored: software may use it
    G = Bit(8)  # global, if CR4.PGE
    PAT = Bit(7)
    D = Bit(6)  # dirty: software has written to the page
    A = Bit(5)  # accessed: the entry has been used
    PCD = Bit(4)  # page-level cache disable
    PWT = Bit(3)  # page-level write-through
    US = Bit(2)  # user/supervisor
    RW = Bit(1)  # read/write
    P = Bit(0)  # present


class PDE32(Bits, width=32):
    """Page-directory entry that references a page table, 32-bit paging."""

    ADDR = Field(31, 12)
    AVL = Field(11, 8)
    PS = Bit(7)  # page size: ignored without CR4.PSE
    IGNORED = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class PDE4M(Bits, width=32):
    """Page-directory entry that maps a 4-MByte page, 32-bit paging with CR4.PSE."""

    ADDR = Field(31, 22)  # bits 31:22 of the page's address
    ADDR_HIGH = Field(20, 13)  # bits 39:32 of it
    PAT = Bit(12)
    AVL = Field(11, 9)
    G = Bit(8)
    PS = Bit(7)  # page size: 1
    D = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class PdpteRegister(Bits, width=64):
    """Page-directory-pointer-table entry of PAE paging: a register that loads of CR3 fill."""

    ADDR = Field(TOP, 12)
    AVL = Field(11, 9)
    PCD = Bit(4)
    PWT = Bit(3)
    P = Bit(0)


class Table(Bits, width=64):
    """An entry that references a table, PAE and 4-level paging."""

    XD = Bit(63)  # execute-disable, if IA32_EFER.NXE
    IGNORED = Field(62, 52)
    ADDR = Field(TOP, 12)
    AVL = Field(11, 8)
    PS = Bit(7)
    UNUSED = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class PTE(Bits, width=64):
    """Page-table entry that maps a 4-KByte page, PAE and 4-level paging."""

    XD = Bit(63)
    KEY = Field(62, 59)  # protection key, 4-level paging
    IGNORED = Field(58, 52)
    ADDR = Field(TOP, 12)
    AVL = Field(11, 9)
    G = Bit(8)
    PAT = Bit(7)
    D = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class PDE2M(Bits, width=64):
    """Page-directory entry that maps a 2-MByte page, PAE and 4-level paging."""

    XD = Bit(63)
    KEY = Field(62, 59)
    IGNORED = Field(58, 52)
    ADDR = Field(TOP, 21)
    PAT = Bit(12)
    AVL = Field(11, 9)
    G = Bit(8)
    PS = Bit(7)
    D = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class PDPTE1G(Bits, width=64):
    """Page-directory-pointer-table entry that maps a 1-GByte page, 4-level paging."""

    XD = Bit(63)
    KEY = Field(62, 59)
    IGNORED = Field(58, 52)
    ADDR = Field(TOP, 30)
    PAT = Bit(12)
    AVL = Field(11, 9)
    G = Bit(8)
    PS = Bit(7)
    D = Bit(6)
    A = Bit(5)
    PCD = Bit(4)
    PWT = Bit(3)
    US = Bit(2)
    RW = Bit(1)
    P = Bit(0)


class EptTable(Bits, width=64):
    """An EPT entry that references a table."""

    IGNORED = Field(63, 52)
    ADDR = Field(TOP, 12)
    AVL = Field(11, 9)
    A = Bit(8)  # if enabled in the EPT pointer
    PS = Bit(7)
    X = Bit(2)  # execute access
    W = Bit(1)  # write access
    R = Bit(0)  # read access


class EptPage(Bits, width=64):
    """An EPT entry that maps a page.  Of a large page's, low bits of ADDR are reserved."""

    IGNORED = Field(63, 52)
    ADDR = Field(TOP, 12)
    AVL = Field(11, 10)
    D = Bit(9)
    A = Bit(8)
    PS = Bit(7)
    IPAT = Bit(6)  # ignore PAT memory type
    MEMTYPE = Field(5, 3)
    X = Bit(2)
    W = Bit(1)
    R = Bit(0)


WORDS: Final[dict[str, tuple[str, str]]] = {  # a clear bit, a set one
    "US": ("supervisor", "user"),
    "RW": ("read-only", "read/write"),
    "XD": ("", "execute-disable"),
    "A": ("", "accessed"),
    "D": ("", "dirty"),
    "G": ("", "global"),
    "PAT": ("", "PAT"),
    "PCD": ("", "page-level cache disable"),
    "PWT": ("", "page-level write-through"),
    "R": ("no read access", "read access"),
    "W": ("no write access", "write access"),
    "X": ("no execute access", "execute access"),
    "IPAT": ("", "ignore PAT"),
}
ORDER: Final = ("R", "W", "X", *(name for name in WORDS if name not in {"R", "W", "X"}))
MEMORY_TYPES: Final = {0: "uncacheable", 1: "write-combining", 4: "write-through",
                       5: "write-protected", 6: "write-back"}  # fmt: skip


def words(entry: Bits) -> list[str]:
    """What the entry's bits say, but for its address; a set bit that no field names is reserved."""
    values = {field.name: (int(entry) & field.mask) >> field.low for field in entry.FIELDS}
    said = [WORDS[name][values[name]] for name in ORDER if name in values]
    if "MEMTYPE" in values:
        kind = values["MEMTYPE"]
        said.append(MEMORY_TYPES.get(kind, f"reserved memory type {kind}"))
    if values.get("KEY"):
        said.append(f"protection key {values['KEY']}")
    rest = int(entry) & ~sum(field.mask for field in entry.FIELDS)
    if rest:
        said.append(f"reserved bits {rest:#x} set")
    return [word for word in said if word]


def address(entry: Bits) -> int:
    """The physical address in the entry: of the page, or of the next table."""
    fields = {field.name: field for field in entry.FIELDS}
    high = fields.get("ADDR_HIGH")
    above = 0 if high is None else ((int(entry) & high.mask) >> high.low) << 32
    return above | int(entry) & fields["ADDR"].mask
