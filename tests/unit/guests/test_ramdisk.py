"""Truncated initrds are refused, whole ones of every kind are not."""

import gzip
import lzma

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.guests.flat_memory import MIB, FlatMemory
from tests.unit.guests.kernels import elf64
from tests.unit.guests.test_payload import zstd_bomb
from understudy.guests import GuestError, initramfs, load, payload, ramdisk

PLAIN = initramfs.build(b"\x7fELF....\0\0[\0[[\0cat\0mount\0sh\0\0more" + bytes(range(256)) * 20)
WHOLE = {
    "plain": PLAIN,
    "gzip": gzip.compress(PLAIN),
    "XZ": lzma.compress(PLAIN),
    "ZSTD": zstandard.compress(PLAIN),
    "two plain": PLAIN + PLAIN,
    "microcode first": PLAIN + bytes(512) + zstandard.compress(PLAIN) + bytes(64),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole(kind: str) -> None:
    ramdisk.check(WHOLE[kind])


@pytest.mark.parametrize("kind", WHOLE)
def test_truncated(kind: str) -> None:
    data = WHOLE[kind].rstrip(b"\0")
    for length in (len(data) // 2 + 600, len(data) - 50):
        with pytest.raises(GuestError, match=r"initrd is (truncated|damaged)"):
            ramdisk.check(data[:length])


@given(st.binary(max_size=300), st.sampled_from([b"", b"070701", PLAIN[:110], b"\x1f\x8b\x08"]))
def test_any_bytes_are_safe(data: bytes, start: bytes) -> None:
    try:
        ramdisk.check(start + data)
    except GuestError as error:
        assert "\n" not in str(error)


def test_loader_checks_it() -> None:
    with pytest.raises(GuestError, match="the initrd is truncated: it has 3000 bytes and the file"):
        load(FlatMemory(64 * MIB), elf64(), initrd=PLAIN[:3000])


def test_the_work_grows_with_the_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "LIMIT", 1 << 20)
    ramdisk.check(zstd_bomb(1 << 14)[:-4])  # 2 GB and no end: the kernel may find that out
    trailer = initramfs.cpio({})
    for many in (trailer * 20_000, gzip.compress(b"") * 20_000):
        reads = Counted(many)
        ramdisk.check(reads)
        assert reads.copied < 200 * len(many)


class Counted(bytes):
    """Counts the bytes that are taken out of it."""

    copied = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def, override]
        out = super().__getitem__(key)
        self.copied += len(out) if isinstance(out, bytes) else 1
        return out
