"""New qcow2 images: read by our own reading of the format, by the library, and by qemu-img."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.backends.qcow2_file import content
from understudy.backends.locked import ImageError
from understudy.backends.qcow2 import HEADER_BYTES, backing
from understudy.backends.qcow2_new import CLUSTER, LARGEST, create

SIZE = 1 << 30


def _checked(image: Path) -> None:
    """QEMU finds nothing wrong with it."""
    if program := shutil.which("qemu-img"):
        subprocess.run([program, "check", "-q", str(image)], check=True)


def test_it_is_empty_and_small(tmp_path: Path) -> None:
    image = tmp_path / "new" / "image.qcow2"
    create(image, SIZE)
    assert image.stat().st_size == 4 * CLUSTER
    assert backing(image, image.read_bytes()[:HEADER_BYTES]) is None
    assert not content(image).strip(b"\0")
    _checked(image)


def test_what_is_written_is_found_again_and_what_is_not_is_below(tmp_path: Path) -> None:
    qcow2 = pytest.importorskip("understudy.backends.qcow2")
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    below, above = tmp_path / "below.qcow2", tmp_path / "above.qcow2"
    create(below, SIZE)
    disk = qcow2.Qcow2(below)
    disk.write(5 * CLUSTER, b"below" * 100)
    disk.close()
    create(above, SIZE, below)
    assert backing(above, above.read_bytes()[:HEADER_BYTES]) == (str(below), "qcow2")
    disk = qcow2.Qcow2(above)
    assert disk.size == SIZE
    disk.write(SIZE - 512, b"a" * 512)
    disk.close()
    disk = qcow2.Qcow2(above, is_read_only=True)
    assert disk.read(5 * CLUSTER, 500) == b"below" * 100
    assert disk.read(SIZE - 1024, 1024) == bytes(512) + b"a" * 512
    disk.close()
    _checked(below)
    _checked(above)


def test_the_same_choices_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        create(tmp_path / name, SIZE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(b"mine")
    create(image, SIZE)
    assert image.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["image.qcow2"]


@pytest.mark.parametrize("size", [0, -512, 1000, LARGEST + 512])
def test_sizes_that_cannot_be(size: int, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"a disk of {size} bytes"):
        create(tmp_path / "image.qcow2", size)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match=r"image\.qcow2 cannot be made: "):
        create(tmp_path / "file" / "image.qcow2", SIZE)
