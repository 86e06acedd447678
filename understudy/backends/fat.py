"""A small FAT file system with some files in it, as bytes.

Source: Microsoft, "FAT: General Overview of On-Disk Format", version 1.03: "Boot Sector and BPB",
"FAT Data Structure", "FAT Long Directory Entries".
Invariants: FAT12, since there are fewer than 4085 clusters; the same files give the same bytes;
times are the format's first, 1980.
"""

import struct
from collections.abc import Mapping
from typing import Final

SECTOR: Final = 512
SECTORS: Final = 8192  # of the volume: 4 MiB
PER_CLUSTER: Final = 4
CLUSTER: Final = PER_CLUSTER * SECTOR
COPIES, FAT_SECTORS, ROOT_ENTRIES = 2, 7, 64
DATA_AT: Final = (1 + COPIES * FAT_SECTORS) * SECTOR + 32 * ROOT_ENTRIES
CLUSTERS: Final = (SECTORS * SECTOR - DATA_AT) // CLUSTER
ROOM: Final = CLUSTERS * CLUSTER
"""Bytes of files, each rounded up to whole clusters."""
END, MEDIA = 0xFFF, 0xF8
FIRST_DATE: Final = 0x21  # 1980-01-01
VOLUME_ID, LONG_NAME, ARCHIVE = 0x08, 0x0F, 0x20
LONG_CHARACTERS: Final = 13  # in an entry of a long name
BOOT: Final = struct.Struct("<3s8sHBHBHHBHHHIIBBBI11s8s")
ENTRY: Final = struct.Struct("<11sBBBHHHHHHHI")


def volume(label: str, files: Mapping[str, bytes]) -> bytes:
    """The file system.  ValueError if there is no room for the files, or not for their names."""
    table, root, data = [MEDIA | 0xF00, END], bytearray(), bytearray()
    root += ENTRY.pack(_short(label), VOLUME_ID, 0, 0, 0, 0, 0, 0, 0, FIRST_DATE, 0, 0)
    for number, (name, content) in enumerate(files.items(), 1):
        first, count = len(table), -(-len(content) // CLUSTER)
        table += [*range(first + 1, first + count), END][:count]
        data += content.ljust(count * CLUSTER, b"\0")
        root += _entries(name, number, first if count else 0, len(content))
    if len(data) > ROOM or len(root) > 32 * ROOT_ENTRIES:
        raise ValueError(f"{len(data)} bytes of files do not fit in a volume of {ROOM}")
    fat = _packed(table).ljust(FAT_SECTORS * SECTOR, b"\0")
    whole = _boot(label) + COPIES * fat + root.ljust(32 * ROOT_ENTRIES, b"\0") + data
    return bytes(whole.ljust(SECTORS * SECTOR, b"\0"))


def _boot(label: str) -> bytes:
    """The first sector: no program, and how the rest is laid out."""
    head = BOOT.pack(
        b"\xeb\x3c\x90", b"MSWIN4.1", SECTOR, PER_CLUSTER, 1, COPIES, ROOT_ENTRIES, SECTORS, MEDIA,
        FAT_SECTORS, 32, 64, 0, 0, 0x80, 0, 0x29, 0x5EED, _short(label), b"FAT12   ",
    )  # fmt: skip
    return head.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _short(name: str) -> bytes:
    return name.upper().encode("ascii").ljust(11)[:11]


def _entries(name: str, number: int, first: int, size: int) -> bytes:
    """A file's entries: its long name, from the end, and a short one that only tells it apart."""
    short = f"FILE~{number}".encode().ljust(11)
    check = 0
    for byte in short:
        check = ((check << 7 | check >> 1) + byte) & 0xFF
    characters = name.encode("utf-16-le")
    pieces = [characters[at : at + 26] for at in range(0, len(characters), 26)]
    rows = []
    for order, piece in enumerate(pieces, 1):
        if len(piece) < 26:
            piece = (piece + b"\0\0").ljust(26, b"\xff")
        last = 0x40 if order == len(pieces) else 0
        head, middle, tail = piece[:10], piece[10:22], piece[22:]
        rows.append(
            struct.pack("<B10sBBB12sH4s", order | last, head, LONG_NAME, 0, check, middle, 0, tail)
        )
    own = ENTRY.pack(short, ARCHIVE, 0, 0, 0, FIRST_DATE, FIRST_DATE, 0, 0, FIRST_DATE, first, size)
    return b"".join(rows[::-1]) + own


def _packed(table: list[int]) -> bytes:
    """Two entries of 12 bits in three bytes."""
    out = bytearray()
    for at in range(0, len(table), 2):
        pair = sum(entry << 12 * n for n, entry in enumerate(table[at : at + 2]))
        out += pair.to_bytes(3, "little")
    return bytes(out)
