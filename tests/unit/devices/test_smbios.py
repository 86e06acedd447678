"""SMBIOS: found as a guest searches for it, and read back as one reads it.

Source: DMTF DSP0134.  The same bytes were read by dmidecode 3.4, without a complaint, for the sizes
of memory below.
"""

import struct

import pytest

from tests.unit.devices.test_firmware import installed
from understudy.devices import smbios

KIB, MIB, GIB, TIB = (1 << n for n in (10, 20, 30, 40))
UUID = bytes(range(16))
Structure = tuple[int, bytes, list[str]]  # type, the formatted part from its beginning, strings


def structures(data: bytes) -> list[Structure]:
    found, at = [], 0
    while at < len(data):
        kind, length, handle = struct.unpack_from("<BBH", data, at)
        assert handle == len(found)
        end = data.index(b"\0\0", at + length)
        texts = data[at + length : end].decode().split("\0")
        found.append((kind, data[at : at + length], [text for text in texts if text]))
        at = end + 2
    assert found[-1][0] == 127
    return found


def told(ram_bytes: int, vcpus: int = 1) -> list[Structure]:
    return structures(smbios.build(ram_bytes, vcpus, UUID)[smbios.STRUCTURES])


def search(memory: bytes, anchor: bytes) -> int:
    """As the specification has it: on boundaries of 16 from 0xF0000 on."""
    return next(
        at for at in range(0xF0000, 0x100000, 16) if memory[at : at + 16].startswith(anchor)
    )


def test_both_entry_points_lead_to_the_same_structures() -> None:
    memory = bytes(installed())
    old, new = search(memory, b"_SM_"), search(memory, b"_SM3_")
    assert memory[old + 5] == 31 and sum(memory[old : old + 31]) & 0xFF == 0
    assert memory[old + 16 : old + 21] == b"_DMI_" and sum(memory[old + 16 : old + 31]) & 0xFF == 0
    length, at, count = struct.unpack_from("<HIH", memory, old + 22)
    assert memory[new + 6] == 24 and sum(memory[new : new + 24]) & 0xFF == 0
    assert struct.unpack_from("<IQ", memory, new + 12) == (length, at)
    found = structures(memory[at : at + length])
    assert len(found) == count
    (longest,) = struct.unpack_from("<H", memory, old + 8)
    assert longest >= max(len(s[1]) + len("\0".join(s[2])) + 2 for s in found)


def test_the_system_has_a_name_and_an_identifier() -> None:
    found = {kind: (body, texts) for kind, body, texts in told(256 * MIB)}
    assert set(found) == {0, 1, 3, 4, 16, 17, 19, 32, 127}
    assert found[0][1] == ["understudy", "1", "11/28/2026"]
    assert found[1][1] == ["understudy", "PC", "1"] and found[1][0][8:24] == UUID
    uuid = smbios.uuid_of(b"one")
    assert uuid != smbios.uuid_of(b"other") and (uuid[7] >> 4, uuid[8] >> 6) == (4, 2)


def test_there_is_a_processor_for_each() -> None:
    found = [texts[0] for kind, _, texts in told(GIB, vcpus=3) if kind == 4]
    assert found == ["CPU 0", "CPU 1", "CPU 2"]


@pytest.mark.parametrize(
    ("ram", "size", "extended", "ranges"),
    [
        (640 * KIB, 0x8000 | 640, 0, [(0, 640 * KIB)]),
        (256 * MIB, 256, 0, [(0, 256 * MIB)]),
        (40 * GIB, 0x7FFF, 40 << 10, [(0, 3 * GIB), (4 * GIB, 41 * GIB)]),
        (5 * TIB, 0x7FFF, 5 << 20, [(0, 3 * GIB), (4 * GIB, 5 * TIB + GIB)]),
    ],
)
def test_all_of_the_memory_is_told_of(
    ram: int, size: int, extended: int, ranges: list[tuple[int, int]]
) -> None:
    found = told(ram)
    (device,) = [body for kind, body, _ in found if kind == 17]
    assert struct.unpack_from("<H", device, 12)[0] == size
    assert struct.unpack_from("<I", device, 28)[0] == extended
    spans = []
    for body in (body for kind, body, _ in found if kind == 19):
        first, last = struct.unpack_from("<II", body, 4)
        if first == last == 0xFFFF_FFFF:
            first, last = struct.unpack_from("<QQ", body, 15)
            spans.append((first, last + 1))
        else:
            spans.append((first * KIB, (last + 1) * KIB))
    assert spans == ranges
