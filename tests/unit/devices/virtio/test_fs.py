"""The virtio file system, request by request, as a driver sends them and as none does.

Source: Linux, include/uapi/linux/fuse.h; Virtual I/O Device (VIRTIO) Version 1.2, "File System
Device".
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, Driver
from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.backends import folder as folders
from understudy.backends import folder_names
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs import HIGH_PRIORITY, REQUEST
from understudy.devices.virtio.fs_messages import Op
from understudy.devices.virtio.pci import NEEDS_RESET

SECRET = b"what nobody may see"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder, and beside it something that is not shared."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    shared = tmp_path / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "a").write_bytes(b"content of a")
    (shared / "sub" / "b").write_bytes(bytes(range(256)) * 64)
    (shared / "out").symlink_to("../outside/secret")
    return shared


@pytest.fixture
def d(place: Path) -> Iterator[FuseDriver]:
    with closing(FuseDriver(place)) as made:
        yield made


@pytest.fixture
def w(place: Path) -> Iterator[FuseDriver]:
    with closing(FuseDriver(place, is_writable=True)) as made:
        yield made


def test_a_driver_finds_the_tag_and_agrees_on_a_version(d: FuseDriver) -> None:
    tag = b"".join(d.get(0x2000 + n).to_bytes(4, "little") for n in range(0, 36, 4))
    assert tag.rstrip(b"\0") == b"share" and d.get(0x2000 + 36) == 1
    body = fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFF_FFFF)
    answer = fuse.INIT_OUT.unpack(d.wants(Op.INIT, 0, body))
    assert answer[:4] == (7, 31, 1 << 17, fuse.FLAGS) and answer[6:9] == (1 << 20, 1, 256)
    assert d.ask(Op.INIT, 0, fuse.INIT_IN.pack(6, 0, 0, 0))[0] == errno.EPROTO


def test_files_folders_and_links_are_found_and_read(d: FuseDriver) -> None:
    a, b, out = d.look("a"), d.look("sub", "b"), d.look("out")
    assert (a.size, stat.S_IFMT(a.mode), a.uid) == (12, stat.S_IFREG, 0)
    assert d.read(d.open(a.node), 3, 100) == b"tent of a"
    assert d.read(d.open(b.node), 256, 4096) == bytes(range(256)) * 16
    assert d.wants(Op.READLINK, out.node) == b"../outside/secret"
    assert d.ask(Op.LOOKUP, ROOT, b"none\0")[0] == errno.ENOENT
    assert d.ask(Op.LOOKUP, a.node, b"x\0")[0] == errno.ENOTDIR
    assert d.look("a").node == a.node


@pytest.mark.parametrize("op", [Op.READDIR, Op.READDIRPLUS])
def test_a_folder_is_listed_in_pieces(d: FuseDriver, place: Path, op: Op) -> None:
    for number in range(200):
        (place / "sub" / f"file-{number}").touch()
    sub = d.look("sub").node
    handle = d.open(sub, op=Op.OPENDIR)
    found: dict[bytes, int] = {}
    offset = 0
    while data := d.wants(op, sub, fuse.READ_IN.pack(handle, offset, 4096, 0, 0, 0, 0)):
        at = 0
        while at < len(data):
            number = 0
            if op is Op.READDIRPLUS:
                number = fuse.ENTRY.unpack_from(data, at)[0]
                at += fuse.ENTRY_BYTES
            _, offset, size, _ = fuse.DIRENT.unpack_from(data, at)
            at += fuse.DIRENT.size
            name = data[at : at + size]
            assert name not in found
            found[name] = number
            at += size + -size % 8
    assert len(found) == 203 and {b".", b"..", b"b"} <= found.keys()
    told = {name for name, number in found.items() if number}
    assert told == (found.keys() - {b".", b".."} if op is Op.READDIRPLUS else set())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"..\0", errno.EINVAL), (b".\0", errno.EINVAL), (b"\0", errno.EINVAL),
        (b"sub/b\0", errno.EINVAL), (b"/etc\0", errno.EINVAL), (b"../outside\0", errno.EINVAL),
        (b"x" * 256 + b"\0", errno.ENAMETOOLONG), (b"no end", errno.EINVAL), (b"", errno.EINVAL),
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_by_each_request(
    w: FuseDriver, place: Path, name: bytes, expected: int
) -> None:
    before = sorted(place.parent.rglob("*"))
    a = w.look("a").node
    for op, body in (
        (Op.LOOKUP, b""), (Op.UNLINK, b""), (Op.RMDIR, b""), (Op.SYMLINK, b""),
        (Op.MKDIR, fuse.MKDIR_IN.pack(0o755, 0)), (Op.LINK, fuse.LINK_IN.pack(a)),
        (Op.MKNOD, fuse.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0, 0)),
        (Op.CREATE, fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0)),
        (Op.RENAME, fuse.RENAME_IN.pack(ROOT) + b"a\0"),
    ):  # fmt: skip
        more = b"target\0" if op is Op.SYMLINK and name.endswith(b"\0") else b""
        assert w.ask(op, ROOT, body + name + more)[0] == expected, op
    assert sorted(place.parent.rglob("*")) == before


def test_a_link_out_of_the_folder_leads_nowhere(w: FuseDriver) -> None:
    out = w.look("out").node
    assert w.ask(Op.OPEN, out, fuse.OPEN_IN.pack(0, 0))[0] == errno.EACCES
    assert w.ask(Op.OPENDIR, out, fuse.OPEN_IN.pack(0, 0))[0] == errno.ENOTDIR
    assert w.ask(Op.LOOKUP, out, b"x\0")[0] == errno.ENOTDIR
    body = fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + b"out\0"
    assert w.ask(Op.CREATE, ROOT, body)[0] == errno.EACCES


def test_times_of_a_link_are_its_own(w: FuseDriver, place: Path) -> None:
    secret = place.parent / "outside" / "secret"
    before = secret.stat().st_mtime_ns, secret.stat().st_atime_ns
    body = fuse.SETATTR_IN.pack(fuse.ATIME | fuse.MTIME, *[0] * 4, 7, 8, *[0] * 9)
    w.wants(Op.SETATTR, w.look("out").node, body)
    assert (secret.stat().st_mtime_ns, secret.stat().st_atime_ns) == before
    assert (place / "out").lstat().st_mtime == 8
    body = fuse.SETATTR_IN.pack(fuse.MODE, *[0] * 15)
    assert w.ask(Op.SETATTR, w.look("out").node, body)[0] == errno.EOPNOTSUPP
    body = fuse.SETATTR_IN.pack(fuse.SIZE, *[0] * 15)
    assert w.ask(Op.SETATTR, w.look("out").node, body)[0] == errno.EACCES
    assert secret.read_bytes() == SECRET


def test_a_name_that_becomes_a_link_on_the_computer_leads_nowhere(
    w: FuseDriver, place: Path
) -> None:
    sub, a = w.look("sub").node, w.look("a").node
    b = w.look("sub", "b").node
    (place / "sub").rename(place / "old")
    (place / "sub").symlink_to("../outside")
    (place / "a").unlink()
    (place / "a").symlink_to("../outside/secret")
    for node in (a, b, sub):
        assert w.ask(Op.GETATTR, node, bytes(16))[0] == errno.ESTALE
        assert w.ask(Op.OPEN, node, fuse.OPEN_IN.pack(os.O_RDWR | os.O_TRUNC, 0))[0] in (
            errno.ESTALE, errno.EISDIR,
        )  # fmt: skip
    assert w.ask(Op.LOOKUP, sub, b"secret\0")[0] == errno.ESTALE
    assert w.ask(Op.UNLINK, sub, b"secret\0")[0] == errno.ESTALE
    body = fuse.SETATTR_IN.pack(fuse.SIZE, *[0] * 15)
    assert w.ask(Op.SETATTR, a, body)[0] == errno.ESTALE
    assert (place.parent / "outside" / "secret").read_bytes() == SECRET
    again = w.look("sub")
    assert stat.S_ISLNK(again.mode) and again.node != sub


def test_devices_and_pipes_are_seen_and_never_opened(w: FuseDriver, place: Path) -> None:
    os.mkfifo(place / "pipe")
    pipe = w.look("pipe")
    assert stat.S_ISFIFO(pipe.mode)
    assert w.ask(Op.OPEN, pipe.node, fuse.OPEN_IN.pack(0, 0))[0] == errno.EACCES
    body = fuse.CREATE_IN.pack(os.O_WRONLY, 0o644, 0, 0) + b"pipe\0"
    assert w.ask(Op.CREATE, ROOT, body)[0] == errno.EACCES
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        body = fuse.MKNOD_IN.pack(kind | 0o666, 0x103, 0, 0) + b"device\0"
        assert w.ask(Op.MKNOD, ROOT, body)[0] == errno.EPERM


def test_what_is_mounted_inside_is_not_shared() -> None:
    with closing(FuseDriver(Path("/"))) as d:
        assert d.ask(Op.LOOKUP, ROOT, b"proc\0")[0] == errno.EXDEV


def test_files_are_made_written_and_removed(w: FuseDriver, place: Path) -> None:
    body = fuse.CREATE_IN.pack(os.O_RDWR | os.O_EXCL, 0o4751, 0, 0) + b"new\0"
    handle = fuse.OPEN_OUT.unpack_from(w.wants(Op.CREATE, ROOT, body), fuse.ENTRY_BYTES)[0]
    assert w.write(handle, 4, b"data") == (0, fuse.WRITE_OUT.pack(4, 0))
    assert w.read(handle, 0, 100) == bytes(4) + b"data"
    assert (place / "new").read_bytes() == bytes(4) + b"data"
    assert stat.S_IMODE((place / "new").stat().st_mode) == 0o751, "no setuid"
    assert w.ask(Op.CREATE, ROOT, body)[0] == errno.EEXIST
    w.wants(Op.FSYNC, ROOT, fuse.FSYNC_IN.pack(handle, 0, 0))
    w.wants(Op.UNLINK, ROOT, b"new\0")
    assert w.read(handle, 4, 4) == b"data", "it is open still"
    w.wants(Op.RELEASE, ROOT, fuse.RELEASE_IN.pack(handle, 0, 0, 0))
    assert w.ask(Op.READ, ROOT, fuse.READ_IN.pack(handle, 0, 4, 0, 0, 0, 0))[0] == errno.EBADF
    w.wants(Op.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o2750, 0) + b"folder\0")
    assert stat.S_IMODE((place / "folder").stat().st_mode) == 0o750
    w.wants(Op.SYMLINK, ROOT, b"link\0/etc/passwd\0")
    assert (place / "link").readlink() == Path("/etc/passwd")
    w.wants(Op.LINK, ROOT, fuse.LINK_IN.pack(w.look("a").node) + b"hard\0")
    assert (place / "hard").stat().st_nlink == 2
    w.wants(Op.RMDIR, ROOT, b"folder\0")
    assert w.ask(Op.RMDIR, ROOT, b"sub\0")[0] == errno.ENOTEMPTY


def test_names_move_with_what_is_under_them(w: FuseDriver, place: Path) -> None:
    b = w.look("sub", "b").node
    w.wants(Op.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o755, 0) + b"other\0")
    other = w.look("other").node
    w.wants(Op.RENAME, ROOT, fuse.RENAME_IN.pack(other) + b"sub\0moved\0")
    assert w.read(w.open(b), 0, 2) == b"\0\1" and (place / "other" / "moved" / "b").exists()
    assert w.look("other", "moved", "b").node == b
    for flags, expected in ((1, errno.EEXIST), (4, errno.EINVAL), (2, 0)):
        body = fuse.RENAME2_IN.pack(other, flags, 0) + b"a\0moved\0"
        assert w.ask(Op.RENAME2, ROOT, body)[0] == expected
    assert (place / "a" / "b").exists() and w.look("a", "b").node == b
    w.wants(Op.RENAME, other, fuse.RENAME_IN.pack(ROOT) + b"moved\0out\0")
    assert (place / "out").read_bytes() == b"content of a"


def test_sizes_permissions_and_times(w: FuseDriver, place: Path) -> None:
    a = w.look("a").node
    body = fuse.SETATTR_IN.pack(
        fuse.SIZE | fuse.MODE | fuse.ATIME | fuse.MTIME, 0, 0, 7, 0, 1, (1 << 64) - 5, 0, 2, 3, 0,
        0o6640, 0, 0, 0, 0,
    )  # fmt: skip
    w.wants(Op.SETATTR, a, body)
    there = (place / "a").stat()
    assert (there.st_size, stat.S_IMODE(there.st_mode)) == (7, 0o640)
    assert (there.st_atime_ns, there.st_mtime_ns) == (1_000_000_002, -4_999_999_997)
    own = fuse.SETATTR_IN.pack(fuse.UID | fuse.GID, *[0] * 15)
    w.wants(Op.SETATTR, a, own)
    other = fuse.SETATTR_IN.pack(fuse.UID, *[0] * 12, 1000, 0, 0)
    assert w.ask(Op.SETATTR, a, other)[0] == errno.EPERM
    for size in (1 << 63, (1 << 64) - 1):
        body = fuse.SETATTR_IN.pack(fuse.SIZE, 0, 0, size, *[0] * 12)
        assert w.ask(Op.SETATTR, a, body)[0] in (errno.EINVAL, errno.EFBIG)


def test_nothing_is_written_to_a_folder_to_be_read(d: FuseDriver, place: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in sorted(place.rglob("*"))}
    a = d.look("a").node
    for op, body in (
        (Op.UNLINK, b"a\0"), (Op.RMDIR, b"sub\0"), (Op.SYMLINK, b"x\0y\0"),
        (Op.MKDIR, fuse.MKDIR_IN.pack(0o755, 0) + b"x\0"),
        (Op.LINK, fuse.LINK_IN.pack(a) + b"x\0"),
        (Op.MKNOD, fuse.MKNOD_IN.pack(stat.S_IFREG, 0, 0, 0) + b"x\0"),
        (Op.CREATE, fuse.CREATE_IN.pack(os.O_RDONLY, 0o644, 0, 0) + b"a\0"),
        (Op.RENAME, fuse.RENAME_IN.pack(ROOT) + b"a\0x\0"),
    ):  # fmt: skip
        assert d.ask(op, ROOT, body)[0] == errno.EROFS, op
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
        assert d.ask(Op.OPEN, a, fuse.OPEN_IN.pack(flags, 0))[0] == errno.EROFS
    assert d.write(d.open(a), 0, b"x")[0] == errno.EBADF
    body = fuse.SETATTR_IN.pack(fuse.MODE, *[0] * 15)
    assert d.ask(Op.SETATTR, a, body)[0] == errno.EROFS
    assert {path: path.lstat().st_mtime_ns for path in sorted(place.rglob("*"))} == before


def test_a_full_one_is_full_and_a_hole_is_found(d: FuseDriver, w: FuseDriver, place: Path) -> None:
    assert fuse.STATFS_OUT.unpack(d.wants(Op.STATFS))[1:3] == (0, 0)
    assert fuse.STATFS_OUT.unpack(w.wants(Op.STATFS))[2] > 0
    os.truncate(place / "a", 1 << 20)
    handle = d.open(d.look("a").node)
    assert d.wants(Op.LSEEK, ROOT, fuse.LSEEK_IN.pack(handle, 0, os.SEEK_HOLE, 0)) != bytes(8)
    body = fuse.LSEEK_IN.pack(handle, 0, os.SEEK_END, 0)
    assert d.ask(Op.LSEEK, ROOT, body)[0] == errno.EINVAL


@pytest.mark.parametrize("op", [0, 21, 22, 34, 43, 47, 48, 51, 4095, 0xFFFF_FFFF])
def test_what_it_does_not_know_is_said_to_be_unknown(d: FuseDriver, op: int) -> None:
    assert d.ask(op, ROOT, bytes(64)) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("op", sorted(Op))
def test_requests_that_are_cut_off(w: FuseDriver, op: Op) -> None:
    if op not in fuse.SILENT:
        for size in (0, 1, 7):
            error, _ = w.ask(op, w.look("a").node, bytes(size))
            answered = error == 0 and op in (Op.GETATTR, Op.STATFS, Op.DESTROY)
            assert answered or error in (errno.EINVAL, errno.ESTALE, errno.ENOTDIR), error


@pytest.mark.parametrize(
    ("out", "room"), [(b"x" * 39, 100), (b"", 100), (b"x" * 40, 0), (b"x" * 40, 8)]
)
def test_requests_without_header_break_the_ring_and_without_room_are_not_answered(
    d: FuseDriver, out: bytes, room: int
) -> None:
    d.memory.write(BUFFERS, out + bytes(room))
    if out:
        d.describe(REQUEST, 0, BUFFERS, len(out), 1 if room else 0, 1)
    if room:
        d.describe(REQUEST, 1 if out else 0, BUFFERS + len(out), room, 2)
    d.offer(REQUEST, 0)
    d.kick(REQUEST)
    is_broken = len(out) < 40
    assert bool(d.status & NEEDS_RESET) == is_broken
    assert d.finished(REQUEST) == ([] if is_broken else [(0, 0)])


def test_a_request_larger_than_any_breaks_the_ring(d: FuseDriver) -> None:
    for index in range(4):
        d.describe(REQUEST, index, BUFFERS, 0x8_0000, 1 if index < 3 else 0, index + 1)
    d.offer(REQUEST, 0)
    d.kick(REQUEST)
    assert d.status & NEEDS_RESET


def test_a_guest_forgets(d: FuseDriver) -> None:
    b = d.look("sub", "b").node
    d.look("sub", "b")
    assert len(d.folder.names.nodes) == 3
    sub = d.look("sub").node

    def forget(op: Op, node: int, body: bytes) -> None:
        header = fuse.IN_HEADER.pack(40 + len(body), op, 1, node, 0, 0, 0, 0, 0)
        assert d.request(HIGH_PRIORITY, header + body, 0) == b""

    forget(Op.FORGET, b, fuse.FORGET_IN.pack(1))
    assert d.ask(Op.GETATTR, b, bytes(16))[0] == 0
    forget(Op.FORGET, sub, fuse.FORGET_IN.pack(1 << 40))
    rows = fuse.FORGET_ONE.pack(b, 1) + fuse.FORGET_ONE.pack(77, 1) + b"cut off"
    forget(Op.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(1000, 0) + rows)
    assert d.ask(Op.GETATTR, b, bytes(16))[0] == errno.ESTALE
    assert list(d.folder.names.nodes) == [ROOT]
    forget(Op.FORGET, ROOT, fuse.FORGET_IN.pack(1 << 63))
    assert d.ask(Op.GETATTR, ROOT, bytes(16))[0] == 0


def test_so_many_names_are_known_and_the_oldest_is_found_again(
    d: FuseDriver, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_names, "MOST_NODES", 8)
    for number in range(20):
        (place / f"file-{number}").touch()
    b = d.look("sub", "b").node
    handle = d.open(b)
    nodes = [d.look(f"file-{number}").node for number in range(20)]
    assert len(d.folder.names.nodes) == 8 and len(set(nodes)) == 20
    assert d.ask(Op.GETATTR, nodes[0], bytes(16))[0] == errno.ESTALE
    assert d.ask(Op.GETATTR, nodes[-1], bytes(16))[0] == 0
    assert d.look("file-0").node not in nodes
    assert d.read(handle, 0, 2) == b"\0\1" and d.ask(Op.GETATTR, b, bytes(16))[0] == 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_so_many_files_are_open(d: FuseDriver) -> None:
    a, before = d.look("a").node, open_files()
    handles = [d.open(a) for _ in range(folders.MOST_HANDLES)]
    assert d.ask(Op.OPEN, a, fuse.OPEN_IN.pack(0, 0))[0] == errno.ENFILE
    assert d.ask(Op.OPENDIR, ROOT, fuse.OPEN_IN.pack(0, 0))[0] == errno.ENFILE
    d.wants(Op.RELEASE, ROOT, fuse.RELEASE_IN.pack(handles[0], 0, 0, 0))
    d.open(a)
    d.put(0x14, 0, 1)  # the driver resets the device
    assert open_files() == before


def test_a_path_longer_than_any(w: FuseDriver) -> None:
    node, error, depth = ROOT, 0, 0
    body = fuse.MKDIR_IN.pack(0o755, 0) + b"x" * 240 + b"\0"
    while not error:
        error, data = w.ask(Op.MKDIR, node, body)
        node, depth = fuse.ENTRY.unpack_from(data)[0] if data else node, depth + 1
    assert (error, depth) == (errno.ENAMETOOLONG, 18), "4096 bytes are too long for a path"


@pytest.mark.parametrize("tag", ["", "x" * 37])
def test_a_tag_that_no_driver_could_see(tag: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 36 bytes"):
        Driver("virtio_fs", tag=tag)


def test_a_device_without_a_folder_has_nothing() -> None:
    d = Driver("virtio_fs")
    d.start()
    header = fuse.IN_HEADER.pack(fuse.IN_HEADER.size, Op.STATFS, 1, ROOT, 0, 0, 0, 0, 0)
    answer = d.request(REQUEST, header, fuse.OUT_HEADER.size + fuse.STATFS_OUT.size)
    assert fuse.OUT_HEADER.unpack(answer)[1] == -errno.ENOSYS
    assert "path" not in d.device.inspect()
