"""How a guest begins: the state of its first processor, and the memory that loaders write to.

Source: SDM 3A, "Protected-Mode Memory Management" (descriptors, flat model) and SDM 3C,
"Guest Register State" (the format of access rights, which `_attr` uses).
Invariant: an `Entry` names every register that a boot protocol speaks of; what it leaves out
is as after reset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Access rights as the VMCS has them: type, S, DPL, P in bits 7:0; L 13, D/B 14, G 15; unusable 16.
CODE_64 = 0xA09B
CODE_32 = 0xC09B
DATA_32 = 0xC093
TSS_BUSY = 0x008B
UNUSABLE = 0x1_0000

BOOT_CS = 0x10  # the selectors that the Linux boot protocol asks for
BOOT_DS = 0x18
BOOT_TR = 0x20

# Where loaders put what is not the kernel; all of it is moved up together, by `Placement.tables`,
# if the kernel lies there.
GDT_GPA = 0x1000
PAGE_TABLES_GPA = 0x2000  # PML4, one PDPT and four page directories: 6 pages
LOW_BLOCK_GPA = 0x8000  # the zero page, or the information structures of the other protocols
LOW_BLOCK_END = 0x1_0000
COMMAND_LINE_GPA = 0x2_0000
LOW_BLOCK_ROOM = COMMAND_LINE_GPA - LOW_BLOCK_GPA  # bytes that the block may have
STACK_TOP_GPA = 0x2_0000  # grows down from the command line
TABLES_END = 0x3_0000


class GuestError(ValueError):
    """A guest cannot be obtained, loaded or started.  The text is one line for the user."""


class GuestMemory(Protocol):
    """What a loader needs of a VM's memory: guest-physical reads, writes, and where RAM is."""

    @property
    def size(self) -> int:
        """Bytes of RAM."""

    def read(self, gpa: int, length: int, /) -> bytes: ...

    def write(self, gpa: int, data: bytes, /) -> None: ...

    def ranges(self) -> Sequence[tuple[int, int]]:
        """RAM that a guest may use, as (guest-physical address, bytes)."""


@dataclass(frozen=True)
class Entry:
    """The initial state of the boot processor.

    `registers` uses the names of `Processor.registers()`; `protocol` tells people how the guest
    was entered ("linux-64", "linux-32", "pvh", "multiboot").
    """

    registers: dict[str, int]
    protocol: str


def protected_mode(protocol: str, rip: int, *, moved: int = 0, **registers: int) -> Entry:
    """32-bit protected mode, flat segments, paging off, interrupts off.

    moved: how far up the tables and the stack are.
    """
    state = {"cr0": CR0_PE | CR0_ET, "cr3": 0, "cr4": 0, "efer": 0}
    return Entry(_flat(CODE_32, moved) | state | {"rip": rip} | registers, protocol)


def long_mode(
    memory: GuestMemory, protocol: str, rip: int, *, moved: int = 0, **registers: int
) -> Entry:
    """64-bit mode on an identity map of the first 4 GiB, flat segments, interrupts off."""
    write_identity_map(memory, moved)
    state = {
        "cr0": CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        "cr3": PAGE_TABLES_GPA + moved,
        "cr4": CR4_PAE,
        "efer": EFER_LME | EFER_LMA,
    }
    return Entry(_flat(CODE_64, moved) | state | {"rip": rip} | registers, protocol)


def write_gdt(memory: GuestMemory, code_attr: int, moved: int = 0) -> None:
    """The table that the selectors of `_flat` point into: two empty, code, data, TSS."""
    entries = [0, 0, _descriptor(code_attr), _descriptor(DATA_32), _descriptor(TSS_BUSY, 0x67), 0]
    memory.write(GDT_GPA + moved, b"".join(e.to_bytes(8, "little") for e in entries))


def write_identity_map(memory: GuestMemory, moved: int = 0) -> None:
    """Page tables that map the first 4 GiB to themselves with 2-MByte pages."""
    present_rw, page_size = 0b11, 1 << 7
    pml4 = PAGE_TABLES_GPA + moved
    pdpt, first_directory = pml4 + 0x1000, pml4 + 0x2000
    pml4_entries = [pdpt | present_rw]
    pdpt_entries = [(first_directory + 0x1000 * i) | present_rw for i in range(4)]
    pages = [(i << 21) | page_size | present_rw for i in range(4 * 512)]
    for gpa, table, size in (
        (pml4, pml4_entries, 0x1000),
        (pdpt, pdpt_entries, 0x1000),
        (first_directory, pages, 0x4000),
    ):
        raw = b"".join(e.to_bytes(8, "little") for e in table)
        memory.write(gpa, raw.ljust(size, b"\0"))


def _descriptor(attr: int, limit: int = 0xFFFFF) -> int:
    """A segment descriptor with base 0 (SDM 3A, "Segment Descriptors")."""
    return (limit & 0xFFFF) | (attr & 0xFF) << 40 | (limit >> 16) << 48 | (attr >> 12 & 0xF) << 52


def _flat(code_attr: int, moved: int) -> dict[str, int]:
    state = {"rflags": 0x2, "rsp": STACK_TOP_GPA + moved}
    state |= {"gdtr_base": GDT_GPA + moved, "gdtr_limit": 0x2F}
    state |= {"idtr_base": 0, "idtr_limit": 0}
    segments = {"cs": (BOOT_CS, 0xFFFFFFFF, code_attr)}
    segments |= dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (BOOT_DS, 0xFFFFFFFF, DATA_32))
    segments["tr"] = (BOOT_TR, 0x67, TSS_BUSY)
    segments["ldtr"] = (0, 0, UNUSABLE)
    for name, (selector, limit, attr) in segments.items():
        state |= {name: selector, f"{name}_base": 0, f"{name}_limit": limit, f"{name}_attr": attr}
    return state
