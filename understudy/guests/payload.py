"""Decompress what a kernel build compressed: the payload of a bzImage, or a gzipped kernel file.

Source: Linux, Documentation/arch/x86/boot.rst, "payload_offset"; scripts/Makefile.lib of Linux
says that each method but gzip is followed by the uncompressed size as four bytes.
Invariant: the output never exceeds `LIMIT`, whatever the input says.
"""

import bz2
import lzma
import struct
import zlib

import lz4.block  # type: ignore[import-untyped]
import zstandard

from understudy.guests.entry import GuestError

LIMIT = 1 << 30  # no kernel is larger; a guest's file must not fill the computer's memory
LZ4_LEGACY_BLOCK = 8 << 20

MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "XZ",
    b"\x02\x21\x4c\x18": "LZ4",
    b"\x28\xb5\x2f\xfd": "ZSTD",
    b"BZh": "bzip2",
    b"\x5d\0\0": "LZMA",
    b"\x89LZO": "LZO",
}


def compression(data: bytes) -> str | None:
    """The name of the method, by the first bytes; None if it is none that Linux uses."""
    return next((name for magic, name in MAGICS.items() if data.startswith(magic)), None)


def can_decompress(data: bytes) -> bool:
    """Whether `decompress` knows the method."""
    return compression(data) not in (None, "LZO")


def decompress(data: bytes, what: str, sized: bool = True) -> bytes:
    """The original bytes.  `sized`: all but gzip end in the size, four bytes, which is checked."""
    method = compression(data)
    body, size = data, None
    if sized and method != "gzip" and len(data) > 8:
        body, size = data[:-4], int(struct.unpack("<I", data[-4:])[0])
    try:
        out = _inflate(method, body)
    except GuestError as error:
        raise GuestError(f"{what}: {error}") from None
    except (
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        ValueError,
        lzma.LZMAError,
        struct.error,
        zlib.error,
        zstandard.ZstdError,
    ) as error:
        raise GuestError(f"{what}: the {method} payload is damaged ({error})") from None
    if size is not None and len(out) != size:
        raise GuestError(
            f"{what}: the {method} payload is damaged (expected {size} bytes, got {len(out)})"
        )
    return out


def _inflate(method: str | None, body: bytes) -> bytes:
    match method:
        case "gzip":
            inflater = zlib.decompressobj(wbits=31)
            out, ended = inflater.decompress(body, LIMIT), inflater.eof
        case "XZ" | "LZMA":
            unxz = lzma.LZMADecompressor()
            out = unxz.decompress(body, LIMIT)
            ended = unxz.eof or method == "LZMA"
        case "bzip2":
            unbzip = bz2.BZ2Decompressor()
            out, ended = unbzip.decompress(body, LIMIT), unbzip.eof
        case "ZSTD":
            unzstd = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            pieces, total = [], 0
            for start in range(0, len(body), 1 << 16):  # in steps, so that the limit holds
                pieces.append(unzstd.decompress(body[start : start + (1 << 16)]))
                total += len(pieces[-1])
                if unzstd.eof or total > LIMIT:
                    break
            out, ended = b"".join(pieces), unzstd.eof
        case "LZ4":
            out, ended = _unlz4_legacy(body), True
        case _:
            raise GuestError(f"cannot decompress a payload of kind {method or 'unknown'}")
    if len(out) >= LIMIT:
        raise GuestError(f"the payload is larger than {LIMIT >> 20} MiB")
    if not ended:
        raise GuestError(f"the {method} payload is truncated")
    return out


def _unlz4_legacy(body: bytes) -> bytes:
    """The legacy frame: a magic, then blocks of (compressed size, data), 8 MiB each at most."""
    pieces, at, total = [], 4, 0
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        if size > len(body) - at - 4:
            raise GuestError("the LZ4 payload is truncated")
        block = body[at + 4 : at + 4 + size]
        pieces.append(lz4.block.decompress(block, uncompressed_size=LZ4_LEGACY_BLOCK))
        total += len(pieces[-1])
        if total > LIMIT:
            break
        at += 4 + size
    return b"".join(pieces)
