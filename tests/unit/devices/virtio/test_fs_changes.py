"""A virtio file system whose folder changes on the computer while its guest uses it.

Source: docs/reference/folders.md, "Freshness".
"""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "shared" / "sub").mkdir(parents=True)
    (tmp_path / "shared" / "a").write_bytes(b"content of a")
    (tmp_path / "shared" / "sub" / "b").touch()
    return tmp_path / "shared"


@pytest.fixture
def w(place: Path) -> Iterator[FuseDriver]:
    with closing(FuseDriver(place, is_writable=True)) as made:
        yield made


def test_a_file_that_is_replaced_while_it_is_open(w: FuseDriver, place: Path) -> None:
    a = w.look("a").node
    handle = w.open(a, os.O_RDWR)
    (place / "next").write_bytes(b"the next one")
    (place / "next").rename(place / "a")
    assert w.read(handle, 0, 100) == b"content of a"
    assert w.ask(Op.GETATTR, a, bytes(16))[0] == 0, "of what is open"
    again = w.look("a")
    assert again.node != a and w.read(w.open(again.node), 0, 100) == b"the next one"
    body = fuse.SETATTR_IN.pack(fuse.SIZE, 0, 0, 3, *[0] * 12)
    w.wants(Op.SETATTR, a, body)
    assert w.read(handle, 0, 100) == b"con" and (place / "a").read_bytes() == b"the next one"
    w.wants(Op.RELEASE, ROOT, fuse.RELEASE_IN.pack(handle, 0, 0, 0))
    assert w.ask(Op.GETATTR, a, bytes(16))[0] == errno.ESTALE


def test_a_file_that_may_not_be_written_is_resized_by_who_has_it_open(
    w: FuseDriver, place: Path
) -> None:
    body = fuse.CREATE_IN.pack(os.O_WRONLY | os.O_EXCL, 0o444, 0, 0) + b"new\0"
    data = w.wants(Op.CREATE, ROOT, body)
    w.wants(
        Op.SETATTR, fuse.ENTRY.unpack_from(data)[0], fuse.SETATTR_IN.pack(8, 0, 0, 7, *[0] * 12)
    )
    assert (place / "new").stat().st_size == 7


def test_a_folder_that_was_moved_out_is_out(w: FuseDriver, place: Path) -> None:
    sub = w.look("sub").node
    (place / "sub").rename(place.parent / "moved")
    assert w.ask(Op.LOOKUP, sub, b"b\0")[0] == errno.ESTALE
