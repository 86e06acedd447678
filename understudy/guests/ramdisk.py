"""Whether an initrd is whole, found out before a guest has to.

An initrd is one or more cpio archives, each plain or compressed, with zeros between (Linux,
Documentation/driver-api/early-userspace/buffer-format.rst).  A kernel that gets half of one
panics a minute later with a line about something else.
Invariant: only what is surely cut off is refused; formats not known here are left to the kernel.
"""

import lzma
import zlib
from typing import Protocol

import zstandard

from understudy.guests import payload
from understudy.guests.entry import GuestError

CPIO_MAGICS = (b"070701", b"070702")
HEADER_BYTES = 110
STEP = 1 << 20


class _Inflater(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def check(data: bytes, what: str = "the initrd") -> None:
    """Raise GuestError if an archive in `data` ends before its time."""
    rest = data
    while rest:
        rest = rest.lstrip(b"\0")
        if rest.startswith(CPIO_MAGICS):
            rest = rest[_cpio_length(rest, what) :]
            continue
        inflater = _inflater(payload.compression(rest))
        if inflater is None:
            return
        rest = _after(rest, inflater, what)


def _cpio_length(data: bytes, what: str) -> int:
    """The bytes of one archive, to the end of its trailer."""
    at = 0
    while data[at : at + 6] in CPIO_MAGICS:
        if len(data) - at < HEADER_BYTES:
            raise GuestError(f"{what} is truncated: its {len(data)} bytes end within a header")
        try:
            fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        except ValueError:
            return len(data)  # not a cpio after all
        size, name_size = fields[6], fields[11]
        name_at = at + HEADER_BYTES
        name = data[name_at : name_at + name_size]
        body_at = (name_at + name_size + 3) & ~3
        if body_at + size > len(data):
            raise GuestError(
                f"{what} is truncated: it has {len(data)} bytes and the file "
                f"{name.rstrip(bytes(1)).decode(errors='replace')!r} in it goes to {body_at + size}"
            )
        at = (body_at + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return at
    return len(data) if at >= len(data) or any(data[at:]) else at


def _inflater(method: str | None) -> _Inflater | None:
    match method:
        case "gzip":
            return zlib.decompressobj(wbits=31)
        case "XZ":
            return lzma.LZMADecompressor()
        case "ZSTD":
            return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        case _:
            return None


def _after(data: bytes, inflater: _Inflater, what: str) -> bytes:
    """What follows a compressed archive."""
    try:
        for start in range(0, len(data), STEP):
            piece = data[start : start + STEP]
            inflater.decompress(piece)
            if inflater.eof:
                return inflater.unused_data + data[start + STEP :]
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, MemoryError) as error:
        raise GuestError(f"{what} is damaged: {error}") from None
    raise GuestError(f"{what} is truncated: its compressed data has no end in {len(data)} bytes")
