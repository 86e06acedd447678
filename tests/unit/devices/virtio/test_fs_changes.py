"""A virtio file system whose folder changes on the computer while, and as, its guest uses it.

Source: docs/reference/folders.md, "Freshness".
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.backends import system_calls
from understudy.backends.folder import EXCHANGE
from understudy.backends.folder_names import LONGEST_PATH, Names, Node
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


@pytest.mark.parametrize("how", ["write", "size", "truncate", "truncate to be read"])
@pytest.mark.parametrize("rights", [stat.S_ISUID, stat.S_ISGID, stat.S_ISUID | stat.S_ISGID])
def test_a_file_that_gives_rights_gives_none_once_it_is_changed(
    w: FuseDriver, place: Path, how: str, rights: int
) -> None:
    a = w.look("a").node
    reading, writing = w.open(a), w.open(a, os.O_RDWR)
    (place / "a").chmod(rights | 0o755)
    assert w.write(reading, 0, b"new")[0] == errno.EBADF
    assert stat.S_IMODE((place / "a").stat().st_mode) == rights | 0o755, "it is as it was"
    match how:
        case "write":
            assert w.write(writing, 0, b"new")[0] == 0
        case "size":
            w.wants(Op.SETATTR, a, fuse.SETATTR_IN.pack(fuse.SIZE, 0, 0, 3, *[0] * 12))
        case "truncate":
            w.open(a, os.O_RDWR | os.O_TRUNC)
        case _:
            w.wants(Op.RELEASE, ROOT, fuse.RELEASE_IN.pack(writing, 0, 0, 0))
            w.open(a, os.O_TRUNC)
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o755
    sizes = {"write": len(b"content of a"), "size": 3}
    assert (place / "a").stat().st_size == sizes.get(how, 0)


def meanwhile(patch: pytest.MonkeyPatch, *moves: tuple[Path, Path]) -> None:
    """The next renaming finds that somebody has moved these, after its folders were opened."""
    real, waiting = system_calls.rename, list(moves)

    def rename(old: int, name: bytes, new: int, to: bytes, flags: int) -> None:
        while waiting:
            source, aim = waiting.pop(0)
            source.rename(aim)
        real(old, name, new, to, flags)

    patch.setattr(system_calls, "rename", rename)


def test_a_folder_that_is_moved_out_while_what_is_above_it_is_moved_in(
    w: FuseDriver, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "sub" / "y").mkdir()
    sub, y = w.look("sub").node, w.look("sub", "y").node
    meanwhile(monkeypatch, (place / "sub" / "y", place / "y"))
    w.wants(Op.RENAME, ROOT, fuse.RENAME_IN.pack(y) + b"sub\0z\0")
    assert (place / "y" / "z" / "b").exists()
    for node in (sub, y):
        assert w.ask(Op.GETATTR, node, bytes(16))[0] == errno.ESTALE
    assert w.look("y", "z", "b").node > y


@pytest.mark.parametrize("is_swapped", [False, True])
def test_folders_that_are_exchanged_while_one_is_moved_out_of_the_other(
    w: FuseDriver, place: Path, monkeypatch: pytest.MonkeyPatch, is_swapped: bool
) -> None:
    (place / "sub" / "y" / "z").mkdir(parents=True)
    sub, y = w.look("sub").node, w.look("sub", "y").node
    w.look("sub", "y", "z")
    meanwhile(monkeypatch, (place / "sub" / "y", place / "y"))
    one, other = (ROOT, b"sub\0"), (y, b"z\0")
    if is_swapped:
        one, other = other, one
    body = fuse.RENAME2_IN.pack(other[0], EXCHANGE, 0) + one[1] + other[1]
    w.wants(Op.RENAME2, one[0], body)
    assert (place / "y" / "z" / "b").exists()
    for node in (sub, y):
        assert w.ask(Op.GETATTR, node, bytes(16))[0] == errno.ESTALE
    assert w.look("y", "z", "b").node and stat.S_ISDIR(w.look("sub").mode)


def test_a_folder_of_another_name_is_moved_into_what_had_the_name(
    w: FuseDriver, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub = w.look("sub").node
    (place / "next").mkdir()
    meanwhile(monkeypatch, (place / "sub", place / "old"), (place / "next", place / "sub"))
    w.wants(Op.RENAME, ROOT, fuse.RENAME_IN.pack(sub) + b"sub\0x\0")
    assert (place / "old" / "x").is_dir()
    assert w.ask(Op.GETATTR, sub, bytes(16))[0] == errno.ESTALE


def test_of_a_path_no_more_is_looked_at_than_it_can_have() -> None:
    names = Names()
    node: Node | None = None
    for number in range(2, 2 + LONGEST_PATH):
        node = Node(number, node, b"x", stat.S_IFDIR)
    assert node is not None
    with pytest.raises(OSError, match="too long") as found:  # and not that its top has gone
        names.path(node)
    assert found.value.errno == errno.ENAMETOOLONG
