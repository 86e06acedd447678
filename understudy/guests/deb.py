"""Debian packages, read without any tool: an `ar` archive with a tar archive in it.

Source: deb(5).
"""

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import zstandard

from understudy.guests.entry import GuestError

AR_MAGIC = b"!<arch>\n"


def files(package: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The first file matching each pattern, by pattern ("boot/vmlinuz-*").

    Reads no further than it must: kernels come before their thousands of modules.
    """
    wanted = list(patterns)
    found: dict[str, bytes] = {}
    try:
        with _data(package.read_bytes()) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                for pattern in wanted:
                    if pattern not in found and member.isfile() and path.match(pattern):
                        stream = archive.extractfile(member)
                        found[pattern] = stream.read() if stream else b""
                if len(found) == len(wanted):
                    return found
    except (
        EOFError,
        ValueError,
        lzma.LZMAError,
        tarfile.TarError,
        zlib.error,
        zstandard.ZstdError,
    ) as error:
        raise GuestError(f"the package {package.name} is damaged: {error}") from None
    missing = [pattern for pattern in wanted if pattern not in found]
    raise GuestError(f"the package {package.name} has no {' and no '.join(missing)}")


def _data(package: bytes) -> tarfile.TarFile:
    """The tar archive with the package's files, as a stream."""
    if not package.startswith(AR_MAGIC):
        raise ValueError("it is no ar archive")
    at = len(AR_MAGIC)
    while at + 60 <= len(package):
        name = package[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(package[at + 48 : at + 58])
        body = package[at + 60 : at + 60 + size]
        if len(body) != size or size < 0:
            raise ValueError("it is truncated")
        if name == "data.tar.zst":
            reader = zstandard.ZstdDecompressor().stream_reader(body)
            return tarfile.open(fileobj=reader, mode="r|")
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(body), mode="r|*")
        at += 60 + size + (size & 1)
    raise ValueError("it has no data.tar")
