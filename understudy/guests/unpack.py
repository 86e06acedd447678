"""Compressed data unpacked in steps, none of which gives more than a bounded piece.

Source: RFC 1952 (gzip), RFC 8878 (Zstandard), the XZ file format, bzip2; LZ4's legacy frame from
Linux, lib/decompress_unlz4.c.

Invariants: whatever the data say, a step costs at most `MOST` bytes and a dictionary or window of
`WINDOW`; every error of a library is an `UnpackError` from here, and each of these is a GuestError.
"""

import bz2
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import lz4.block  # type: ignore[import-untyped]
import zstandard

from understudy.guests.entry import GuestError

MOST: Final = 16 << 20
WINDOW: Final = 1 << 27  # Linux's own limit for Zstandard
XZ_MEMORY: Final = 1 << 28  # with a dictionary of so much
STEP: Final = 1 << 16  # of input, if the library can be told how much to give
ZSTD_STEP: Final = 512  # if not: a block has at least 4 bytes and gives at most 128 KiB
LZ4_BLOCK: Final = 8 << 20
ERRORS: Final = (
    EOFError, MemoryError, OSError, OverflowError, RuntimeError, ValueError,
    lz4.block.LZ4BlockError, lzma.LZMAError, struct.error, tarfile.TarError, zlib.error,
    zstandard.ZstdError,
)  # fmt: skip
"""What the libraries raise for data that are not as they should be."""


class UnpackError(GuestError):
    """Data that cannot be unpacked; the text says how they are damaged."""


class OutOfData(UnpackError):
    """The data end, and the stream does not."""


@contextmanager
def unharmed() -> Iterator[None]:
    """What a library raises in here means that the data are damaged."""
    try:
        yield
    except GuestError:
        raise
    except ERRORS as error:
        raise UnpackError(str(error) or type(error).__name__) from None


class Stream(Protocol):
    """One compressed stream, unpacked piece by piece."""

    eof: bool
    end: int  # once `eof` is set: where in the data it ends

    def piece(self) -> bytes:
        """The next bytes, at most `MOST`, perhaps none; UnpackError."""


def stream(method: str, data: bytes, at: int = 0) -> Stream | None:
    """The stream that begins at `at`; None for a method that is not known here."""
    match method:
        case "gzip":
            return _Gzip(data, at)
        case "XZ" | "LZMA":
            return _Limited(lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY), data, at)
        case "bzip2":
            return _Limited(bz2.BZ2Decompressor, data, at)
        case "ZSTD":
            return _Zstd(data, at)
        case "LZ4":
            return _Lz4Legacy(data, at)
    return None


class _Limiting(Protocol):
    """What `lzma` and `bz2` have."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


class _Input:
    """Data, read in steps."""

    step = 256  # at first: many streams are much shorter
    longest = STEP

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.eof, self.end = False, at

    def more(self) -> bytes:
        if self.at >= len(self.data):
            raise OutOfData(f"its compressed data has no end in {len(self.data)} bytes")
        taken = self.data[self.at : self.at + self.step]
        self.at += len(taken)
        self.step = min(2 * self.step, self.longest)
        return taken

    def ends(self, unused: int) -> None:
        self.eof, self.end = True, self.at - unused


class _Limited(_Input):
    def __init__(self, make: Callable[[], _Limiting], data: bytes, at: int) -> None:
        super().__init__(data, at)
        self.inflater = make()

    def piece(self) -> bytes:
        with unharmed():
            given = self.more() if self.inflater.needs_input else b""
            out = self.inflater.decompress(given, max_length=MOST)
            if self.inflater.eof:
                self.ends(len(self.inflater.unused_data))
            return out


class _Gzip(_Input):
    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(data, at)
        self.inflater = zlib.decompressobj(wbits=31)

    def piece(self) -> bytes:
        with unharmed():
            out = self.inflater.decompress(self.inflater.unconsumed_tail or self.more(), MOST)
            if self.inflater.eof:
                self.ends(len(self.inflater.unused_data))
            return out


class _Zstd(_Input):
    longest = ZSTD_STEP

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(data, at)
        self.inflater = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()

    def piece(self) -> bytes:
        with unharmed():
            out = self.inflater.decompress(self.more())
            if self.inflater.eof:
                self.ends(len(self.inflater.unused_data))
            return out


class _Lz4Legacy(_Input):
    """A magic, then blocks of (compressed size, data), 8 MiB each at most; ends with the data."""

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(data, at + 4)

    def piece(self) -> bytes:
        with unharmed():
            (size,) = struct.unpack_from("<I", self.data, self.at)
            if size > len(self.data) - self.at - 4:
                raise OutOfData("a block of it ends beyond the data")
            block = self.data[self.at + 4 : self.at + 4 + size]
            out: bytes = lz4.block.decompress(block, uncompressed_size=LZ4_BLOCK)
            self.at += 4 + size
            if self.at >= len(self.data):
                self.ends(0)
            return out


class Plain(_Input):
    """Data that are not compressed."""

    def piece(self) -> bytes:
        out = self.more()
        if self.at == len(self.data):
            self.ends(0)
        return out


class Reader:
    """A stream as a file that is read once, of at most `limit` bytes; UnpackError beyond."""

    def __init__(self, source: Stream, limit: int) -> None:
        self.source, self.left, self.limit = source, limit, limit
        self.kept, self.at = b"", 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or what is left."""
        parts: list[bytes] = []
        while size:
            if self.at == len(self.kept):
                if self.source.eof:
                    break
                self.kept, self.at = self.source.piece(), 0
                self.left -= len(self.kept)
                if self.left < 0:
                    raise UnpackError(f"it unpacks to more than {self.limit >> 20} MiB")
                continue
            taken = self.kept[self.at : self.at + size]
            self.at += len(taken)
            size -= len(taken)
            parts.append(taken)
        return b"".join(parts)
