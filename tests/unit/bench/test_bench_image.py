"""The initramfs is a newc archive that another reader understands."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.image import archive


def members(data: bytes) -> dict[str, tuple[int, bytes]]:
    """A reader of its own: names, modes and contents of a newc archive."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at += (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[at : at + size])
        at += (size + 3) // 4 * 4


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(b"\x7fELF and seven")
    (tmp_path / "bin/sh").symlink_to("busybox")
    (tmp_path / "init").write_bytes(b"")
    return tmp_path


def test_files_links_and_folders_are_all_there(tree: Path) -> None:
    found = members(archive(tree))
    assert found["bin"] == (0o040755, b"")
    assert found["bin/busybox"] == (0o100755, b"\x7fELF and seven")
    assert found["bin/sh"] == (0o120777, b"busybox")
    assert found["dev/console"][0] == 0o020600
    assert list(found).index("bin") < list(found).index("bin/sh")


def test_the_same_tree_gives_the_same_bytes(tree: Path) -> None:
    assert archive(tree) == archive(tree)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio on this computer")
def test_cpio_lists_it(tree: Path) -> None:
    listed = subprocess.run(["cpio", "-t"], input=archive(tree), capture_output=True, check=True)
    assert {b"bin/sh", b"init", b"dev/console"} <= set(listed.stdout.split())
