"""The loaders: what lands where, in which state the processor starts, and what they refuse."""

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.guests.flat_memory import MIB, FlatMemory
from tests.unit.guests.kernels import MAIN, bzimage, compress, elf32, elf64, pvh_note
from understudy.guests import Entry, GuestError, initramfs, load
from understudy.guests.entry import CODE_32, CODE_64, GuestMemory

BIG = initramfs.Node(0o100644, bytes(30 * MIB))
METHODS = ("gzip", "XZ", "LZ4", "ZSTD")


def u32(memory: FlatMemory, gpa: int) -> int:
    return int.from_bytes(memory.read(gpa, 4), "little")


def u64(memory: FlatMemory, gpa: int) -> int:
    return int.from_bytes(memory.read(gpa, 8), "little")


def walk(memory: FlatMemory, entry: Entry, gva: int) -> int:
    """Translate through the page tables that the entry points to (2-MByte pages)."""
    table = entry.registers["cr3"]
    for shift in (39, 30):
        item = u64(memory, table + 8 * (gva >> shift & 511))
        assert item & 0b11 == 0b11, f"{gva:#x} is not mapped"
        table = item & ~0xFFF
    item = u64(memory, table + 8 * (gva >> 21 & 511))
    assert item & 0x83 == 0x83
    return item & ~0x1FFFFF | gva & 0x1FFFFF


def assert_64_bit(memory: FlatMemory, entry: Entry) -> None:
    r = entry.registers
    assert (r["cr0"] >> 31 & 1, r["cr0"] & 1, r["cr4"] >> 5 & 1, r["efer"]) == (1, 1, 1, 0x500)
    assert (r["cs"], r["cs_attr"], r["ds"], r["rflags"]) == (0x10, CODE_64, 0x18, 2)
    for gva in (0, MAIN, r["rip"], 0xFFFF_FFFF):
        assert walk(memory, entry, gva) == gva
    descriptor = u64(memory, r["gdtr_base"] + 0x10)
    assert descriptor == 0x00AF_9B00_0000_FFFF
    assert u64(memory, r["gdtr_base"] + 0x18) == 0x00CF_9300_0000_FFFF


def assert_32_bit(memory: FlatMemory, entry: Entry) -> None:
    r = entry.registers
    assert (r["cr0"] & 0x8000_0001, r["cr4"], r["efer"]) == (1, 0, 0)
    assert (r["cs"], r["cs_attr"], r["cs_limit"]) == (0x10, CODE_32, 0xFFFF_FFFF)
    assert u64(memory, r["gdtr_base"] + 0x10) == 0x00CF_9B00_0000_FFFF


@pytest.mark.parametrize("compression", METHODS)
def test_bzimage_is_entered_at_vmlinux(compression: str) -> None:
    code = bytes(range(256)) * 40
    vmlinux = elf64(MAIN + 0x40, [(MAIN, code, len(code) + 0x3000)])
    memory = FlatMemory(64 * MIB)
    memory.write(MAIN + len(code), b"dirt")  # .bss must come out zero all the same
    entry = load(memory, bzimage(compress(compression, vmlinux)), append="quiet", rsdp=0xE0000)
    assert entry.protocol == "linux-direct"
    assert entry.registers["rip"] == MAIN + 0x40
    assert_64_bit(memory, entry)
    assert memory.read(MAIN, len(code)) == code
    assert not any(memory.read(MAIN + len(code), 0x3000))
    page = entry.registers["rsi"]
    assert memory.read(page + 0x202, 4) == b"HdrS"
    assert memory.read(page + 0x210, 1) == b"\xff"
    assert u64(memory, page + 0x70) == 0xE0000
    line = u32(memory, page + 0x228)
    assert memory.read(line, 6) == b"quiet\0"
    assert u32(memory, page + 0x1E4) == 0 and memory.read(page + 0x1EF, 1) == b"\0"  # sentinel


def test_zero_page_has_memory_map_and_initrd() -> None:
    memory = FlatMemory(64 * MIB)
    initrd = b"cpio" * 3000
    page = load(memory, bzimage(compress("gzip", elf64())), initrd=initrd).registers["rsi"]
    assert memory.read(page + 0x1E8, 1) == b"\4"
    rows = [struct.unpack("<QQI", memory.read(page + 0x2D0 + 20 * i, 20)) for i in range(4)]
    assert rows == [
        (0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xF0000, 0x10000, 2), (MIB, 63 * MIB, 1),
    ]  # fmt: skip
    gpa, length = u32(memory, page + 0x218), u32(memory, page + 0x21C)
    assert (length, gpa % 4096) == (len(initrd), 0)
    assert gpa + length <= 64 * MIB and gpa >= MAIN + 0x10000
    assert memory.read(gpa, length) == initrd


def test_a_seed_for_random_numbers_is_setup_data() -> None:
    memory = FlatMemory(64 * MIB)
    seed = bytes(range(32))
    entry = load(memory, bzimage(compress("LZ4", elf64())), seed=seed)
    node = u64(memory, entry.registers["rsi"] + 0x250)
    following, kind, length = struct.unpack("<QII", memory.read(node, 16))
    assert (following, kind, memory.read(node + 16, length)) == (0, 9, seed)
    entry = load(memory := FlatMemory(64 * MIB), bzimage(compress("LZ4", elf64())))
    assert u64(memory, entry.registers["rsi"] + 0x250) == 0


def test_memory_map_can_be_given() -> None:
    memory = FlatMemory(64 * MIB)
    rows = [(0, 0x9F000, 1), (MIB, 31 * MIB, 1), (0x200_0000, 0x1000, 3)]
    page = load(memory, elf64(), e820=rows).registers["rsi"]
    assert memory.read(page + 0x1E8, 1) == b"\3"
    assert struct.unpack("<QQI", memory.read(page + 0x2D0 + 40, 20)) == rows[2]


@pytest.mark.parametrize("method", ["linux-64", "linux-32"])
def test_bzimage_entered_by_its_own_entry_points(method: str) -> None:
    memory = FlatMemory(64 * MIB)
    image = bzimage(compress("XZ", elf64()))
    entry = load(memory, image, method=method)
    assert entry.protocol == method
    assert memory.read(MAIN, len(image) - 1024) == image[1024:]
    if method == "linux-64":
        assert entry.registers["rip"] == MAIN + 0x200
        assert_64_bit(memory, entry)
    else:
        assert entry.registers["rip"] == MAIN
        assert_32_bit(memory, entry)
        assert {entry.registers[r] for r in ("rbp", "rdi", "rbx")} == {0}


def test_payload_that_cannot_be_decompressed_is_left_to_the_kernel() -> None:
    image = bzimage(compress("LZO", elf64()))
    assert load(FlatMemory(64 * MIB), image).protocol == "linux-64"
    image = bzimage(compress("LZO", elf64()), xloadflags=0)
    assert load(FlatMemory(64 * MIB), image).protocol == "linux-32"
    with pytest.raises(GuestError, match="no payload that can be decompressed"):
        load(FlatMemory(64 * MIB), image, method="linux-direct")


def test_vmlinux_without_notes() -> None:
    memory = FlatMemory(64 * MIB)
    entry = load(memory, elf64(0xFFFF_FFFF_8000_0000 + MAIN + 8), append="a=b")
    assert (entry.protocol, entry.registers["rip"]) == ("elf", MAIN + 8)
    assert_64_bit(memory, entry)
    assert memory.read(entry.registers["rsi"] + 0x202, 4) == b"HdrS"
    entry = load(memory, elf32(MAIN, MAIN, b"\xf4" * 16))
    assert_32_bit(memory, entry)
    assert entry.registers["rsi"]


def test_gzipped_kernel_file(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux.gz"
    file.write_bytes(compress("gzip", elf64()))
    assert load(FlatMemory(64 * MIB), file).protocol == "elf"


def test_pvh() -> None:
    memory = FlatMemory(64 * MIB)
    kernel = elf64(note=pvh_note(MAIN + 0x10))
    modules = [(b"second", "its line")]
    entry = load(memory, kernel, initrd=b"ramdisk", append="x", rsdp=0xE0000, modules=modules)
    assert (entry.protocol, entry.registers["rip"]) == ("pvh", MAIN + 0x10)
    assert_32_bit(memory, entry)
    info = entry.registers["rbx"]
    fields = struct.unpack("<IIIIQQQQII", memory.read(info, 56))
    magic, version, flags, count, module_list, line, rsdp, memory_map, rows, _ = fields
    assert (magic, version, flags, count, rsdp, rows) == (0x336EC578, 1, 0, 2, 0xE0000, 4)
    assert memory.read(line, 2) == b"x\0"
    gpa, length, text, _ = struct.unpack("<QQQQ", memory.read(module_list, 32))
    assert (memory.read(gpa, length), text) == (b"ramdisk", 0)
    gpa, length, text, _ = struct.unpack("<QQQQ", memory.read(module_list + 32, 32))
    assert (memory.read(gpa, length), memory.read(text, 9)) == (b"second", b"its line\0")
    row = struct.unpack("<QQII", memory.read(memory_map + 72, 24))
    assert row == (MIB, 63 * MIB, 1, 0)


def multiboot_header(flags: int, *addresses: int) -> bytes:
    fields = (0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF, *addresses)
    return struct.pack(f"<{len(fields)}I", *fields)


def test_multiboot_elf() -> None:
    memory = FlatMemory(64 * MIB)
    kernel = elf32(MIB + 0x20, MIB, multiboot_header(3) + b"\xf4" * 64)
    entry = load(memory, kernel, append="console=com0", modules=[(b"mod", "name")])
    r = entry.registers
    assert (entry.protocol, r["rip"], r["rax"]) == ("multiboot", MIB + 0x20, 0x2BADB002)
    assert_32_bit(memory, entry)
    flags, lower, upper, _, line, count, modules = struct.unpack(
        "<IIIIIII", memory.read(r["rbx"], 28)
    )
    assert (flags & 0x4D, lower, upper, count) == (0x4D, 639, 63 * 1024, 1)
    assert memory.read(line, 20) == b"kernel console=com0\0"
    start, end, text, _ = struct.unpack("<IIII", memory.read(modules, 16))
    assert start % 4096 == 0 and memory.read(start, end - start) == b"mod"
    assert memory.read(text, 12) == b"module name\0"
    length, address = struct.unpack("<II", memory.read(r["rbx"] + 44, 8))
    assert length == 4 * 24
    assert struct.unpack("<IQQI", memory.read(address + 72, 24)) == (20, MIB, 63 * MIB, 1)


def test_multiboot_by_addresses() -> None:
    header = multiboot_header(1 << 16, MIB + 0x10, MIB, MIB + 0x80, MIB + 0x200, MIB + 0x40)
    kernel = b"not loaded".ljust(32, b"-") + b"A" * 16 + header.ljust(0x70, b"\xf4") + b"tail"
    memory = FlatMemory(4 * MIB)
    memory.write(MIB + 0x100, b"dirt")
    entry = load(memory, kernel)
    assert entry.registers["rip"] == MIB + 0x40
    assert memory.read(MIB, 0x80) == kernel[32 : 32 + 0x80]
    assert not any(memory.read(MIB + 0x80, 0x180))
    short = kernel[:100]
    with pytest.raises(GuestError, match="truncated"):
        load(memory, short)
    strange = multiboot_header(0x8) + bytes(64)
    with pytest.raises(GuestError, match="unknown flags 0x8"):
        load(memory, strange)


GOOD = bzimage(compress("LZ4", elf64()))


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (b"", {}, "is empty"),
        (b"#!/bin/sh\necho no kernel\n", {}, "is not a kernel: expected a bzImage"),
        (GOOD[:0x210], {}, "truncated: 528 bytes, not even its boot header"),
        (GOOD[:-40], {}, "truncated: its header promises"),
        (elf64()[:80], {}, "truncated ELF file"),
        (elf64()[:32] + b"\xff" * 8 + elf64()[40:], {}, "truncated ELF file: 1 program headers"),
        (elf64()[:-1], {}, "truncated: a segment ends at byte"),
        (elf64(machine=183), {}, "expected an ELF file for x86, got machine 183"),
        (elf64(loads=[]), {}, "nothing to load"),
        (elf64(entry=5), {}, "entry point 0x5 lies in no loadable segment"),
        (elf64(loads=[(3 << 40, b"x", 1)]), {}, "no size of memory would do"),
        (elf64(loads=[(0xC000_0000, b"x", 1)]), {}, "no size of memory would do"),
        (elf64(loads=[(MAIN, b"x", 1 << 62)]), {}, "no size of memory would do"),
        (elf64(loads=[(MAIN, b"xx", 2), (MAIN + 1, b"y", 1)]), {}, "overlaps kernel segment 0"),
        (elf64(loads=[(0, b"xx", 2)], entry=0), {}, "what firmware leaves at 0x0-0x500 overlaps"),
        (elf64(loads=[(0xB8000, b"x", 1)], entry=0xB8000), {}, "no size of memory would do"),
        (bzimage(compress("XZ", elf64())[:-9]), {}, "XZ payload is truncated"),
        (bzimage(compress("ZSTD", elf64())[:40] + b"\0" * 60), {}, "ZSTD payload is"),
        (bzimage(compress("gzip", elf64())[:-9]), {}, "gzip payload is truncated"),
        (bzimage(compress("LZ4", b"no ELF file at all")), {}, "expected an ELF file"),
        (bzimage(compress("LZ4", elf64()), init_size=99 * MIB), {}, "give it at least 115M"),
        (GOOD, {"method": "bios"}, "unknown boot method 'bios'"),
        (GOOD, {"method": "multiboot"}, "no Multiboot header"),
        (elf64(), {"method": "linux-32"}, "is no bzImage"),
        (elf64(), {"method": "pvh"}, "no PVH entry point"),
        (elf64(note=pvh_note(1 << 32)), {}, "not below 4 GiB"),
        (bzimage(b"", xloadflags=0), {"method": "linux-64"}, "has no 64-bit entry point"),
        (GOOD, {"append": "x" * 3000}, "has 3000 bytes, this kernel takes 2047"),
        (GOOD, {"append": "a\0b"}, "zero byte"),
        (GOOD, {"initrd": b""}, "the initrd is empty"),
        (GOOD, {"initrd": bytes(60 * MIB)}, "the initrd of 60 MiB does not fit"),
        (GOOD, {"initrd": bytes(65 * MIB)}, "the initrd of 65 MiB does not fit"),
        (GOOD, {"e820": [(0, 1, 1)] * 200}, "at most 128 entries"),
    ],
)
def test_refusals_are_one_line(kernel: bytes, options: dict[str, object], message: str) -> None:
    with pytest.raises(GuestError, match=message) as caught:
        load(FlatMemory(64 * MIB), kernel, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (bzimage(compress("XZ", elf64())), {}),
        (bzimage(compress("XZ", elf64())), {"initrd": initramfs.cpio({"x": BIG})}),
        (elf64(loads=[(MAIN, b"x", 40 * MIB)]), {"initrd": gzip.compress(bytes(9 * MIB))}),
        (elf64(note=pvh_note(MAIN)), {"modules": [(bytes(31 * MIB), "")]}),
        (elf32(MIB, MIB, multiboot_header(1 << 16, MIB, MIB, 0, 50 * MIB, MIB)), {}),
    ],
)
def test_what_an_error_says_to_do_about_memory_helps(
    kernel: bytes, options: dict[str, Any]
) -> None:
    with pytest.raises(GuestError) as caught:
        load(FlatMemory(8 * MIB), kernel, **options)
    found = re.search(r": give it at least (\d+)M, .*: try (\d+)M$", str(caught.value))
    assert found is not None, str(caught.value)
    least, enough = int(found[1]), int(found[2])
    load(FlatMemory(least * MIB), kernel, **options)
    load(FlatMemory(enough * MIB), kernel, **options)
    with pytest.raises(GuestError, match="give it at least"):
        load(FlatMemory((least - 1) * MIB), kernel, **options)
    assert enough >= least * 5 // 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"kernel .*/nothing does not exist"):
        load(FlatMemory(), tmp_path / "nothing")
    with pytest.raises(GuestError, match="cannot be read: Is a directory"):
        load(FlatMemory(), tmp_path)
    with pytest.raises(GuestError, match=r"initrd .*/nothing does not exist"):
        load(FlatMemory(), GOOD, initrd=tmp_path / "nothing")


def _try(memory: GuestMemory, data: bytes) -> None:
    try:
        load(memory, data)
    except GuestError as error:
        assert "\n" not in str(error)


MEMORY = FlatMemory(20 * MIB)
SEEDS = [
    GOOD,
    bzimage(compress("ZSTD", elf64())),
    elf64(note=pvh_note(MAIN)),
    elf32(MIB, MIB, multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB)),
]


@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x7fELF\x02\x01", b"\x7fELF\x01\x01"]))
def test_random_bytes_never_crash(data: bytes, start: bytes) -> None:
    _try(MEMORY, start + data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 0x400), st.integers(0, 255)), max_size=8),
    st.integers(0, 1 << 16),
)
def test_damaged_kernels_never_crash(
    kernel: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(kernel)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    _try(MEMORY, bytes(damaged[: length or None]))
