"""What a package may cost that says it holds everything."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.guests.kernels import compress
from tests.unit.guests.test_payload import zstd_bomb
from understudy.guests import GuestError, deb


def package(folder: Path, body: bytes, name: str = "data.tar") -> Path:
    """An ar archive with one member."""
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
    path = folder / "it.deb"
    path.write_bytes(deb.AR_MAGIC + head + body)
    return path


def tar(*members: tuple[str, bytes, str]) -> bytes:
    """(name, type, what it links to) of each; files have one byte."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, kind == tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(b"x") if info.size else None)
    return out.getvalue()


def test_it_unpacks_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb, "LIMIT", 1 << 20)
    path = package(tmp_path, zstd_bomb(1 << 14), "data.tar.zst")
    with pytest.raises(GuestError, match="unpacks to more than 1 MiB"):
        deb.tree(path)
    large = bytearray(tar(("a", tarfile.REGTYPE, "")))
    large[124:136] = b"77777777777\0"  # the member says that it has 8 GB
    large[148:156] = b"%06o\0 " % (sum(large[:148]) + sum(large[156:512]) + 8 * 32)
    for damaged in (bytes(large), bytes(large) + bytes(2 << 20)):
        with pytest.raises(GuestError, match=r"package it\.deb is damaged"):
            deb.tree(package(tmp_path, damaged))


@pytest.mark.parametrize(
    "members",
    [
        lambda: [(f"{n}", tarfile.DIRTYPE, "") for n in range(200)],
        lambda: (
            [("a", tarfile.REGTYPE, "")] + [(f"l{n}", tarfile.LNKTYPE, "a") for n in range(100)]
        ),
    ],
    ids=["many folders", "many links to one file"],
)
def test_it_has_no_more_files_than_that(
    members: Callable[[], list[tuple[str, bytes, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = package(tmp_path, tar(*members()))
    deb.tree(path)
    monkeypatch.setattr(deb, "MOST_FILES", 100)
    with pytest.raises(GuestError, match="over 100 files"):
        deb.tree(path)


@pytest.mark.parametrize("method", ["gzip", "XZ", "ZSTD"])
def test_any_damage_is_one_line(method: str, tmp_path: Path) -> None:
    packed = compress(method, tar(("a", tarfile.REGTYPE, "")))
    for at in range(0, len(packed), 3):
        broken = bytearray(packed)
        broken[at] ^= 0x55
        path = package(tmp_path, bytes(broken), "data.tar.any")
        try:
            deb.tree(path)
        except GuestError as error:
            assert "\n" not in str(error)
