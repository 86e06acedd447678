"""A hostile guest and a restless computer: names become links, folders move, and nothing outside of
a shared folder is read or changed.

Source: ours.
"""

import os
import shutil
import struct
import tempfile
import threading
from contextlib import closing, suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.devices.virtio.fuse import FuseDriver
from understudy.backends import system_calls
from understudy.backends.folder import EXCHANGE
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_messages import Op

SECRET = b"what nobody may see"
NAMES = ("a", "b", "sub", "secret", "..", ".", "sub/a", "../outside", "outside", "")
NAME = st.sampled_from(NAMES)
NODE = st.integers(1, 9)
WORD = st.integers(0, 12)
LINKS = ("../outside", "../outside/secret", "../../outside", "/etc", "..", "a", "sub")
GUEST = st.tuples(st.just("guest"), st.sampled_from(list(Op)), NODE, WORD, NAME, NAME)
COMPUTER = st.tuples(
    st.just("computer"), st.sampled_from(["link", "folder", "file", "away", "back"]),
    st.sampled_from(["a", "b", "sub", "sub/a", "sub/b"]), st.sampled_from(LINKS),
)  # fmt: skip


def body_of(op: Op, word: int, name: str, other: str) -> bytes:
    """What goes behind the header of a request, so that it may succeed."""
    one, two = name.encode() + b"\0", other.encode() + b"\0"
    match op:
        case Op.LOOKUP | Op.UNLINK | Op.RMDIR:
            return one
        case Op.SYMLINK:
            return one + two
        case Op.MKNOD:
            return fuse.MKNOD_IN.pack(0o100666, 0, 0, 0) + one
        case Op.MKDIR:
            return fuse.MKDIR_IN.pack(0o777, 0) + one
        case Op.CREATE:
            flags = os.O_RDWR | (os.O_TRUNC if word % 2 else 0)
            return fuse.CREATE_IN.pack(flags, 0o666, 0, 0) + one
        case Op.RENAME | Op.LINK:
            return struct.pack("<Q", word) + one + (two if op is Op.RENAME else b"")
        case Op.RENAME2:
            return fuse.RENAME2_IN.pack(word, word % 3, 0) + one + two
        case Op.OPEN | Op.OPENDIR:
            return fuse.OPEN_IN.pack((os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC)[word % 3], 0)
        case Op.SETATTR:
            valid = word % 10 | (fuse.ATIME | fuse.MTIME if word > 5 else 0)
            return fuse.SETATTR_IN.pack(valid, 0, 0, 5, *[0] * 7, 0o777, 0, 0, 0, 0)
        case Op.WRITE:
            return fuse.READ_IN.pack(word, 0, 5, 0, 0, 0, 0) + b"guest"
        case _:
            return fuse.READ_IN.pack(word, 0, 4096, 0, 0, 0, 0)


def change(place: Path, what: str, name: str, link: str) -> None:
    """What somebody on the computer does, if it can be done."""
    at = place / name
    if at.parent.is_symlink():
        return  # who does this does it in the folder
    with suppress(OSError):
        if what == "away":
            at.rename(place.parent / "moved")
        elif what == "back":
            (place.parent / "moved").rename(at)
        else:
            if at.is_dir() and not at.is_symlink():
                shutil.rmtree(at)
            else:
                at.unlink(missing_ok=True)
            if what == "link":
                at.symlink_to(link)
            elif what == "folder":
                at.mkdir()
            else:
                at.write_bytes(b"file")


def content(top: Path) -> dict[str, tuple[int, int, bytes]]:
    """All under it, with permissions and times."""
    return {
        str(path): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in (top, *top.rglob("*"))
    }


@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(GUEST, GUEST, GUEST, COMPUTER), max_size=60))
def test_nothing_outside_is_read_or_changed(script: list[tuple[str, ...]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        outside, place = Path(base).resolve() / "outside", Path(base).resolve() / "shared"
        (outside / "sub").mkdir(parents=True)
        for name in ("secret", "a", "b", "sub/a"):
            (outside / name).write_bytes(SECRET)
        (place / "sub").mkdir(parents=True)
        for name in ("a", "b", "sub/a", "sub/b"):
            (place / name).write_bytes(b"inside")
        before = content(outside)
        with closing(FuseDriver(place, is_writable=True)) as d:
            for name in ("a", "b", "sub"):
                d.look(name)
            d.look("sub", "a")
            for who, *what in script:
                if who == "computer":
                    change(place, *what)
                    continue
                op, node, word, name, other = what
                if op not in fuse.SILENT:
                    d.ask(int(op), int(node), body_of(Op(op), int(word), name, other), 4096)
                assert SECRET not in d.memory.ram
        assert content(outside) == before


def test_a_folder_that_is_exchanged_for_a_link_all_the_time() -> None:
    """Another thread does nothing else; each request sees the one or the other, nothing beyond."""
    with tempfile.TemporaryDirectory() as base:
        outside, place = Path(base) / "outside", Path(base) / "shared"
        for top in (outside, place / "sub"):
            top.mkdir(parents=True)
            (top / "a").write_bytes(SECRET if top is outside else b"inside")
        (place / "link").symlink_to("../outside")
        over = threading.Event()
        folder = os.open(place, os.O_PATH)

        def exchange() -> None:
            while not over.wait(0.0001):
                system_calls.rename(folder, b"sub", folder, b"link", EXCHANGE)

        thread = threading.Thread(target=exchange)
        with closing(FuseDriver(place, is_writable=True)) as d:
            thread.start()
            try:
                found = [once(d) for _ in range(1000)]
                while len(set(found)) < 2:
                    found.append(once(d))
            finally:
                over.set()
                thread.join()
                os.close(folder)
        assert (outside / "a").read_bytes() == SECRET and [*outside.iterdir()] == [outside / "a"]


def once(d: FuseDriver) -> bool:
    """Whether a file in the folder could be read and written, from the top on."""
    error, data = d.ask(Op.LOOKUP, 1, b"sub\0")
    assert not error
    sub = fuse.ENTRY.unpack_from(data)[0]
    error, data = d.ask(Op.LOOKUP, sub, b"a\0")
    is_read = False
    if not error:
        node = fuse.ENTRY.unpack_from(data)[0]
        error, data = d.ask(Op.OPEN, node, fuse.OPEN_IN.pack(os.O_RDWR, 0))
        if not error:
            handle = fuse.OPEN_OUT.unpack(data)[0]
            assert d.read(handle, 0, 100) == b"inside"
            d.wants(Op.RELEASE, 1, fuse.RELEASE_IN.pack(handle, 0, 0, 0))
            is_read = True
    d.ask(Op.MKNOD, sub, fuse.MKNOD_IN.pack(0o100666, 0, 0, 0) + b"new\0")
    d.ask(Op.UNLINK, sub, b"new\0")
    d.put(0x14, 0, 1)  # it forgets all numbers
    d.start()
    return is_read
