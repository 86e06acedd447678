"""Files into a real Linux and out of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.matrix.lockstep import linux
from understudy import LinuxError
from understudy.linux import VM

pytestmark = pytest.mark.real_guest


@pytest.fixture(scope="module", params=["port", "virtio"])
def vm(request: pytest.FixtureRequest) -> Iterator[VM]:
    """A guest whose agent comes by each of its two channels."""
    with linux("dbt", agent=request.param) as one:
        yield one


def test_a_file_goes_in_and_comes_out(vm: VM, tmp_path: Path) -> None:
    data = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)) * 300 + b"end"
    source = tmp_path / "source"
    source.write_bytes(data)
    source.chmod(0o751)
    vm.run("true")
    before = sum(vm.counts()["exits"].values())
    vm.put(source, "/tmp/file")
    vm.get("/tmp/file", tmp_path / "back")
    exits = sum(vm.counts()["exits"].values()) - before
    assert exits / (len(data) / (1 << 20)) < 600  # for a megabyte both ways
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o751
    seen = vm.run("sha256sum < /tmp/file; stat -c %a /tmp/file").output.split()
    assert (seen[0], seen[2]) == (hashlib.sha256(data).hexdigest(), "751")


def test_a_folder_goes_in_and_comes_out(vm: VM, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "inner" / "empty").mkdir(parents=True)
    (source / "inner").chmod(0o700)
    (source / "inner" / "na me").write_bytes(b"\0\xff")
    (source / "none").write_bytes(b"")
    (source / "link").symlink_to("/nowhere/at/all")
    vm.put(source, "/tmp/tree")
    vm.get("/tmp/tree", tmp_path / "again")

    def listed(root: Path) -> list[tuple[str, int, bytes | str]]:
        return [
            (
                str(path.relative_to(root)),
                path.lstat().st_mode,
                str(path.readlink()) if path.is_symlink() else path.is_file() and path.read_bytes(),
            )
            for path in sorted(root.rglob("*"))
        ]

    assert listed(tmp_path / "again") == listed(source)
    with pytest.raises(LinuxError, match="again: File exists"):
        vm.get("/tmp/tree", tmp_path / "again")


def test_small_ones_without_a_file(vm: VM) -> None:
    vm.write_file("/tmp/script", "#!/bin/sh\necho ran\n", mode=0o755)
    assert vm.run("/tmp/script").output == "ran\n"
    vm.write_file("/tmp/script", b"")
    assert vm.read_file("/tmp/script") == b""
    assert vm.read_file("/proc/version").startswith(b"Linux version")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", "/none: No such file or directory"),
        ("/dev/null", "/dev/null in the guest is no file"),
        ("/tmp", "/tmp in the guest is no file"),
    ],
)
def test_what_cannot_be_read_is_one_line(vm: VM, path: str, words: str) -> None:
    with pytest.raises(LinuxError, match=words):
        vm.read_file(path)
    assert vm.run("ls /proc/$PPID/fd | wc -l").output == "6\n"  # nothing stays open


def test_a_full_disk_is_said(vm: VM) -> None:
    vm.run("mkdir -p /tmp/small; mount -t tmpfs -o size=64k small /tmp/small").check()
    with pytest.raises(LinuxError, match="/tmp/small/file: No space left on device"):
        vm.write_file("/tmp/small/file", bytes(1 << 20))
