"""qcow2: read, written, over others; each refusal; damaged files.

Source: QEMU's docs/interop/qcow2.txt; the images are made and read by qcow2_file.py, and where this
computer has it by qemu-img.
"""

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.backends.qcow2_file import CLUSTER, HEADER, content, make
from understudy.backends.opening import ImageError, open_disk
from understudy.backends.qcow2 import Qcow2, backing
from understudy.disk import Disk

pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")

SIZE = 8 * CLUSTER + 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    make(path, SIZE, {1: b"one" * 100, 8: b"the end"})
    return path


def random_traffic(disk: Qcow2, expected: bytearray, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(150):
        offset = chance.randrange(len(expected))
        count = chance.randrange(min(len(expected) - offset, 2 * CLUSTER) + 1)
        action = chance.random()
        if action < 0.4:
            data = chance.randbytes(count)
            disk.write(offset, memoryview(data))
            expected[offset : offset + count] = data
        elif action < 0.6:
            disk.zero(offset, count, may_unmap=chance.random() < 0.5)
            expected[offset : offset + count] = bytes(count)
        else:
            assert disk.read(offset, count) == expected[offset : offset + count]


def test_what_is_written_is_in_the_file_as_the_format_says(image: Path) -> None:
    disk = Qcow2(image)
    expected = bytearray(content(image))
    assert disk.size == SIZE and disk.read(0, SIZE) == expected
    random_traffic(disk, expected, 1)
    disk.flush()
    assert content(image) == expected
    disk.close()
    disk.close()
    assert content(image) == expected


def test_chains_of_three_read_what_is_nearest_and_write_the_first(tmp_path: Path) -> None:
    base, middle, top = tmp_path / "base.raw", tmp_path / "b" / "middle", tmp_path / "top.qcow2"
    middle.parent.mkdir()
    base.write_bytes(random.Random(3).randbytes(SIZE - 1024))
    make(middle, SIZE, {2: b"middle", 3: b"hidden"}, backing="../base.raw", backing_format="raw")
    make(top, SIZE, {3: b"top"}, backing="b/middle")
    seen = content(top, content(middle, base.read_bytes()))
    others = base.read_bytes(), middle.read_bytes()
    disk = Qcow2(top)
    assert disk.read(0, SIZE) == seen
    expected = bytearray(seen)
    random_traffic(disk, expected, 2)
    disk.close()
    assert content(top, content(middle, base.read_bytes())) == expected
    assert (base.read_bytes(), middle.read_bytes()) == others


def test_all_files_of_a_chain_are_locked(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    make(base, SIZE, {})
    make(top, SIZE, {}, backing="base.qcow2")
    one = open_disk(Disk(str(top)))
    for file in (top, base):
        with pytest.raises(ImageError, match="in use"):
            open_disk(Disk(str(file)))
    open_disk(Disk(str(base), is_read_only=True)).close()
    one.close()
    open_disk(Disk(str(base))).close()


def test_read_only_and_overlays_leave_it_alone(image: Path) -> None:
    before = image.read_bytes()
    disk = open_disk(Disk(str(image), is_read_only=True))
    for call in (lambda: disk.write(0, b"x"), lambda: disk.discard(0, 512)):
        with pytest.raises(OSError, match="read-only"):
            call()
    disk.flush()
    over = open_disk(Disk(str(image), is_overlay=True))
    over.write(0, b"x")
    assert over.read(0, 1) == b"x"
    over.close()
    disk.close()
    assert image.read_bytes() == before


def test_nothing_outside(image: Path) -> None:
    disk = Qcow2(image)
    for offset, count in ((SIZE, 1), (-1, 1), (SIZE - 1, 2), (1 << 70, 0)):
        with pytest.raises(ValueError, match="of a disk of"):
            disk.read(offset, count)
        with pytest.raises(ValueError, match="of a disk of"):
            disk.zero(offset, count, may_unmap=False)
    disk.close()


def test_a_snapshot_knows_whether_it_has_changed(image: Path) -> None:
    disk = Qcow2(image)
    saved = json.loads(json.dumps(disk.save()))
    disk.load(saved)
    os.utime(image, ns=(1, 1))
    with pytest.raises(ValueError, match="has been written since"):
        disk.load(saved)
    disk.close()


# --- what is refused ---


def _loop(folder: Path, path: Path) -> None:
    make(path, SIZE, {}, backing="other.qcow2")
    make(folder / "other.qcow2", SIZE, {}, backing=path.name)


def _made(**options: object) -> Callable[[Path, Path], None]:
    return lambda folder, path: make(path, SIZE, {}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_made(encryption=2), "is encrypted: `qemu-img convert`"),
        (_made(features=2), "marked as corrupt: `qemu-img check -r all"),
        (_made(features=4), "has its data in another file"),
        (_made(features=1 << 40), "is damaged, or no image of this format"),
        (_made(version=4), "of version 4, expected 2 or 3"),
        (_made(backing="none.img"), "its backing file .*none.img is not there"),
        (_made(backing="/dev/null"), "/dev/null is no file"),
        (_made(backing="nbd:host:1"), "only files can be below an image"),
        (_made(backing="x", backing_format=""), "says no format for its backing file"),
        (_made(backing="x", backing_format="vmdk"), "says the format vmdk"),
        (_made(backing="disk.qcow2"), "its backing files come back to"),
        (_loop, "its backing files come back to"),
        (lambda _, path: path.write_bytes(b"QFI\xfb"), "is it cut off"),
        (lambda _, path: path.write_bytes(bytes(4096)), "is no qcow2 image"),
    ],
)
def test_each_refusal_is_one_line(
    damage: Callable[[Path, Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    damage(tmp_path, path)
    with pytest.raises(ImageError, match=words) as refusal:
        open_disk(Disk(str(path)))
    assert "\n" not in str(refusal.value)


def test_names_in_a_header_that_cannot_be() -> None:
    for at, length in ((1 << 40, 5), (104, 0), (104, 1 << 20), (104, 2000)):
        fields = (b"QFI\xfb", 3, at, length, 16, SIZE, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 4, 104)
        with pytest.raises(ImageError, match="name of a backing file that cannot be"):
            backing(Path("x"), HEADER.pack(*fields) + bytes(4000))


def test_damaged_files_never_do_more_than_fail(image: Path) -> None:
    """Bytes of the tables changed at random: an error, or some content; nothing else."""
    whole, chance = image.read_bytes(), random.Random(7)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice([chance.randrange(104), CLUSTER * chance.randint(1, 4)])
            at += chance.randrange(9 * 8) if at >= CLUSTER else 0
            damaged[at] = chance.choice([0, 1, 0x80, 0xFF, chance.randrange(256)])
        image.write_bytes(damaged[: chance.choice([len(damaged), len(damaged), 5 * CLUSTER])])
        try:
            disk = Qcow2(image)
        except ImageError:
            continue
        with suppress(OSError):
            disk.read(0, min(disk.size, SIZE))
            disk.write(0, b"x" * min(disk.size, CLUSTER + 1))
            disk.flush()
        with suppress(OSError):
            disk.close()


def test_qemu_img_reads_it_and_finds_no_error(image: Path, tmp_path: Path) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img (qemu-utils) is not on this computer")
    expected = bytearray(content(image))
    disk = Qcow2(image)
    random_traffic(disk, expected, 5)
    looked = subprocess.run([program, "check", str(image)], capture_output=True, check=False)
    assert b"lock" in looked.stderr
    disk.close()
    raw, again = tmp_path / "disk.raw", tmp_path / "again.qcow2"
    subprocess.run([program, "check", str(image)], check=True, capture_output=True)
    subprocess.run([program, "convert", "-O", "raw", str(image), str(raw)], check=True)
    assert raw.read_bytes() == expected
    subprocess.run([program, "convert", "-c", "-O", "qcow2", str(raw), str(again)], check=True)
    packed = Qcow2(again, is_read_only=True)
    assert packed.read(0, SIZE) == expected
    packed.close()


def test_the_header_of_the_tests_is_that_of_the_specification() -> None:
    assert struct.calcsize(HEADER.format) == 104
