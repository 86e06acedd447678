"""A firmware of a few instructions that starts any machine in the state an `Entry` describes.

With it another machine (QEMU) can run exactly what our loader put into memory, so a guest that
does not start tells whether the loader or our own processor is wrong.
"""

import struct

from understudy.guests.entry import CODE_64, Entry

ROM_BYTES = 0x1_0000
ROM_GPA = 0x1_0000_0000 - ROM_BYTES
STAGE_32, STAGE_LAST, TABLES = 0x100, 0x200, 0x400
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


def firmware(entry: Entry) -> bytes:
    """A ROM image that ends at 4 GiB; the reset vector is in its last 16 bytes."""
    registers = entry.registers
    is_64 = registers["cs_attr"] == CODE_64
    rom = bytearray(ROM_BYTES)

    def put(at: int, *pieces: bytes) -> None:
        code = b"".join(pieces)
        rom[at : at + len(code)] = code

    own_gdt = struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    put(TABLES, own_gdt)
    put(TABLES + 0x20, struct.pack("<HI", len(own_gdt) - 1, ROM_GPA + TABLES))
    put(TABLES + 0x28, struct.pack("<HI", registers["gdtr_limit"], registers["gdtr_base"]))

    put(ROM_BYTES - 16, b"\xe9", struct.pack("<H", 16 - 3))  # jmp to offset 0, 16-bit
    put(
        0,
        b"\xfa",  # cli
        b"\x2e\x66\x0f\x01\x16" + struct.pack("<H", TABLES + 0x20),  # lgdt cs:[own]
        b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0",  # CR0.PE := 1
        b"\x66\xea" + struct.pack("<IH", ROM_GPA + STAGE_32, 8),  # jmp far
    )
    paging = [
        b"\xb8" + struct.pack("<I", registers["cr4"]) + b"\x0f\x22\xe0",  # mov cr4, …
        b"\xb8" + struct.pack("<I", registers["cr3"]) + b"\x0f\x22\xd8",  # mov cr3, …
        b"\xb9\x80\x00\x00\xc0\x31\xd2\xb8\x00\x01\x00\x00\x0f\x30",  # IA32_EFER.LME := 1
    ]
    put(
        STAGE_32,
        b"\x66\xb8\x10\x00\x8e\xd8",  # mov ds, 0x10
        b"\x0f\x01\x15" + struct.pack("<I", ROM_GPA + TABLES + 0x28),  # lgdt [the guest's]
        # A PC's firmware leaves the local APIC so that the 8259's interrupts get through:
        b"\xc7\x05\xf0\x00\xe0\xfe\xff\x01\x00\x00",  # spurious vector register: enabled
        b"\xc7\x05\x50\x03\xe0\xfe\x00\x07\x00\x00",  # LVT LINT0: ExtINT
        *(paging if is_64 else []),
        b"\xb8" + struct.pack("<I", registers["cr0"]) + b"\x0f\x22\xc0",  # mov cr0, …
        b"\xea" + struct.pack("<IH", ROM_GPA + STAGE_LAST, registers["cs"]),  # jmp far
    )
    segments = b"\x66\xb8" + struct.pack("<H", registers["ds"])
    segments += b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8"  # mov ds/es/ss/fs/gs, ax
    if is_64:
        moves = [
            b"\x48" + bytes([0xB8 + n]) + struct.pack("<Q", registers.get(name, 0))
            for n, name in enumerate(GPRS)
        ]
        leave = b"\x49\xbf" + struct.pack("<Q", registers["rip"]) + b"\x41\xff\xe7"  # jmp r15
    else:
        moves = [
            bytes([0xB8 + n]) + struct.pack("<I", registers.get(name, 0))
            for n, name in enumerate(GPRS)
        ]
        leave = b"\xea" + struct.pack("<IH", registers["rip"], registers["cs"])  # jmp far
    put(STAGE_LAST, segments, *moves, leave)
    return bytes(rom)
