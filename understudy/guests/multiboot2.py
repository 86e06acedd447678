"""Multiboot 2: the header and the information are lists of tags.

Source: "Multiboot2 Specification version 2.0", "OS image format", "I386" under "Machine state"
and "Boot information format".  Not taken: the EFI entry points (there is no EFI); an image that may
be moved stays where it is linked, and is told so.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from understudy.guests import boot_params
from understudy.guests.entry import (
    CODE_32,
    LOW_BLOCK_ROOM,
    Entry,
    GuestError,
    GuestMemory,
    protected_mode,
    write_gdt,
)
from understudy.guests.multiboot import (
    LOADER_NAME,
    Addresses,
    check_entry,
    lower_and_upper,
    put_by_addresses,
    put_elf,
    put_modules,
)
from understudy.guests.placement import Placement

HEADER_MAGIC = 0xE852_50D6
LOADER_MAGIC = 0x36D7_6289
SEARCHED = 32768  # the header lies in the first bytes of the file, on a boundary of eight
I386 = 0  # the header's architecture: 32-bit protected mode
OPTIONAL = 1  # a header tag's flag: the loader need not know it


class Wish(IntEnum):
    """The header's tags, by what the kernel wishes."""

    END = 0
    INFORMATION = 1
    ADDRESSES = 2
    ENTRY = 3
    CONSOLE = 4
    FRAME_BUFFER = 5
    ALIGNED_MODULES = 6
    BOOT_SERVICES = 7
    EFI_ENTRY_32 = 8
    EFI_ENTRY_64 = 9
    RELOCATABLE = 10


class Tag(IntEnum):
    """The information's tags."""

    END = 0
    COMMAND_LINE = 1
    LOADER_NAME = 2
    MODULE = 3
    MEMORY = 4
    MEMORY_MAP = 6
    RSDP_1 = 14
    RSDP_2 = 15
    LOAD_BASE = 21


# What can be done without: there is no screen, modules always begin a page, and with no EFI its
# entry points are not used.
DISREGARDED = frozenset(
    (
        Wish.CONSOLE,
        Wish.FRAME_BUFFER,
        Wish.ALIGNED_MODULES,
        Wish.BOOT_SERVICES,
        Wish.EFI_ENTRY_32,
        Wish.EFI_ENTRY_64,
    )
)
RSDP_BYTES = 20, 36  # by the tag of each version of the ACPI


class Header(NamedTuple):
    """A Multiboot 2 header and where in the file it was found."""

    offset: int
    architecture: int
    tags: bytes

    def wishes(self) -> Iterator[tuple[int, bool, bytes]]:
        """(type, may it be disregarded, content) of each tag."""
        at = 0
        while at + 8 <= len(self.tags):
            kind, flags, size = struct.unpack_from("<HHI", self.tags, at)
            if kind == Wish.END:
                return
            if size < 8 or at + size > len(self.tags):
                raise GuestError("the kernel's Multiboot 2 header is damaged")
            yield kind, bool(flags & OPTIONAL), self.tags[at + 8 : at + size]
            at += size + 7 & ~7


def find_header(data: bytes) -> Header | None:
    """The first place in the first 32 KiB with the magic and a right checksum."""
    for offset in range(0, min(len(data), SEARCHED) - 15, 8):
        fields = struct.unpack_from("<IIII", data, offset)
        magic, architecture, length, _ = fields
        if magic == HEADER_MAGIC and sum(fields) & 0xFFFFFFFF == 0:
            return Header(offset, architecture, data[offset + 16 : offset + length])
    return None


def load(
    memory: GuestMemory,
    data: bytes,
    *,
    modules: Sequence[tuple[bytes, str]],
    append: str,
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
) -> Entry:
    """Load the image by its addresses or as ELF, then the modules and the information."""
    head = find_header(data)
    if head is None:
        raise GuestError("the kernel has no Multiboot 2 header in its first 32 KiB")
    if head.architecture != I386:
        raise GuestError(
            f"the kernel's Multiboot 2 header is for architecture {head.architecture}, expected 0"
        )
    asked = _asked(head)
    place = Placement(memory)
    if Wish.ADDRESSES in asked:
        at = _unpack("<IIII", asked[Wish.ADDRESSES])
        put_by_addresses(place, data, head.offset, Addresses(*at))
        if Wish.ENTRY not in asked:
            raise GuestError("the kernel's Multiboot 2 header has addresses without an entry point")
        start = 0
    else:
        start = put_elf(place, data)
    if Wish.ENTRY in asked:
        (start,) = _unpack("<I", asked[Wish.ENTRY])
    check_entry(start)
    base = min(claim.start for claim in place.claims) if Wish.RELOCATABLE in asked else None
    place.tables()
    placed = put_modules(place, modules)
    rows = boot_params.memory_rows(memory, e820)
    tags = _tags(append, placed, rows, memory.read(rsdp, max(RSDP_BYTES)) if rsdp else b"", base)
    information = _write(place, tags)
    write_gdt(memory, CODE_32, place.moved)
    return protected_mode("multiboot2", start, moved=place.moved, rax=LOADER_MAGIC, rbx=information)


def _asked(head: Header) -> dict[int, bytes]:
    """The tags that are heeded; GuestError names the first that must be and cannot."""
    asked = {}
    for kind, is_optional, content in head.wishes():
        match kind:
            case Wish.ADDRESSES | Wish.ENTRY | Wish.RELOCATABLE:
                asked[kind] = content
            case Wish.INFORMATION:
                wanted = {n for (n,) in struct.iter_unpack("<I", content[: len(content) & ~3])}
                lacking = sorted(wanted - set(Tag))
                if lacking and not is_optional:
                    raise GuestError(
                        f"the kernel's Multiboot 2 header requires information {lacking[0]}, "
                        "which there is none of"
                    )
            case _ if not is_optional and kind not in DISREGARDED:
                raise GuestError(f"the kernel's Multiboot 2 header requires unknown tag {kind}")
    return asked


def _unpack(layout: str, content: bytes) -> tuple[int, ...]:
    if len(content) < struct.calcsize(layout):
        raise GuestError("the kernel's Multiboot 2 header is damaged")
    return struct.unpack_from(layout, content)


def _tags(
    append: str,
    modules: Sequence[tuple[int, int, str]],
    rows: Sequence[boot_params.E820],
    rsdp: bytes,
    base: int | None,
) -> Iterator[tuple[Tag, bytes]]:
    yield Tag.COMMAND_LINE, boot_params.encoded(append)
    yield Tag.LOADER_NAME, LOADER_NAME
    for gpa, length, text in modules:
        line = boot_params.encoded(text, "a module's command line")
        yield Tag.MODULE, struct.pack("<II", gpa, gpa + length) + line
    yield Tag.MEMORY, struct.pack("<II", *lower_and_upper(rows))
    entries = (struct.pack("<QQII", *row, 0) for row in rows)
    yield Tag.MEMORY_MAP, struct.pack("<II", 24, 0) + b"".join(entries)
    if rsdp:
        for tag, length in zip((Tag.RSDP_1, Tag.RSDP_2), RSDP_BYTES, strict=True):
            yield tag, rsdp[:length]
    if base is not None:
        yield Tag.LOAD_BASE, struct.pack("<I", base)
    yield Tag.END, b""


def _write(place: Placement, tags: Iterable[tuple[Tag, bytes]]) -> int:
    block = b""
    for tag, content in tags:
        block += struct.pack("<II", tag, 8 + len(content)) + content
        block += bytes(-len(block) % 8)
    block = struct.pack("<II", 8 + len(block), 0) + block
    if len(block) > LOW_BLOCK_ROOM:
        raise GuestError("the command line, the modules and their command lines are too long")
    place.put("the Multiboot information", place.low_block, block)
    return place.low_block
