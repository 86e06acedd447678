"""A folder that another program serves: what it is asked, and what becomes of its answers.

Hostile programs are functions here; the real one is asked where there is one.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.backends.real_virtiofsd import needs_virtiofsd
from tests.unit.backends.vhost_program import Program
from tests.unit.devices.virtio.driver import Driver
from tests.unit.devices.virtio.fuse import ROOT, FuseDriver
from understudy.backends.folder import ShareError
from understudy.backends.vhost_user import VhostError, VhostUser
from understudy.backends.virtiofsd import Virtiofsd
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs import HIGH_PRIORITY, LONGEST_ANSWER, LONGEST_REQUEST, QUEUES
from understudy.devices.virtio.fs_daemon import Answerer, Daemon
from understudy.devices.virtio.fs_messages import Op

LONGEST = LONGEST_REQUEST, LONGEST_ANSWER
INIT = fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFF_FFFF) + bytes(48)


class DaemonDriver(FuseDriver):
    """A driver of a device whose folder a program serves."""

    def __init__(self, path: Path, program: Answerer) -> None:
        self.daemon = Daemon(path, program)
        Driver.__init__(self, "virtio_fs", daemon=self.daemon)
        self.start()
        self.unique = 0

    def mount(self) -> bytes:
        """What is answered to the first request of all."""
        return self.wants(Op.INIT, 0, INIT)


class Function:
    """A program that is a function of a request's opcode and body; None: it is gone."""

    def __init__(self, answer: Callable[[int, bytes], bytes | None]) -> None:
        self.answer, self.asked, self.problem = answer, list[tuple[int, bytes]](), ""

    def ask(self, queue: int, request: bytes, room: int) -> bytes:
        _, opcode, unique, *_ = fuse.IN_HEADER.unpack_from(request)
        self.asked.append((queue, request))
        said = self.answer(opcode, request[fuse.IN_HEADER.size :])
        if said is None:
            raise OSError(errno.EIO, "gone")
        return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(said), 0, unique) + said

    def close(self) -> None:
        """Nothing is open."""


def obedient(opcode: int, body: bytes) -> bytes:
    """Says yes, and to INIT more than there is."""
    if opcode == Op.INIT:
        return struct.pack("<IIIIHHIIHHI28x", 7, 45, 1 << 20, 0xFFFF_FFFF, 9, 9, 1 << 30, 1, 9999,
                           7, 0xFFFF_FFFF)  # fmt: skip
    return b""


@contextmanager
def driven(path: Path, program: Answerer) -> Iterator[DaemonDriver]:
    """It is closed again."""
    driver = DaemonDriver(path, program)
    try:
        yield driver
    finally:
        driver.close()


# --- what a program is asked ---


def test_both_agree_on_what_the_device_can_carry(tmp_path: Path) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        told = driver.mount()
        asked = fuse.INIT_IN.unpack(program.asked[0][1][fuse.IN_HEADER.size :])
    assert asked == (7, 31, 1 << 17, fuse.FLAGS), "no more than the filter knows of"
    major, minor, _, flags, _, _, write, _, pages, alignment = fuse.INIT_OUT.unpack(told)
    assert (major, minor, flags, alignment) == (7, 31, fuse.FLAGS, 0)
    assert write == 1 << 20 and pages == 256 and told[-32:] == bytes(32)


def test_all_is_asked_by_the_guests_root_and_as_long_as_it_is(tmp_path: Path) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        header = fuse.IN_HEADER.pack(9999, Op.GETATTR, 5, ROOT, 7, 8, 9, 10, 11)
        driver.request(1, header + bytes(16), 200)
        forget = fuse.IN_HEADER.pack(48, Op.FORGET, 6, 2, 0, 0, 0, 0, 0) + bytes(8)
        assert driver.request(HIGH_PRIORITY, forget, 0) == b""
    (queue, request), (other, _) = program.asked
    assert (queue, other) == (1, 0)
    assert fuse.IN_HEADER.unpack_from(request) == (56, Op.GETATTR, 5, ROOT, 0, 0, 9, 0, 0)


def test_nobody_is_asked_for_what_gives_rights(tmp_path: Path) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        for kind in (stat.S_IFCHR, stat.S_IFBLK):
            body = fuse.MKNOD_IN.pack(kind | 0o666, 0x103, 0, 0) + b"null\0"
            assert driver.ask(Op.MKNOD, ROOT, body)[0] == errno.EPERM
        assert program.asked == []
        mode = 0o6755
        driver.wants(Op.MKNOD, ROOT, fuse.MKNOD_IN.pack(stat.S_IFREG | mode, 0, 0, 0) + b"a\0")
        driver.wants(Op.MKDIR, ROOT, fuse.MKDIR_IN.pack(mode, 0) + b"a\0")
        driver.wants(Op.CREATE, ROOT, fuse.CREATE_IN.pack(os.O_RDWR, mode, 0, 0) + b"a\0")
        changed = list[int]([0] * 16)
        changed[0], changed[11] = fuse.MODE, mode
        driver.wants(Op.SETATTR, ROOT, fuse.SETATTR_IN.pack(*changed))
        bodies = [request[fuse.IN_HEADER.size :] for _, request in program.asked]
    modes = [
        fuse.MKNOD_IN.unpack_from(bodies[0])[0], fuse.MKDIR_IN.unpack_from(bodies[1])[0],
        fuse.CREATE_IN.unpack_from(bodies[2])[1], fuse.SETATTR_IN.unpack_from(bodies[3])[11],
    ]  # fmt: skip
    assert modes == [stat.S_IFREG | 0o755, 0o755, 0o755, 0o755]


@pytest.mark.parametrize("opcode", [Op.MKNOD, Op.MKDIR, Op.CREATE, Op.SETATTR, Op.INIT])
def test_what_is_cut_off_is_asked_of_nobody(tmp_path: Path, opcode: Op) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        assert driver.ask(opcode, ROOT, b"\0" * 3) == (errno.EINVAL, b"")
    assert program.asked == []


def test_other_requests_and_no_room_reach_nobody(tmp_path: Path) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        for opcode in (21, 22, 31, 33, 39, 48, 51, 999):  # attributes, locks, ioctl, DAX, none
            assert driver.ask(opcode, ROOT, bytes(64)) == (errno.ENOSYS, b"")
        header = fuse.IN_HEADER.pack(56, Op.GETATTR, 5, ROOT, 0, 0, 0, 0, 0)
        assert driver.request(1, header + bytes(16), 15) == b""
    assert program.asked == []


# --- what it answers ---


@pytest.mark.parametrize(
    "said",
    [
        b"", bytes(15), bytes(16), struct.pack("<IiQ", 16, 0, 99), struct.pack("<IiQ", 17, 0, 1),
        struct.pack("<IiQ", 16, 1, 1), struct.pack("<IiQ", 16, -5000, 1),
        struct.pack("<IiQ", 20, -2, 1) + bytes(4),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_eio(tmp_path: Path, said: bytes) -> None:
    class Wrong(Function):
        def ask(self, queue: int, request: bytes, room: int) -> bytes:
            return said

    with driven(tmp_path, Wrong(obedient)) as driver:
        assert driver.ask(Op.GETATTR, ROOT, bytes(16)) == (errno.EIO, b"")
        assert driver.status == 15, "the device goes on"


def test_a_program_that_never_answers_is_eio_and_asked_once(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def answer(request: bytes, room: int) -> bytes:
        asked.append(request)
        return b""

    other = Program(answer=answer, give=lambda *_: None)
    vhost = VhostUser(other.ours, queues=QUEUES, longest=LONGEST, patience_s=0.05)

    class Silent(Function):
        def ask(self, queue: int, request: bytes, room: int) -> bytes:
            try:
                return vhost.ask(queue, request, room)
            except VhostError as problem:
                raise OSError(errno.EIO, str(problem)) from None

    with driven(tmp_path, Silent(obedient)) as driver:
        for _ in range(3):
            assert driver.ask(Op.GETATTR, ROOT, bytes(16)) == (errno.EIO, b"")
        assert len(asked) == 1
    vhost.close()
    other.close()


# --- snapshots, reset ---


def test_no_snapshot_while_it_is_mounted_and_a_reset_forgets_all(tmp_path: Path) -> None:
    program = Function(obedient)
    with driven(tmp_path, program) as driver:
        saved = driver.device.save()
        assert saved["folder"] is None
        driver.mount()
        assert driver.device.inspect()["mounted"] is True
        with pytest.raises(ShareError, match="unmount it in the guest before a snapshot"):
            driver.device.save()
        driver.wants(Op.DESTROY, 0)
        driver.device.save()
        driver.mount()
        driver.device.reset()
        last = fuse.IN_HEADER.unpack_from(program.asked[-1][1])
        assert last[1] == Op.DESTROY, "the guest does not say it"
        driver.device.load(saved)
        with pytest.raises(ValueError, match="known to the server in Python alone"):
            driver.device.load(saved | {"folder": {}})
    with driver_in_python(tmp_path) as python:
        python.device.load(saved)
        assert python.look().node == ROOT


@contextmanager
def driver_in_python(path: Path) -> Iterator[FuseDriver]:
    """The other server."""
    driver = FuseDriver(path)
    try:
        yield driver
    finally:
        driver.close()


# --- the real one ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a file, a link out of it, and a file outside."""
    top = tmp_path / "tree"
    top.mkdir()
    (tmp_path / "outside").write_text("secret")
    (top / "file").write_bytes(b"contents" * 1000)
    (top / "away").symlink_to("../outside")
    return top


@contextmanager
def real(path: Path, *, is_writable: bool) -> Iterator[DaemonDriver]:
    """A driver before the real program."""
    program = Virtiofsd(path, is_writable=is_writable, queues=QUEUES, longest=LONGEST)
    with driven(path, program) as driver:
        driver.mount()
        yield driver


@needs_virtiofsd
def test_it_reads_and_refuses_to_write(tree: Path) -> None:
    with real(tree, is_writable=False) as driver:
        found = driver.look("file")
        assert (found.size, found.uid) == (8000, 0)
        assert driver.read(driver.open(found.node), 0, 8000, found.node) == b"contents" * 1000
        assert driver.look("away").mode == stat.S_IFLNK | 0o777
        assert driver.wants(Op.READLINK, driver.look("away").node) == b"../outside"
        assert driver.ask(Op.LOOKUP, ROOT, b"missing\0")[0] == errno.ENOENT
        assert driver.ask(Op.LOOKUP, ROOT, b"../outside\0")[0] != 0
        body = fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + b"new\0"
        assert driver.ask(Op.CREATE, ROOT, body)[0] == errno.EROFS
        assert driver.ask(Op.UNLINK, ROOT, b"file\0")[0] == errno.EROFS
        assert driver.ask(Op.OPEN, found.node, fuse.OPEN_IN.pack(os.O_RDWR, 0))[0] == errno.EROFS
    assert sorted(path.name for path in tree.iterdir()) == ["away", "file"]


@needs_virtiofsd
def test_it_writes_what_is_asked_and_belongs_to_who_runs_it(tree: Path) -> None:
    data = os.urandom(50_000)
    with real(tree, is_writable=True) as driver:
        body = fuse.CREATE_IN.pack(os.O_RDWR, 0o6755, 0, 0) + b"new\0"
        made = driver.wants(Op.CREATE, ROOT, body)
        node = fuse.ENTRY.unpack_from(made)[0]
        handle = fuse.OPEN_OUT.unpack_from(made, fuse.ENTRY_BYTES)[0]
        assert driver.write(handle, 0, data, node) == (0, fuse.WRITE_OUT.pack(len(data), 0))
        owner = list[int]([0] * 16)
        owner[0], owner[13] = fuse.UID, 1000
        assert driver.ask(Op.SETATTR, node, fuse.SETATTR_IN.pack(*owner))[0] != 0
        # The guest starts again, without a word: names and what is open are forgotten.
        driver.device.reset()
        driver.start()
        driver.mount()
        found = driver.look("new")
        part = driver.read(driver.open(found.node), 1000, 9000, found.node)
        assert part == data[1000:10000]
    there = (tree / "new").stat()
    assert (there.st_uid, there.st_gid) == (os.geteuid(), os.getegid())
    assert stat.S_IMODE(there.st_mode) == 0o755 and (tree / "new").read_bytes() == data


@needs_virtiofsd
def test_a_file_that_gives_rights_gives_none_once_it_is_changed(tree: Path) -> None:
    (tree / "file").chmod(0o6755)
    with real(tree, is_writable=True) as driver:
        node = driver.look("file").node
        assert driver.write(driver.open(node, os.O_RDWR), 0, b"mine", node)[0] == 0
    assert stat.S_IMODE((tree / "file").stat().st_mode) == 0o755


@needs_virtiofsd
def test_a_program_that_dies_is_eio(tree: Path) -> None:
    with real(tree, is_writable=False) as driver:
        assert isinstance(driver.daemon.program, Virtiofsd)
        os.killpg(driver.daemon.program.pid, 9)
        assert driver.ask(Op.GETATTR, ROOT, bytes(16)) == (errno.EIO, b"")
        assert driver.device.inspect()["problem"] == "it has ended"
