"""The zero page (`struct boot_params`): how Linux learns about the machine it woke up on.

Source: Linux, Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header") and zero-page.rst.
Invariant: the page is zero but for the fields written here, so a kernel sees no screen, no EFI
and no drives; the memory map lists RAM exactly as `GuestMemory.ranges` has it.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from understudy.arch.memory_map import EXTENDED_BIOS_DATA, LEGACY_HOLE
from understudy.guests.entry import COMMAND_LINE_GPA, GuestError, GuestMemory
from understudy.guests.placement import Placement

E820_RAM, E820_RESERVED = 1, 2
E820_MAX = 128

ACPI_RSDP_ADDR = 0x070
E820_ENTRIES = 0x1E8
HEADER = 0x1F1
VID_MODE = 0x1FA
BOOT_FLAG = 0x1FE
HEADER_MAGIC = 0x202
VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
HEAP_END_PTR = 0x224
CMD_LINE_PTR = 0x228
SETUP_DATA = 0x250
E820_TABLE = 0x2D0

LOADED_HIGH, KASLR_FLAG, CAN_USE_HEAP = 1 << 0, 1 << 1, 1 << 7
UNDEFINED_LOADER = 0xFF
NORMAL_VIDEO = 0xFFFF
SETUP_RNG_SEED = 9

MAX_COMMAND_LINE = 0x1_0000  # what the layout has room for; kernels take less
LOWEST_INITRD_CEILING = 0x3800_0000  # for kernels whose header does not say


class E820(NamedTuple):
    """One range of the memory map."""

    base: int
    length: int
    kind: int


def memory_rows(memory: GuestMemory, e820: Iterable[tuple[int, int, int]] | None) -> list[E820]:
    """The memory map: the one given, else that of the memory."""
    return memory_map(memory) if e820 is None else [E820(*row) for row in e820]


def memory_map(memory: GuestMemory) -> list[E820]:
    """RAM as the VM has it, and as reserved what a PC's firmware keeps for itself."""
    hole, resume = LEGACY_HOLE
    entries = [
        E820(EXTENDED_BIOS_DATA, hole - EXTENDED_BIOS_DATA, E820_RESERVED),
        E820(0xF_0000, 0x1_0000, E820_RESERVED),
    ]
    for base, length in memory.ranges():
        low_end = min(base + length, EXTENDED_BIOS_DATA)
        high_start = max(base, resume)
        if base < low_end:
            entries.append(E820(base, low_end - base, E820_RAM))
        if high_start < base + length:
            entries.append(E820(high_start, base + length - high_start, E820_RAM))
    return sorted(entries)


def write(
    place: Placement,
    *,
    header: bytes,
    append: str,
    initrd: tuple[int, int],
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
    seed: bytes = b"",
) -> int:
    """Write the page and the command line; returns the page's address.

    `header` is the kernel file's setup header from 0x1F1 on (empty: one is made up);
    `initrd` is (address, bytes), zeros for none.  `seed` is for the kernel's random numbers: 32
    bytes save it from gathering as much from the jitter of its clock, which takes a second.
    """
    page = bytearray(0x1000)
    page[HEADER : HEADER + len(header)] = header
    if not header:
        struct.pack_into("<4sH", page, HEADER_MAGIC, b"HdrS", 0x020F)
        struct.pack_into("<H", page, BOOT_FLAG, 0xAA55)
        page[LOADFLAGS] = LOADED_HIGH
    page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    page[LOADFLAGS] = page[LOADFLAGS] & ~KASLR_FLAG | CAN_USE_HEAP
    struct.pack_into("<H", page, VID_MODE, NORMAL_VIDEO)
    struct.pack_into("<H", page, HEAP_END_PTR, 0xFE00)
    struct.pack_into("<II", page, RAMDISK_IMAGE, *initrd)
    struct.pack_into("<I", page, CMD_LINE_PTR, write_command_line(place, append))
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp)
    _write_map(page, memory_rows(place.memory, e820))
    at = place.low_block
    if seed:
        struct.pack_into("<Q", page, SETUP_DATA, at + len(page))
        node = struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed
        place.put("the random seed", at + len(page), node)
    place.put("the zero page", at, bytes(page))
    return at


def write_command_line(place: Placement, append: str, limit: int = MAX_COMMAND_LINE - 1) -> int:
    """Write the command line, zero-terminated; returns its address."""
    line = encoded(append)
    if len(line) > limit + 1:
        raise GuestError(
            f"the kernel command line has {len(line) - 1} bytes, this kernel takes {limit}: "
            "shorten it"
        )
    gpa = COMMAND_LINE_GPA + place.moved
    place.put("the command line", gpa, line)
    return gpa


def encoded(append: str, what: str = "the kernel command line") -> bytes:
    """A command line as guests read it, with a zero byte at its end."""
    line = append.encode("utf-8", "surrogateescape")
    if 0 in line:
        raise GuestError(f"{what} contains a zero byte")
    return line + b"\0"


def put_initrd(place: Placement, initrd: bytes | None, ceiling: int) -> tuple[int, int]:
    """Place an initrd as high as the kernel allows; returns (address, bytes), zeros for none."""
    if initrd is None:
        return 0, 0
    if not initrd:
        raise GuestError("the initrd is empty: expected a cpio archive, plain or compressed")
    gpa = place.highest("the initrd", len(initrd), ceiling)
    place.memory.write(gpa, initrd)
    return gpa, len(initrd)


def _write_map(page: bytearray, entries: Sequence[E820]) -> None:
    if len(entries) > E820_MAX:
        raise GuestError(f"a memory map has at most {E820_MAX} entries, got {len(entries)}")
    page[E820_ENTRIES] = len(entries)
    for i, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * i, *entry)
