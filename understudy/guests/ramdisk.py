"""Whether an initrd is whole, found out before a guest has to.

An initrd is one or more cpio archives, each plain or compressed, with zeros between (Linux,
Documentation/driver-api/early-userspace/buffer-format.rst).  A kernel that gets half of one
panics a minute later with a line about something else.
Invariants: only what is surely cut off is refused; formats not known here, and what comes after
`payload.LIMIT` unpacked bytes or `MOST_ARCHIVES`, are left to the kernel; the work grows with the
file alone.
"""

import re
from typing import Final

from understudy.guests import payload
from understudy.guests.entry import GuestError
from understudy.guests.unpack import OutOfData, UnpackError, stream

CPIO_MAGICS = (b"070701", b"070702")
HEADER_BYTES = 110
MOST_ARCHIVES: Final = 10_000
METHODS = ("gzip", "XZ", "ZSTD")
NOT_ZERO = re.compile(rb"[^\0]")


def check(data: bytes, what: str = "the initrd") -> int:
    """Raise GuestError if an archive in `data` ends before its time.

    What was seen of it, in bytes as they are when unpacked.
    """
    at, unpacked = 0, 0
    for _ in range(MOST_ARCHIVES):
        found = NOT_ZERO.search(data, at)
        if found is None:
            break
        at = found.start()
        if data.startswith(CPIO_MAGICS, at):
            end = _cpio_end(data, at, what)
            unpacked, at = unpacked + end - at, end
            continue
        method = payload.compression(data[at : at + 6])
        source = stream(method, data, at) if method in METHODS else None
        if source is None:
            return unpacked + len(data) - at
        try:
            while not source.eof and unpacked < payload.LIMIT:
                unpacked += len(source.piece())
        except OutOfData as error:
            raise GuestError(f"{what} is truncated: {error}") from None
        except UnpackError as error:
            raise GuestError(f"{what} is damaged: {error}") from None
        if not source.eof:
            break
        at = source.end
    return unpacked


def _cpio_end(data: bytes, start: int, what: str) -> int:
    """Where one archive ends, after its trailer."""
    at = start
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
        body_at = name_at + name_size + (start - name_at - name_size) % 4
        if body_at + size > len(data):
            raise GuestError(
                f"{what} is truncated: it has {len(data)} bytes and the file "
                f"{name.rstrip(bytes(1)).decode(errors='replace')!r} in it goes to {body_at + size}"
            )
        at = body_at + size + (start - body_at - size) % 4
        if name == b"TRAILER!!!\0":
            return at
    return len(data) if at >= len(data) or any(data[at:]) else at
