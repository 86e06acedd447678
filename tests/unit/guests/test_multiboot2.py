"""Multiboot 2: which headers are heeded, what the information says, what is refused.

Source: "Multiboot2 Specification version 2.0".  Invariant: the information is read back as a kernel
reads it, tag by tag.
"""

import struct

import pytest

from tests.unit.guests.flat_memory import MIB, FlatMemory
from tests.unit.guests.kernels import elf32, elf64, pvh_note
from tests.unit.guests.test_loader import assert_32_bit, multiboot_header
from understudy.guests import Entry, GuestError, load

RSDP = 0xE_0000
END = (0, 0, b"")


def tag(kind: int, flags: int, content: bytes) -> bytes:
    data = struct.pack("<HHI", kind, flags, 8 + len(content)) + content
    return data + bytes(-len(data) % 8)


def header(*tags: tuple[int, int, bytes], architecture: int = 0) -> bytes:
    body = b"".join(tag(*each) for each in (*tags, END))
    fields = (0xE85250D6, architecture, 16 + len(body))
    return struct.pack("<IIII", *fields, -sum(fields) & 0xFFFF_FFFF) + body


def elf(head: bytes) -> bytes:
    """With the header where it is looked for, behind those of ELF: on a boundary of eight."""
    return elf32(MIB + 0x20, MIB, (bytes(4) + head).ljust(256, b"\xf4"))


def kernel(*tags: tuple[int, int, bytes]) -> bytes:
    return elf(header(*tags))


def words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def information(memory: FlatMemory, entry: Entry) -> list[tuple[int, bytes]]:
    at = entry.registers["rbx"]
    assert at % 8 == 0
    total, reserved = struct.unpack("<II", memory.read(at, 8))
    found, place = [], at + 8
    while place < at + total:
        kind, size = struct.unpack("<II", memory.read(place, 8))
        found.append((kind, memory.read(place + 8, size - 8)))
        place += size + 7 & ~7
    assert (reserved, place, found[-1]) == (0, at + total, (0, b""))
    return found


def test_an_elf_image_is_told_what_there_is() -> None:
    memory = FlatMemory(64 * MIB)
    memory.write(RSDP, b"RSD PTR " + bytes(range(28)))
    entry = load(
        memory, kernel((1, 0, words(4, 6))), append="a=b", rsdp=RSDP, modules=[(b"mod", "its line")]
    )
    r = entry.registers
    assert (entry.protocol, r["rip"], r["rax"]) == ("multiboot2", MIB + 0x20, 0x36D76289)
    assert_32_bit(memory, entry)
    tags = information(memory, entry)
    told = dict(tags)
    assert len(told) == len(tags)
    assert told[1] == b"kernel a=b\0" and told[2] == b"understudy\0"
    start, end = struct.unpack_from("<II", told[3])
    assert (memory.read(start, end - start), told[3][8:]) == (b"mod", b"module its line\0")
    assert start % 4096 == 0
    assert told[4] == words(639, 63 * 1024)
    assert told[6][:8] == words(24, 0)
    assert told[6][-24:] == struct.pack("<QQII", MIB, 63 * MIB, 1, 0)
    assert told[15] == b"RSD PTR " + bytes(range(28)) and told[14] == told[15][:20]
    assert 21 not in told


def test_an_image_that_may_be_moved_is_told_that_it_was_not() -> None:
    memory = FlatMemory(64 * MIB)
    entry = load(memory, kernel((10, 0, words(MIB, 1 << 31, 1 << 21, 0))))
    assert dict(information(memory, entry))[21] == words(MIB)


def test_an_image_that_is_no_elf_goes_where_its_header_says() -> None:
    head = header((2, 0, words(MIB + 8, MIB, MIB + 0x80, MIB + 0x200)), (3, 0, words(MIB + 0x70)))
    file = b"-" * 24 + b"A" * 8 + head.ljust(0x78, b"\xf4") + b"tail"
    memory = FlatMemory(4 * MIB)
    memory.write(MIB + 0x100, b"dirt")
    entry = load(memory, file)
    assert entry.registers["rip"] == MIB + 0x70
    assert memory.read(MIB, 0x80) == file[24 : 24 + 0x80]
    assert not any(memory.read(MIB + 0x80, 0x180))


def test_an_entry_point_of_its_own_goes_before_that_of_the_elf_file() -> None:
    entry = load(FlatMemory(4 * MIB), kernel((3, 0, words(MIB + 0x40))))
    assert entry.registers["rip"] == MIB + 0x40


def test_with_headers_of_both_versions_the_first_is_taken_unless_the_second_is_asked_for() -> None:
    both = elf(header() + multiboot_header(0))
    assert load(FlatMemory(4 * MIB), both).protocol == "multiboot"
    assert load(FlatMemory(4 * MIB), both, method="multiboot2").protocol == "multiboot2"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (kernel((99, 0, b"")), "requires unknown tag 99"),
        (kernel((1, 0, words(4, 12))), "requires information 12, which there is none of"),
        (kernel((2, 0, words(MIB, MIB, 0, 0))), "addresses without an entry point"),
        (kernel((2, 0, words(MIB))), "header is damaged"),
        (elf(header()[:-8] + words(5, 7)), "is damaged"),
        (elf(header(architecture=4)), "for architecture 4, expected 0"),
    ],
)
def test_refusals_are_one_line(file: bytes, message: str) -> None:
    with pytest.raises(GuestError, match=message) as caught:
        load(FlatMemory(16 * MIB), file)
    assert "\n" not in str(caught.value)


def test_what_is_optional_may_be_unknown() -> None:
    load(FlatMemory(16 * MIB), kernel((99, 1, b"??"), (1, 1, words(12)), (5, 1, bytes(12))))


@pytest.mark.parametrize(
    "file",
    [
        kernel(),
        elf32(MIB, MIB, multiboot_header(0) + bytes(64)),
        elf64(note=pvh_note(MIB * 16)),
    ],
)
def test_a_modules_command_line_is_any_bytes_but_zero(file: bytes) -> None:
    memory = FlatMemory(64 * MIB)
    load(memory, file, modules=[(b"mod", "caf\udce9")])
    assert b"caf\xe9\0" in bytes(memory.content)
    with pytest.raises(GuestError, match="a module's command line contains a zero byte"):
        load(FlatMemory(64 * MIB), file, modules=[(b"mod", "a\0b")])
