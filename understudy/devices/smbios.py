"""SMBIOS: what firmware tells of the machine: who made it, its processors, its memory.

Source: DMTF DSP0134, "System Management BIOS (SMBIOS) Reference Specification" 3.6: "SMBIOS
structure table", and for each structure the section of its name.
Both entry points are there, that of 2.1 and that of 3.0; they lead to the same structures.

Not described, though the specification has them in its list of what every PC has: caches and
slots.  What nobody knows is 0 or "unknown".

Invariants: all of it lies between 0xF0000 and 0xFFFFF, the entry points on a boundary of 16, where
a guest searches; every checksum is right; a handle is the number of its structure.
"""

import hashlib
import struct
from collections.abc import Iterator
from typing import Final

from understudy.arch.memory_map import HIGH_START, LOW_END
from understudy.devices.checksum import summed

ENTRY, ENTRY_3, STRUCTURES, LIMIT = 0xF_1000, 0xF_1020, 0xF_1040, 0xF_8000
MAKER, PRODUCT, VERSION, DATE = "understudy", "PC", "1", "11/28/2026"
KIB, MIB = 1 << 10, 1 << 20
NONE: Final = 0xFFFE  # instead of a handle: nothing is known of errors
NO_CACHE: Final = 0xFFFF

(
    BIOS, SYSTEM, CHASSIS, PROCESSOR, MEMORY_ARRAY, MEMORY_DEVICE, MAPPED_ADDRESS, BOOT, END,
) = 0, 1, 3, 4, 16, 17, 19, 32, 127  # fmt: skip
UNKNOWN, OTHER = 2, 1  # in most of the lists of values
IS_VIRTUAL = 1 << 4  # of the BIOS's characteristics, second extension byte
NO_CHARACTERISTICS = 1 << 3  # "BIOS characteristics are not supported"
ENABLED = 0x41  # a processor's status: socket populated, CPU enabled


def build(ram_bytes: int, vcpus: int, uuid: bytes) -> dict[int, bytes]:
    """All of it, by gpa."""
    parts = [
        _structure(handle, kind, body, strings)
        for handle, (kind, body, strings) in enumerate(_structures(ram_bytes, vcpus, uuid))
    ]
    data = b"".join(parts)
    if STRUCTURES + len(data) > LIMIT:
        raise ValueError(f"SMBIOS structures of {len(data)} bytes do not fit below {LIMIT:#x}")
    longest = max(len(part) for part in parts)
    inner = struct.pack("<5sBHIHB", b"_DMI_", 0, len(data), STRUCTURES, len(parts), 0x28)
    outer = struct.pack("<4sBBBBHB5s", b"_SM_", 0, 31, 2, 8, longest, 0, bytes(5))
    newer = struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 0, 0, 1, 0, len(data), STRUCTURES)
    return {
        ENTRY: summed(outer + summed(inner, 5), 4),
        ENTRY_3: summed(newer, 5),
        STRUCTURES: data,
    }


def uuid_of(generation: bytes) -> bytes:
    """A universal unique identifier (RFC 4122, version 4), as SMBIOS stores it."""
    raw = bytearray(hashlib.sha256(b"system" + generation).digest()[:16])
    raw[7], raw[8] = raw[7] & 0x0F | 0x40, raw[8] & 0x3F | 0x80  # the first fields little-endian
    return bytes(raw)


def _structure(handle: int, kind: int, body: bytes, strings: tuple[str, ...]) -> bytes:
    header = struct.pack("<BBH", kind, 4 + len(body), handle)
    texts = b"".join(text.encode() + b"\0" for text in strings) or b"\0"
    return header + body + texts + b"\0"


def _structures(
    ram_bytes: int, vcpus: int, uuid: bytes
) -> Iterator[tuple[int, bytes, tuple[str, ...]]]:
    """(type, body, strings) of each; in a body, 1 is the first string and 0 none."""
    bios = struct.pack("<BBHBB", 1, 2, 0xE000, 3, 1)  # in two units of 64 KiB
    bios += struct.pack("<QBB", NO_CHARACTERISTICS, 0, IS_VIRTUAL)
    yield BIOS, bios + struct.pack("<BBBBH", 0xFF, 0xFF, 0xFF, 0xFF, 0), (MAKER, VERSION, DATE)
    yield SYSTEM, struct.pack("<BBBB16sBBB", 1, 2, 3, 0, uuid, 6, 0, 0), (MAKER, PRODUCT, VERSION)
    chassis = struct.pack("<BBBBBBBBBIBBBB", 1, OTHER, 0, 0, 0, 3, 3, 3, UNKNOWN, 0, 0, 0, 0, 0)
    yield CHASSIS, chassis, (MAKER,)
    for number in range(vcpus):
        yield PROCESSOR, _processor(), (f"CPU {number}", MAKER)
    array = 3 + vcpus  # the handle of the next
    kib = ram_bytes // KIB
    capacity = (kib, 0) if kib < 1 << 31 else (1 << 31, ram_bytes)
    yield MEMORY_ARRAY, struct.pack("<BBBIHHQ", 3, 3, 3, capacity[0], NONE, 1, capacity[1]), ()
    yield MEMORY_DEVICE, _memory_device(array, ram_bytes), ("DIMM 0", MAKER)
    low = min(ram_bytes, LOW_END)
    for start, length in ((0, low), (HIGH_START, ram_bytes - low)):
        if length:
            yield MAPPED_ADDRESS, _mapped(array, start, start + length), ()
    yield BOOT, bytes(7), ()  # no errors
    yield END, b"", ()


def _processor() -> bytes:
    """ "Processor Information": one of one core, of which the rest is CPUID's to tell."""
    return struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHHHHH",
        1, 3, UNKNOWN, 2, 0, 0, 0, 0, 0, 0, ENABLED, OTHER,
        NO_CACHE, NO_CACHE, NO_CACHE, 0, 0, 0, 1, 1, 1, 1 << 2, UNKNOWN, 1, 1, 1,
    )  # fmt: skip


def _memory_device(array: int, ram_bytes: int) -> bytes:
    """ "Memory Device": a module with all of it.  Small sizes are in KiB, large ones in MiB."""
    mib, extended = ram_bytes // MIB, 0
    if ram_bytes % MIB and ram_bytes // KIB < 0x7FFF:
        size = 0x8000 | ram_bytes // KIB
    elif mib < 0x7FFF:
        size = mib
    else:
        size, extended = 0x7FFF, mib
    return struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        array, NONE, 0xFFFF, 0xFFFF, size, 9, 0, 1, 0, 7, 1 << 1, 0, 2, 0, 0, 0, 0,
        extended, 0, 0, 0, 0,
    )  # fmt: skip


def _mapped(array: int, start: int, end: int) -> bytes:
    """ "Memory Array Mapped Address": in KiB, or in bytes where those are too many."""
    first, last = start // KIB, end // KIB - 1
    if last < 0xFFFF_FFFF:
        return struct.pack("<IIHBQQ", first, last, array, 1, 0, 0)
    return struct.pack("<IIHBQQ", 0xFFFF_FFFF, 0xFFFF_FFFF, array, 1, start, end - 1)
