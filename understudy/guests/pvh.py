"""PVH: enter an ELF kernel in 32-bit mode at the address that its note names.

Source: Xen, docs/misc/pvh.pandoc, and xen/include/public/arch-x86/hvm/start_info.h.
"""

import struct
from collections.abc import Iterable, Sequence

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

XEN_ELFNOTE_PHYS32_ENTRY = 18
MAGIC = 0x336E_C578  # "xEn3" with bit 7 of the first byte set
VERSION = 1  # has the memory map
START_INFO_BYTES = 56
MODULE_BYTES = 32
MAP_ENTRY_BYTES = 24
MAX_MODULES = 32
HIGHEST = 1 << 32  # 32-bit entry: everything must be reachable


def entry_point(image: elf.Image) -> int | None:
    """The physical address in the kernel's PVH note, if there is one."""
    for name, kind, value in image.notes():
        if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(value) in (4, 8):
            return int.from_bytes(value, "little")
    return None


def load(
    memory: GuestMemory,
    image: elf.Image,
    *,
    modules: Sequence[tuple[bytes, str]],
    append: str,
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
) -> Entry:
    """Load the kernel, its modules (the first is Linux's initrd) and the start information."""
    start = entry_point(image)
    if start is None:
        raise GuestError("the kernel has no PVH entry point (no Xen note PHYS32_ENTRY)")
    if start >= HIGHEST:
        raise GuestError(f"the kernel's PVH entry point {start:#x} is not below 4 GiB")
    if len(modules) > MAX_MODULES:
        raise GuestError(f"expected at most {MAX_MODULES} modules, got {len(modules)}")
    place = Placement(memory)
    elf.load(image, place)
    place.tables()
    line = boot_params.write_command_line(place, append)
    placed = [
        (*boot_params.put_initrd(place, data, boot_params.LOWEST_INITRD_CEILING), text)
        for data, text in modules
    ]
    rows = boot_params.memory_rows(memory, e820)
    block_at = place.low_block
    module_list = block_at + START_INFO_BYTES + 8
    map_list = module_list + MODULE_BYTES * len(placed)
    texts_at = map_list + MAP_ENTRY_BYTES * len(rows)
    entries, texts = b"", b""
    for gpa, length, text in placed:
        text_gpa = texts_at + len(texts) if text else 0
        texts += boot_params.encoded(text, "a module's command line") if text else b""
        entries += struct.pack("<QQQQ", gpa, length, text_gpa, 0)
    for row in rows:
        entries += struct.pack("<QQII", *row, 0)
    info = struct.pack(
        "<IIIIQQQQII",
        MAGIC,
        VERSION,
        0,
        len(placed),
        module_list if placed else 0,
        line,
        rsdp,
        map_list,
        len(rows),
        0,
    )
    block = info.ljust(START_INFO_BYTES + 8, b"\0") + entries + texts
    if len(block) > LOW_BLOCK_ROOM:
        raise GuestError("the modules' command lines are too long")
    place.put("the PVH start information", block_at, block)
    write_gdt(memory, CODE_32, place.moved)
    return protected_mode("pvh", start, moved=place.moved, rbx=block_at)
