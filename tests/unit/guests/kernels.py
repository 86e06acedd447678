"""Small kernels made by hand for loader tests: an ELF file, a bzImage around it."""

import lzma
import struct
import zlib
from collections.abc import Sequence

import lz4.block
import zstandard

MAIN = 0x100_0000  # where the bzImages of these tests want to be


def elf64(
    entry: int = MAIN,
    loads: Sequence[tuple[int, bytes, int]] = ((MAIN, b"code" * 64, 0x2000),),
    note: bytes = b"",
    machine: int = 62,
) -> bytes:
    """An ELF file; `loads` are (physical address, contents, bytes in memory)."""
    count = len(loads) + bool(note)
    at = 64 + 56 * count
    headers, body = b"", b""
    if note:
        headers += struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
        body += note
    for paddr, data, memory_size in loads:
        vaddr = 0xFFFF_FFFF_8000_0000 + paddr & 0xFFFF_FFFF_FFFF_FFFF
        offset = at + len(body)
        headers += struct.pack(
            "<IIQQQQQQ", 1, 7, offset, vaddr, paddr, len(data), memory_size, 4096
        )
        body += data
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    rest = (2, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return identity + struct.pack("<HHIQQQIHHHHHH", *rest) + headers + body


def elf32(entry: int, paddr: int, data: bytes) -> bytes:
    """A 32-bit ELF file with one segment."""
    identity = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    rest = (2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<IIIIIIII", 1, 84, paddr, paddr, len(data), len(data), 7, 4096)
    return identity + struct.pack("<HHIIIIIHHHHHH", *rest) + segment + data


def pvh_note(entry: int) -> bytes:
    """A Xen note as Linux has it."""
    return struct.pack("<III", 4, 8, 18) + b"Xen\0" + struct.pack("<Q", entry)


def compress(method: str, data: bytes) -> bytes:
    """As a kernel build does it, with the size at the end (but for gzip)."""
    size = struct.pack("<I", len(data))
    match method:
        case "gzip":
            packer = zlib.compressobj(wbits=31)
            return packer.compress(data) + packer.flush()
        case "XZ":
            return lzma.compress(data, check=lzma.CHECK_CRC32) + size
        case "ZSTD":
            return zstandard.ZstdCompressor().compress(data) + size
        case "LZ4":
            packed = b"\x02\x21\x4c\x18"
            for at in range(0, len(data), 8 << 20):
                block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
                packed += struct.pack("<I", len(block)) + block
            return packed + size
        case _:
            return b"\x89LZO" + data


def low_bzimage(start: int, code: bytes, whole: int) -> bytes:
    """A file of the Linux boot protocol that is not relocatable and wants to be at `start`."""
    image = bytearray(bzimage(code, init_size=whole))
    struct.pack_into("<I", image, 0x214, start)
    image[0x234] = 0
    struct.pack_into("<II", image, 0x248, 0, 0)  # no payload
    return bytes(image)


def bzimage(payload: bytes, *, xloadflags: int = 1, init_size: int = 0x10000) -> bytes:
    """A bzImage of protocol 2.15 with the payload 0x300 bytes into its protected-mode part."""
    kernel = b"\x90" * 0x300 + payload
    kernel += b"\0" * (-len(kernel) % 16)
    setup = bytearray(1024)  # one setup sector beside the boot sector
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, len(kernel) // 16)
    setup[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x214, 0x10_0000)
    struct.pack_into("<II", setup, 0x22C, 0x7FFF_FFFF, 0x20_0000)
    setup[0x234] = 1
    struct.pack_into("<HI", setup, 0x236, xloadflags, 2047)
    struct.pack_into("<II", setup, 0x248, 0x300, len(payload))
    struct.pack_into("<QI", setup, 0x258, MAIN, init_size)
    return bytes(setup) + kernel
