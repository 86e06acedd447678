"""Decompress what a kernel build compressed: the payload of a bzImage, or a gzipped kernel file.

Source: Linux, Documentation/arch/x86/boot.rst, "payload_offset"; scripts/Makefile.lib of Linux
says that each method but gzip is followed by the uncompressed size as four bytes.
Invariant: no more than `LIMIT`, and than the size that the payload states, is ever unpacked.
"""

import struct

from understudy.guests.entry import GuestError
from understudy.guests.unpack import OutOfData, Stream, UnpackError, stream

LIMIT = 1 << 30  # no kernel is larger; a guest's file must not fill the computer's memory

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
    source = None if method is None else stream(method, body)
    if source is None:
        kind = method or "unknown"
        raise GuestError(f"{what}: cannot decompress a payload of kind {kind}")
    limit = LIMIT if size is None else min(LIMIT, size)
    try:
        out = _all(source, limit, is_open=method == "LZMA")
    except OutOfData:
        raise GuestError(f"{what}: the {method} payload is truncated") from None
    except UnpackError as error:
        raise GuestError(f"{what}: the {method} payload is damaged ({error})") from None
    if len(out) > LIMIT or (size or 0) > LIMIT:
        raise GuestError(f"{what}: the payload is larger than {LIMIT >> 20} MiB")
    if size is not None and len(out) != size:
        got = f"more than {size}" if len(out) > size else len(out)
        raise GuestError(
            f"{what}: the {method} payload is damaged (expected {size} bytes, got {got})"
        )
    return out


def _all(source: Stream, limit: int, *, is_open: bool) -> bytes:
    """Everything in a stream; a little more than `limit` if there is more.

    is_open: the format may end without a mark.
    """
    pieces, total = list[bytes](), 0
    while not source.eof and total <= limit:
        try:
            pieces.append(source.piece())
        except OutOfData:
            if not is_open:
                raise
            break
        total += len(pieces[-1])
    if total > limit:  # not joined: it is thrown away
        return bytes(limit + 1)
    return b"".join(pieces)
