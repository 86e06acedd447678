"""Decompression of kernel payloads."""

import bz2
import contextlib
import gzip
import lzma
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.guests.kernels import compress
from understudy.guests import GuestError, payload, unpack

SMALL = {
    "bzip2": bz2.compress(bytes(range(251))),
    "LZMA": lzma.compress(bytes(range(251)), format=lzma.FORMAT_ALONE),
}
KNOWN = ("gzip", "XZ", "LZ4", "ZSTD")
LARGE = bytes(range(251)) * 80_000  # 20 MB: three blocks of LZ4


@pytest.mark.parametrize("method", ["gzip", "XZ", "LZ4", "ZSTD"])
@pytest.mark.parametrize("data", [b"a kernel", LARGE], ids=["small", "large"])
def test_round_trip(method: str, data: bytes) -> None:
    packed = compress(method, data)
    assert payload.compression(packed) == method
    assert payload.decompress(packed, "it") == data


@pytest.mark.parametrize("method", ["XZ", "LZ4", "ZSTD"])
def test_size_at_the_end_is_checked(method: str) -> None:
    packed = bytearray(compress(method, b"a kernel" * 50))
    packed[-4] ^= 1
    with pytest.raises(GuestError, match="expected 401 bytes, got 400"):
        payload.decompress(bytes(packed), "it")


@pytest.mark.parametrize("method", ["gzip", "XZ", "LZ4", "ZSTD"])
def test_damage_and_truncation_are_noticed(method: str) -> None:
    packed = compress(method, LARGE[:200_000])
    for broken in (packed[: len(packed) // 2], packed[:12], packed[:30] + b"\xff" * 200):
        with pytest.raises(GuestError, match=r"^it: "):
            payload.decompress(broken, "it")


def test_bombs_stop_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "LIMIT", 1 << 20)
    large = zstandard.compress(bytes(2 << 20))
    for packed in (gzip.compress(bytes(2 << 20)), large + struct.pack("<I", 2 << 20)):
        with pytest.raises(GuestError, match="larger than 1 MiB"):
            payload.decompress(packed, "it")
    with pytest.raises(GuestError, match="expected 5 bytes, got more than 5"):
        payload.decompress(large + struct.pack("<I", 5), "it")


def zstd_bomb(blocks: int) -> bytes:
    """A Zstandard frame of so many blocks, each one byte repeated 128 Ki times."""
    block = struct.pack("<I", 131_072 << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", 131_072 << 3 | 1 << 1 | 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd" + bytes([0, 7 << 3]) + block * (blocks - 1) + last


BOMBS = {
    "gzip": gzip.compress(bytes(64 << 20)),
    "XZ": lzma.compress(bytes(64 << 20), preset=0),
    "LZMA": lzma.compress(bytes(64 << 20), format=lzma.FORMAT_ALONE, preset=0),
    "bzip2": bz2.compress(bytes(64 << 20)),
    "ZSTD": zstd_bomb(512),
    "LZ4": compress("LZ4", bytes(64 << 20)),
}


@pytest.mark.parametrize("method", BOMBS)
def test_no_step_unpacks_more_than_its_bound(method: str) -> None:
    source = unpack.stream(method, BOMBS[method])
    assert source is not None
    most = total = 0
    while not source.eof and total < 64 << 20:
        size = len(source.piece())
        most, total = max(most, size), total + size
    assert (most <= unpack.MOST, total) == (True, 64 << 20)


@given(
    st.sampled_from(sorted(BOMBS)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_errors_of_every_library_are_ours(method: str, changes: list[tuple[int, int]]) -> None:
    packed = bytearray(
        compress(method, bytes(range(251)) * 9) if method in KNOWN else SMALL[method]
    )
    for at, value in changes:
        packed[at % len(packed)] = value
    with contextlib.suppress(GuestError):
        payload.decompress(bytes(packed), "it", sized=method in KNOWN)


def test_a_dictionary_or_window_has_a_bound() -> None:
    huge = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}]
    with pytest.raises(GuestError, match="Memory usage limit"):
        payload.decompress(lzma.compress(b"x", filters=huge), "it", sized=False)
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, (28 - 10) << 3]) + b"\x09\0\0x"
    with pytest.raises(GuestError, match="requires too much memory"):
        payload.decompress(frame, "it", sized=False)


def test_unknown_methods_are_named() -> None:
    assert payload.compression(b"\x7fELF") is None
    with pytest.raises(GuestError, match="cannot decompress a payload of kind LZO"):
        payload.decompress(b"\x89LZO....", "it")
