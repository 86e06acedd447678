"""Decompression of kernel payloads."""

import gzip

import pytest
import zstandard

from tests.unit.guests.kernels import compress
from understudy.guests import GuestError, payload

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
    for packed in (gzip.compress(bytes(2 << 20)), zstandard.compress(bytes(2 << 20)) + bytes(4)):
        with pytest.raises(GuestError, match="larger than"):
            payload.decompress(packed, "it")


def test_unknown_methods_are_named() -> None:
    assert payload.compression(b"\x7fELF") is None
    with pytest.raises(GuestError, match="cannot decompress a payload of kind LZO"):
        payload.decompress(b"\x89LZO....", "it")
