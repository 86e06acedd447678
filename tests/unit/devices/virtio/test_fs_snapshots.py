"""A virtio file system in a snapshot: what is known and open is so again, or one line says why not.

Source: docs/reference/folders.md, "Snapshots".
"""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"content of a")
    (tmp_path / "sub" / "b").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.fixture
def w(place: Path) -> Iterator[FuseDriver]:
    with closing(FuseDriver(place, is_writable=True)) as made:
        yield made


def saved_and_loaded(one: FuseDriver, other: FuseDriver) -> None:
    other.board.load(one.board.save())
    other.memory.ram[:] = one.memory.ram
    other.rings, other.unique = one.rings_in(other.memory), one.unique


def test_a_snapshot_goes_on_with_what_is_open(w: FuseDriver, place: Path) -> None:
    b = w.look("sub", "b").node
    handle = w.open(b, os.O_RDWR)
    listed = w.open(w.look("sub").node, op=Op.OPENDIR)
    with closing(FuseDriver(place, is_writable=True)) as other:
        saved_and_loaded(w, other)
        for one in (w, other):
            assert one.read(handle, 0, 2) == b"\0\1"
            assert one.look("sub", "b").node == b
            body = fuse.READ_IN.pack(listed, 0, 4096, 0, 0, 0, 0)
            assert b"b\0" in one.wants(Op.READDIR, ROOT, body)
        assert other.write(handle, 0, b"!")[0] == 0
        assert other.open(b) == w.open(b), "the next number is the same"


def test_a_snapshot_with_a_file_that_is_gone_is_refused_in_one_line(
    w: FuseDriver, place: Path
) -> None:
    w.open(w.look("a").node, os.O_RDWR)
    (place / "a").unlink()
    with (
        closing(FuseDriver(place, is_writable=True)) as other,
        pytest.raises(ValueError, match=r"the guest has 'a' of .* cannot be opened again: removed"),
    ):
        saved_and_loaded(w, other)
    (place / "a").touch()
    with (
        closing(FuseDriver(place)) as other,
        pytest.raises(ValueError, match="cannot be opened again: Read-only file system"),
    ):
        saved_and_loaded(w, other)


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("nodes", [1, 0, "", 0o40000, 1 << 64]), ("nodes", [9, 8, "61", 0o100000, 1]),
        ("nodes", [0, 1, "61", 0o100000, 1]), ("nodes", [999, 1, "61", 0o100000, 1]),
        ("nodes", [2, 1, "2e2e", 0o40000, 1]), ("nodes", [2, 1, "612f62", 0o100000, 1]),
        ("nodes", [2, 1, "61", 0o100000]), ("handles", [7, 6, 0]), ("handles", [999, 1, 0o200000]),
        ("handles", [7, 1, 1]), ("handles", [7, 1, 1 << 40]), ("handles", 7),
    ],
)  # fmt: skip
def test_a_hostile_snapshot_is_refused(w: FuseDriver, place: Path, key: str, row: Any) -> None:
    w.look("a")
    saved = w.folder.save()
    saved["following"] = 100
    saved[key] = [*saved[key], row]
    if key == "nodes" and row[0] == 2:
        saved["nodes"] = [one for one in saved["nodes"] if one[0] != 2] + [row]
    with pytest.raises(ValueError, match="snapshot:"):
        w.folder.load(saved)
    assert list(w.folder.handles) == []
