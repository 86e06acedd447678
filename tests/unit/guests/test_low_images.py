"""What Multiboot kernels find in their command lines, and images that lie where tables would.

What: `Placement.tables`, by each protocol.  Source: ours; boot loaders' custom for the first word.
"""

import struct
from pathlib import Path

import pytest

from tests.unit.guests.flat_memory import MIB, FlatMemory
from tests.unit.guests.kernels import elf32, elf64, low_bzimage, pvh_note
from tests.unit.guests.test_loader import multiboot_header
from understudy.guests import GuestError, load


def test_multiboot_command_lines_begin_with_the_files_names(tmp_path: Path) -> None:
    """Xen: "the kernel's name comes first"; it and Mach skip that word."""
    kernel, module = tmp_path / "xen", tmp_path / "vmlinuz"
    kernel.write_bytes(elf32(MIB + 0x20, MIB, multiboot_header(3) + b"\xf4" * 64))
    module.write_bytes(b"mod")
    memory = FlatMemory(64 * MIB)
    entry = load(memory, kernel, append="com1=115200", modules=[(module, "ro")], initrd=b"ramdisk")
    info = struct.unpack("<IIIIIII", memory.read(entry.registers["rbx"], 28))
    assert memory.read(info[4], 16) == b"xen com1=115200\0"
    texts = [struct.unpack("<IIII", memory.read(info[6] + 16 * n, 16))[2] for n in range(2)]
    assert memory.read(texts[0], 7) == b"module\0"
    assert memory.read(texts[1], 11) == b"vmlinuz ro\0"


LOW = {
    "over the tables": 0x1000,
    "over the information": 0x8000,
    "over the stack": 0x1_8000,
    "over the command line": 0x2_0000,
    "up to the end of base memory": 0x1000,
}


@pytest.mark.parametrize("where", LOW)
@pytest.mark.parametrize("kind", ["multiboot", "pvh", "elf", "linux-32", "linux-64"])
def test_an_image_that_lies_low_finds_the_rest_beside_it(kind: str, where: str) -> None:
    at, memory = LOW[where], FlatMemory(16 * MIB)
    whole = 0x9_E000 if where.startswith("up to") else 0x3000
    code = bytes(range(1, 256)) * 5
    match kind:
        case "multiboot":
            code = multiboot_header(0) + code
            kernel = elf64(entry=at, loads=[(at, code, whole)], machine=3)
        case "pvh":
            kernel = elf64(entry=at, loads=[(at, code, whole)], note=pvh_note(at))
        case "elf":
            kernel = elf64(entry=at, loads=[(at, code, whole)])
        case _:
            kernel = low_bzimage(at, code, whole)
            code = kernel[-len(code) :]
    method = kind if kind.startswith("linux") else None
    entry = load(memory, kernel, append="words", method=method)
    r = entry.registers
    assert (entry.protocol, r["rip"] & ~0x200) == (kind, at)
    assert code in memory.read(at, whole)
    given = [r["gdtr_base"], r["rsp"] - 0x1000, r["rbx"] if r.get("rbx") else r["rsi"]]
    given += [r["cr3"]] if r["cr3"] else []
    assert all(gpa >= 0x1000 and not at <= gpa < at + whole for gpa in given)
    line = memory.content.find(b"kernel words\0" if kind == "multiboot" else b"words\0")
    assert line >= 0x500 and not at <= line < at + whole


def test_what_has_only_a_real_mode_entry_is_refused_with_the_reason() -> None:
    with pytest.raises(GuestError, match="needs a PC's BIOS"):
        load(FlatMemory(16 * MIB), low_bzimage(0, b"code" * 64, 0x1000))
