"""The user's own disk over an image of the cache."""

from pathlib import Path

import pytest

from understudy.backends.qcow2 import HEADER_BYTES, Qcow2, backing
from understudy.backends.qcow2_new import create
from understudy.guests.entry import GuestError
from understudy.whole_debian.own_disk import default_folder, own_disk

SIZE = 1 << 26


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    path = tmp_path / "cache" / "debian-12" / "disk-1.qcow2"
    create(path, SIZE)
    return path


def test_it_is_made_once_and_kept(image: Path, tmp_path: Path) -> None:
    folder, before = tmp_path / "data", image.read_bytes()
    path = own_disk(image, folder)
    assert path == folder / "debian-12.qcow2"
    assert backing(path, path.read_bytes()[:HEADER_BYTES]) == (str(image), "qcow2")
    disk = Qcow2(path)
    assert disk.size == SIZE
    disk.write(0, b"mine")
    disk.close()
    assert own_disk(image, folder) == path
    disk = Qcow2(path, is_read_only=True)
    assert disk.read(0, 4) == b"mine"
    disk.close()
    assert image.read_bytes() == before


def test_an_image_that_is_gone(image: Path, tmp_path: Path) -> None:
    own_disk(image, tmp_path)
    newer = image.with_name("disk-2.qcow2")
    image.rename(newer)
    with pytest.raises(
        GuestError, match=r"stands on the image .*disk-1\.qcow2, which is not there"
    ):
        own_disk(newer, tmp_path)


def test_what_is_no_disk_is_not_touched(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "debian-12.qcow2"
    path.write_bytes(b"something else")
    with pytest.raises(GuestError, match="is no qcow2 image"):
        own_disk(image, tmp_path)
    assert path.read_bytes() == b"something else"
    (tmp_path / "file").touch()
    with pytest.raises(GuestError, match="cannot be made"):
        own_disk(image, tmp_path / "file")


def test_the_folder_is_where_data_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_folder() == Path("/data/understudy")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == Path("/home/someone/.local/share/understudy")
