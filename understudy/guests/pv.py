"""Start a paravirtual kernel: with page tables that map all it has, and a page of information.

A kernel of the kind has an ELF note that says so.  It is entered at its own addresses, in the mode
in which it was built; its page tables name guest frames here, and the hypervisor, when it takes
them over, makes host frames of them.

Source: ours; what Xen's domain builder leaves is the model (P. Barham et al., SOSP 2003).
Invariant: the frames of the page tables are mapped to be read only.
"""

import struct
from typing import Final

from understudy.arch.address import PAGE, is_canonical
from understudy.guests import elf
from understudy.guests.entry import (
    CODE_32,
    CODE_64,
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    DATA_32,
    EFER_LMA,
    EFER_LME,
    UNUSABLE,
    Entry,
    GuestError,
    GuestMemory,
)
from understudy.guests.placement import Placement

NOTE_NAME: Final = b"understudy"
NOTE_KIND: Final = 1
VERSION: Final = 1
MAPPED: Final = 32 << 20  # bytes, of what memory there is
SPAN: Final = 512 * PAGE  # what a table of the last level maps
CR0_MP, CR0_WP, CR4_OSFXSR, EFER_NXE = 1 << 1, 1 << 16, 1 << 9, 1 << 11
P, RW, US = 1, 2, 4
MOST_APPENDED: Final = 2048
FLAT: Final = 0xFFFF_FFFF
USER_DATA: Final = DATA_32 | 3 << 5


def is_paravirtual(image: elf.Image) -> bool:
    """Whether a kernel has the note.  GuestError: for an interface that is not this one."""
    for name, kind, value in image.notes():
        if name == NOTE_NAME and kind == NOTE_KIND:
            version = int.from_bytes(value, "little")
            if version != VERSION:
                raise GuestError(f"the kernel is for interface {version}, and here is {VERSION}")
            return True
    return False


def load(memory: GuestMemory, image: elf.Image, *, append: str) -> Entry:
    """Load the kernel, its first page tables, and what it is told."""
    base = _base(image)
    line = append.encode("utf-8") + b"\0"
    if len(line) > MOST_APPENDED:
        raise GuestError(f"the command line is longer than {MOST_APPENDED - 1} bytes")
    place = Placement(memory)
    elf.load(image, place)
    end = min(memory.size, MAPPED) & -PAGE
    info_at = max(s.paddr + s.memory_size for s in image.loads) + PAGE - 1 & -PAGE
    shared_at, root_at = info_at + PAGE, info_at + 2 * PAGE
    upper = 3 if image.is_64 else 2  # tables above those of the last level
    direct_at = root_at + upper * PAGE
    first_free = direct_at + -(-end // SPAN) * PAGE
    raw = _tables(image.is_64, base, end, root_at, direct_at, first_free)
    place.put("the first page tables", root_at, raw)
    info = struct.pack("<5Q", end, first_free, root_at, direct_at, shared_at) + line
    place.put("what the kernel is told", info_at, info, 2 * PAGE)
    return Entry(_registers(image, base, info_at, root_at), "pv")


def _base(image: elf.Image) -> int:
    """Where the kernel has gpa 0."""
    for s in image.loads:
        if s.vaddr <= image.entry < s.vaddr + s.memory_size:
            base = s.vaddr - s.paddr
            if base > 0 and base % (SPAN if image.is_64 else 1 << 30) == 0 and _fits(image, base):
                return base
    raise GuestError("the kernel's entry point lies in no segment at its own addresses")


def _fits(image: elf.Image, base: int) -> bool:
    """Whether the processor has addresses for all of its memory from there on."""
    last = base + MAPPED - 1
    return is_canonical(base) and is_canonical(last) if image.is_64 else last < 1 << 32


def _tables(
    is_64: bool, base: int, end: int, root_at: int, direct_at: int, tables_end: int
) -> bytes:
    """The page tables: [0, end) of memory at `base`, the tables themselves to be read only."""
    slots = [base >> 39 & 511, base >> 30 & 511] if is_64 else [base >> 30 & 3]
    first = base >> 21 & 511
    count = -(-end // SPAN)
    if first + count > 512:
        raise GuestError(f"the kernel's addresses from {base:#x} on are too few for its memory")
    upper = []
    for n, slot in enumerate(slots):
        flags = P if not is_64 else P | RW | US
        upper.append({slot: root_at + (n + 1) * PAGE | flags})
    upper.append({first + n: direct_at + n * PAGE | P | RW | US for n in range(count)})
    last = [
        gpa | P | (0 if root_at <= gpa < tables_end else RW) if gpa < end else 0
        for gpa in range(0, count * SPAN, PAGE)
    ]
    raw = b"".join(struct.pack("<512Q", *(table.get(n, 0) for n in range(512))) for table in upper)
    return raw + struct.pack(f"<{len(last)}Q", *last)


def _registers(image: elf.Image, base: int, info_at: int, root_at: int) -> dict[str, int]:
    is_64 = image.is_64
    state = {
        "cr0": CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG, "cr3": root_at,
        "cr4": CR4_PAE | CR4_OSFXSR, "efer": EFER_NXE | (EFER_LME | EFER_LMA if is_64 else 0),
        "rip": image.entry, "rsi": info_at + base, "rflags": 2,
    }  # fmt: skip
    segments = {
        "cs": (0x08, FLAT, CODE_64 if is_64 else CODE_32), "ss": (0x10, FLAT, DATA_32),
        "ds": (0x23, FLAT, USER_DATA), "es": (0x23, FLAT, USER_DATA), "fs": (0, 0, UNUSABLE),
        "gs": (0, 0, UNUSABLE), "tr": (0x30, 0x67, 0x8B), "ldtr": (0, 0, UNUSABLE),
    }  # fmt: skip
    for name, (selector, limit, rights) in segments.items():
        state |= {name: selector, f"{name}_base": 0, f"{name}_limit": limit, f"{name}_attr": rights}
    return state
