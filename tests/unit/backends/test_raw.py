"""Raw images: what is refused, locks, errors of the host."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from understudy.backends.medium import Zeros
from understudy.backends.opening import ImageError, open_disk
from understudy.backends.raw import Raw
from understudy.disk import Disk

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def test_what_is_written_is_in_the_file(image: Path) -> None:
    raw = Raw(image)
    raw.write(512, b"x" * 1024)
    raw.flush()
    assert raw.read(0, 2048) == image.read_bytes()[:2048]
    assert image.read_bytes()[512:1536] == b"x" * 1024
    raw.close()
    raw.close()


def test_zeros_and_discarded_room(image: Path) -> None:
    raw = Raw(image)
    before = image.stat().st_blocks
    raw.zero(0, 4096, may_unmap=False)
    raw.zero(4096, 8192, may_unmap=True)
    raw.discard(1 << 16, 1 << 16)
    assert raw.read(0, 12288) == bytes(12288)
    assert raw.read(12288, 256) == bytes(range(256))
    assert image.stat().st_blocks < before and image.stat().st_size == SIZE


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (-1, 1), (SIZE - 1, 2), (1 << 70, 0)])
def test_nothing_outside(image: Path, offset: int, length: int) -> None:
    raw = Raw(image)
    for call in (
        lambda: raw.read(offset, length),
        lambda: raw.write(offset, bytes(length)),
        lambda: raw.discard(offset, length),
        lambda: raw.zero(offset, length, may_unmap=True),
    ):
        with pytest.raises(ValueError, match="of a disk of"):
            call()


def test_a_file_that_became_shorter_is_an_error_and_no_zeros(image: Path) -> None:
    raw = Raw(image)
    os.truncate(image, 1024)
    assert len(raw.read(0, 1024)) == 1024
    with pytest.raises(OSError, match="shorter"):
        raw.read(512, 1024)


def test_a_disk_that_is_full_is_an_error() -> None:
    raw = Raw.__new__(Raw)
    raw.path, raw.size, raw.is_read_only = Path("/dev/full"), SIZE, False
    raw.fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(OSError, match="No space left"):
        raw.write(0, b"x")
    os.close(raw.fd)


def test_a_read_only_one_is_not_written(image: Path) -> None:
    image.chmod(0o444)
    raw = Raw(image, is_read_only=True)
    for call in (
        lambda: raw.write(0, b"x"),
        lambda: raw.discard(0, 512),
        lambda: raw.zero(0, 512, may_unmap=False),
    ):
        with pytest.raises(OSError, match="read-only"):
            call()


# --- who may have it ---


@pytest.mark.parametrize(
    ("first", "second", "may"),
    [("", "", False), ("", ",ro", False), (",ro", "", False), (",ro", ",ro", True),
     (",overlay", ",overlay", True), (",overlay", ",ro", True), ("", ",overlay", False)],
)  # fmt: skip
def test_two_do_not_have_it_if_one_writes(image: Path, first: str, second: str, may: bool) -> None:
    one = open_disk(Disk.parse(f"{image}{first}"))
    if may:
        open_disk(Disk.parse(f"{image}{second}")).close()
    else:
        with pytest.raises(ImageError, match="in use by another virtual machine"):
            open_disk(Disk.parse(f"{image}{second}"))
    one.close()
    open_disk(Disk.parse(f"{image}{second}")).close()


HOLDER = """
import sys
from pathlib import Path
from understudy.backends.raw import Raw
raw = Raw(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_however_that_ends(image: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ImageError, match="in use"):
            Raw(image)
        holder.kill()
    Raw(image).close()


# --- what is refused ---


def test_each_refusal_says_what_to_do(tmp_path: Path) -> None:
    empty, odd, other = tmp_path / "empty", tmp_path / "odd", tmp_path / "some.img"
    windows = tmp_path / "windows.vhdx"
    windows.write_bytes(b"vhdxfile" + bytes(504))
    empty.touch()
    odd.write_bytes(bytes(1000))
    other.write_bytes(b"QFI\xfb" + bytes(508))
    named = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(named))
    for path, words in (
        (tmp_path / "none", "truncate -s 1G"),
        (tmp_path, "is a folder"),
        (empty, "is empty: give it a size"),
        (odd, r"1000 bytes, no whole number of sectors .*truncate -s %512"),
        (other, "of the format qcow2: say ,format=qcow2"),
        (windows, "of the format vhdx: `qemu-img convert -f vhdx -O qcow2"),
        (named, "No such device or address"),
        (Path("/dev/null"), "no file and no block device"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(ImageError, match=words) as refusal:
            open_disk(Disk(str(path)))
        assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    open_disk(Disk(str(other), format="raw")).close()


def test_a_snapshot_knows_whether_the_image_has_changed(image: Path) -> None:
    raw = Raw(image)
    saved = raw.save()
    raw.load(saved)
    os.utime(image, ns=(1, 1))
    with pytest.raises(ValueError, match="has been written since"):
        raw.load(saved)


def test_a_medium_of_zeros_takes_nothing() -> None:
    zeros = Zeros(1024)
    assert zeros.read(512, 512) == bytes(512)
    with pytest.raises(OSError, match="read-only"):
        zeros.write(0, b"x")
    with pytest.raises(ValueError, match="snapshot"):
        zeros.load({"size": 512})


def test_qemu_respects_our_locks_and_we_its(image: Path) -> None:
    program = shutil.which("qemu-io")
    if program is None:
        pytest.skip("qemu-io (qemu-utils) is not on this computer")
    for is_read_only in (False, True):
        raw = Raw(image, is_read_only=is_read_only)
        write = [program, "-f", "raw", "-c", "write 0 512", str(image)]
        assert "lock" in subprocess.run(write, capture_output=True, text=True, check=False).stderr
        raw.close()
    with subprocess.Popen(
        [program, "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        assert b"qemu-io>" in holder.stdout.readline()  # it has opened the image
        for is_read_only in (False, True):
            with pytest.raises(ImageError, match="in use"):
                Raw(image, is_read_only=is_read_only)
        holder.communicate(b"quit\n")
    Raw(image).close()
