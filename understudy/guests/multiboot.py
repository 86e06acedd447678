"""Multiboot 1: how GNU Mach, Xen and teaching kernels are started.

Source: "The Multiboot Specification version 0.6.96", "OS image format", "Machine state" and
"Boot information format".
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from understudy.guests import boot_params, elf
from understudy.guests.entry import (
    CODE_32,
    LOW_BLOCK_ROOM,
    Entry,
    GuestError,
    GuestMemory,
    protected_mode,
    write_gdt,
)
from understudy.guests.placement import Placement

HEADER_MAGIC = 0x1BAD_B002
LOADER_MAGIC = 0x2BAD_B002
SEARCHED = 8192  # the header lies in the first bytes of the file, on a boundary of four

# Flags of the header: bits 0-15 must be understood, 16 says that the addresses are there.
PAGE_ALIGN, MEMORY_INFO, VIDEO_MODE, ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
UNDERSTOOD = PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE

# Flags of the information structure.
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES = 1 << 0, 1 << 2, 1 << 3
INFO_MEMORY_MAP, INFO_LOADER_NAME = 1 << 6, 1 << 9

INFO_BYTES = 120
LOADER_NAME = b"understudy\0"
HIGHEST = 1 << 32


class Addresses(NamedTuple):
    """Where a file says that it goes, if it is not ELF: "address fields"."""

    header: int
    load: int
    load_end: int
    bss_end: int


class Header(NamedTuple):
    """A Multiboot header and where in the file it was found."""

    offset: int
    flags: int
    addresses: Addresses | None
    entry_addr: int


def find_header(data: bytes) -> Header | None:
    """The first place in the first 8 KiB with the magic and a right checksum."""
    for offset in range(0, min(len(data), SEARCHED) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            if not flags & ADDRESSES:
                return Header(offset, flags, None, 0)
            if len(data) < offset + 32:
                return None
            *addresses, entry = struct.unpack_from("<IIIII", data, offset + 12)
            return Header(offset, flags, Addresses(*addresses), entry)
    return None


def load(
    memory: GuestMemory,
    data: bytes,
    *,
    modules: Sequence[tuple[bytes, str]],
    append: str,
    e820: Iterable[tuple[int, int, int]] | None,
) -> Entry:
    """Load the image by its addresses or as ELF, then the modules and the information."""
    head = find_header(data)
    if head is None:
        raise GuestError("the kernel has no Multiboot header in its first 8 KiB")
    unknown = head.flags & 0xFFFF & ~UNDERSTOOD
    if unknown:
        raise GuestError(f"the kernel's Multiboot header requires unknown flags {unknown:#x}")
    place = Placement(memory)
    if head.addresses is None:
        start = put_elf(place, data)
    else:
        start = head.entry_addr
        put_by_addresses(place, data, head.offset, head.addresses)
    check_entry(start)
    place.tables()
    line = boot_params.write_command_line(place, append)
    information = _write_information(place, line, put_modules(place, modules), e820)
    write_gdt(memory, CODE_32, place.moved)
    return protected_mode("multiboot", start, moved=place.moved, rax=LOADER_MAGIC, rbx=information)


# --- what both versions do ---


def put_elf(place: Placement, data: bytes) -> int:
    """Load the kernel as the ELF file that it is; returns its entry point."""
    image = elf.parse(data)
    elf.load(image, place)
    return image.physical_entry


def put_by_addresses(place: Placement, data: bytes, offset: int, at: Addresses) -> None:
    """The header at `offset` says where the file goes ("address fields"), whatever its format."""
    first = offset - (at.header - at.load)
    if first < 0 or at.header < at.load:
        raise GuestError("the Multiboot header's load address lies before the file's start")
    end = at.load_end or at.load + len(data) - first
    length = end - at.load
    if length < 0 or first + length > len(data):
        raise GuestError(
            f"the kernel is truncated: its Multiboot header loads {length} bytes, "
            f"the file has {len(data) - first}"
        )
    whole = max(length, at.bss_end - at.load)
    place.put("the kernel", at.load, data[first : first + length], whole)


def check_entry(start: int) -> None:
    """GuestError if 32-bit code cannot begin there."""
    if start >= HIGHEST:
        raise GuestError(f"the kernel's entry point {start:#x} is not below 4 GiB")


def put_modules(
    place: Placement, modules: Sequence[tuple[bytes, str]]
) -> list[tuple[int, int, str]]:
    """Place the modules; returns (address, bytes, command line) of each."""
    return [
        (*boot_params.put_initrd(place, content, boot_params.LOWEST_INITRD_CEILING), text)
        for content, text in modules
    ]


def lower_and_upper(rows: Sequence[boot_params.E820]) -> tuple[int, int]:
    """KiB of memory from 0, and from 1 MiB on, up to the first hole."""
    ram = {row.base: row.length for row in rows if row.kind == boot_params.E820_RAM}
    return ram.get(0, 0) // 1024, min(ram.get(0x10_0000, 0) // 1024, 0xFFFFFFFF)


# --- version 1 ---


def _write_information(
    place: Placement,
    line: int,
    modules: Sequence[tuple[int, int, str]],
    e820: Iterable[tuple[int, int, int]] | None,
) -> int:
    at = place.low_block
    rows = boot_params.memory_rows(place.memory, e820)
    module_list = at + INFO_BYTES
    map_list = module_list + 16 * len(modules)
    name = map_list + 24 * len(rows)
    texts_at = name + len(LOADER_NAME)
    entries, texts = b"", b""
    for gpa, length, text in modules:
        entries += struct.pack("<IIII", gpa, gpa + length, texts_at + len(texts), 0)
        texts += boot_params.encoded(text, "a module's command line")
    for row in rows:
        entries += struct.pack("<IQQI", 20, *row)
    info = bytearray(INFO_BYTES)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | INFO_LOADER_NAME
    if modules:
        flags |= INFO_MODULES
    struct.pack_into("<III", info, 0, flags, *lower_and_upper(rows))
    struct.pack_into("<III", info, 16, line, len(modules), module_list if modules else 0)
    struct.pack_into("<II", info, 44, 24 * len(rows), map_list)
    struct.pack_into("<I", info, 64, name)
    block = bytes(info) + entries + LOADER_NAME + texts
    if len(block) > LOW_BLOCK_ROOM:
        raise GuestError("the modules and their command lines are too long")
    place.put("the Multiboot information", at, block)
    return at
