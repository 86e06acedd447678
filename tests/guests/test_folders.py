"""Shared folders under Debian's own driver: trees both ways, refusals, snapshots, plugging.

Source: what Linux's tools say; the trees are compared with what is on this computer.
"""

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.guests.test_hotplug import KERNELS as PLUGGED
from tests.guests.test_hotplug import TROUBLE, until, until_gone
from understudy.image_file import SnapshotError
from understudy.linux import VM, LinuxError

pytestmark = pytest.mark.real_guest

KERNELS = [
    ("cloud-amd64", "ept"),
    pytest.param("cloud-amd64-6.12", "vtlb", marks=pytest.mark.slow),
    pytest.param("686-pae", "lazy", marks=pytest.mark.slow),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many sizes, folders in folders, links, permissions."""
    top = tmp_path / "tree"
    for number in range(40):
        folder = top / f"folder {number % 7}" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}").write_bytes(os.urandom(number**3))
    (top / "large").write_bytes(os.urandom(5 << 20) + b"end")
    (top / "program").write_text("#!/bin/sh\necho it runs\n")
    (top / "program").chmod(0o755)
    (top / "private").write_text("x")
    (top / "private").chmod(0o600)
    (top / "link").symlink_to("folder 1/1/file-1")
    (top / "away").symlink_to("../../outside")
    os.link(top / "large", top / "hard")
    return top


def sums(top: Path) -> dict[str, str]:
    """Of all files under it."""
    return {
        str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in top.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def told(output: str) -> dict[str, str]:
    """What sha256sum has printed."""
    rows = (line.split("  ", 1) for line in output.splitlines())
    return {name.removeprefix("./"): digest for digest, name in rows}


@pytest.mark.parametrize(("kernel", "paging"), KERNELS)
def test_a_tree_is_read_and_one_is_written(
    kernel: str, paging: str, tree: Path, tmp_path: Path
) -> None:
    fetched(kernel)
    out = tmp_path / "out"
    out.mkdir()
    folders = [f"{tree}:/srv/in", f"{out},rw"]
    with VM.linux(kernel, paging=paging, folders=folders) as vm:
        summed = "cd {} && find . -type f -exec sha256sum '{{}}' +"
        assert told(vm.run(summed.format("/srv/in")).check().output) == sums(tree)
        assert vm.run("/srv/in/program").output == "it runs\n"
        assert vm.run("readlink /srv/in/away; cat /srv/in/away").output.startswith("../../outside")
        refused = vm.run("echo x >/srv/in/large; rm /srv/in/private; mount -o remount,rw /srv/in")
        assert "Read-only file system" in refused.output
        assert vm.run("echo x >/srv/in/large").status != 0, "the device refuses, too"
        vm.run("mkdir /tmp/t && cp -a /srv/in/. /tmp/t && cp -a /tmp/t /mnt/out/copied").check()
        vm.run("cd /srv/in && tar c . | (mkdir /mnt/out/packed && cd /mnt/out/packed && tar x)")
        vm.run("tar c -C /srv/in . > /mnt/out/all.tar && sync").check()
        assert told(vm.run(summed.format("/mnt/out/copied")).check().output) == sums(tree)
        assert vm.run(TROUBLE).output == ""
    for name in ("copied", "packed"):
        assert sums(out / name) == sums(tree)
        for path in tree.rglob("*"):
            copy = out / name / path.relative_to(tree)
            if path.is_symlink():
                assert copy.readlink() == path.readlink()
            else:
                assert stat.S_IMODE(copy.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)
                assert int(copy.stat().st_mtime) == int(path.stat().st_mtime) or path.is_dir()
    listed = subprocess.run(["tar", "tf", out / "all.tar"], capture_output=True, check=True)
    assert len(listed.stdout.splitlines()) == 1 + len(list(tree.rglob("*")))


def test_what_changes_here_is_seen_there_and_the_reverse(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", folders=[f"{tmp_path}:/mnt,rw"]) as vm:
        (tmp_path / "a").write_text("first\n")
        assert vm.run("cat /mnt/a").output == "first\n"
        (tmp_path / "a").write_text("second, and longer\n")
        assert vm.run("sleep 1.1; cat /mnt/a").output == "second, and longer\n"
        (tmp_path / "a").unlink()
        (tmp_path / "a").mkdir()
        assert vm.run("sleep 1.1; rmdir /mnt/a && echo a > /mnt/a; cat /mnt/a").output == "a\n"
        assert (tmp_path / "a").read_text() == "a\n"
        vm.run("mv /mnt/a /mnt/b; ln /mnt/b /mnt/c; mkfifo /mnt/p; truncate -s 5G /mnt/h").check()
        assert (tmp_path / "c").stat().st_nlink == 2
        assert stat.S_ISFIFO((tmp_path / "p").stat().st_mode)
        assert (tmp_path / "h").stat().st_size == 5 << 30
        end = "echo end | dd of=/mnt/h bs=1 seek=5368709000 conv=notrunc,fsync"
        vm.run(f"{end}; dd if=/mnt/h bs=1 skip=5368709000 count=3").check()
        with (tmp_path / "h").open("rb") as file:
            assert os.pread(file.fileno(), 3, 5368709000) == b"end"
        assert "Operation not permitted" in vm.run("mknod /mnt/d b 7 0").output
        assert "Operation not permitted" in vm.run("chown 1000 /mnt/b").output
        vm.run("chmod 4755 /mnt/b").check()
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755
        busy = "exec 3>/mnt/open; rm /mnt/open; echo unlinked >&3; cat /proc/self/fd/3"
        assert vm.run(busy).output == "unlinked\n"
        assert vm.run("df /mnt | tail -n 1").output.split()[3] != "0"


def test_files_are_mapped(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    (tmp_path / "m").write_bytes(bytes(3 << 12))
    program = (
        "import mmap,os; f=open('/mnt/m','r+b'); m=mmap.mmap(f.fileno(),0); m[4096:4100]=b'data';"
        "m.flush(); p=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); print(p[4096:4100].decode())"
    )
    with VM.linux("cloud-amd64", packages=["python3"], folders=[f"{tmp_path}:/mnt,rw"]) as vm:
        assert vm.run(f'python3 -c "{program}"').check().output == "data\n"
    assert (tmp_path / "m").read_bytes()[4096:4100] == b"data"


READER = "(while :; do find /mnt/tree -type f -exec md5sum '{}' + ; done) >/dev/null 2>&1 & "


def test_two_runs_and_a_snapshot_in_the_middle_of_traffic(tree: Path) -> None:
    """Exact as long as the folder does not change; what was open is open in what was restored."""
    fetched("cloud-amd64")
    ends = []
    for _ in range(2):
        with VM.linux("cloud-amd64", folders=[str(tree)]) as vm:
            vm.run(READER + "exec 7</mnt/tree/large; sleep 1000 &")
            vm.go(budget=30_000_001)
            saved = vm.save()
            with VM.restore(saved, folders=[str(tree)]) as again:
                found = [
                    one.run("cat /mnt/tree/large | md5sum").check().output for one in (vm, again)
                ]
                assert found[0] == found[1]
                assert again.instructions == vm.instructions
                ends.append((found[0], vm.instructions))
    assert ends[0] == ends[1]
    (tree / "large").rename(tree / "other")
    with pytest.raises(SnapshotError, match="the guest has 'large' of the shared folder"):
        VM.restore(saved, folders=[str(tree)])


@pytest.mark.parametrize("kernel", PLUGGED)
def test_a_folder_comes_and_goes_while_it_is_read(kernel: str, tree: Path) -> None:
    fetched(kernel)
    with VM.linux(kernel, hotplug=True) as vm:
        for _ in range(2):
            assert vm.plug(f"share={tree},name=data") == "data"
            until(vm, "mount -t virtiofs data /mnt -o ro 2>/dev/null")
            assert vm.run("/mnt/program").output == "it runs\n"
            vm.run("(while cat /mnt/large; do :; done) >/dev/null 2>&1 &")
            until_gone(vm, "data")
            vm.run("umount -l /mnt; kill %1")
        assert vm.run(TROUBLE).output == ""


def test_where_it_cannot_be_mounted_is_said_in_one_line(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    with (
        VM.linux("cloud-amd64", folders=[f"{tmp_path}:/etc/passwd"]) as vm,
        pytest.raises(LinuxError, match=r"cannot be mounted at /etc/passwd in the guest: Not a di"),
    ):
        vm.run("true")


def test_several_processors_in_real_time(tree: Path, tmp_path: Path) -> None:
    fetched("cloud-amd64")
    folders = [f"{tree}:/in", f"{tmp_path / 'out'}:/out,rw"]
    (tmp_path / "out").mkdir()
    with VM.linux("cloud-amd64", cpus=2, clock="wall", folders=folders) as vm:
        copies = "".join(f"cp -a /in /out/{n} & " for n in range(4))
        vm.run(f"{copies} wait").check()
        assert vm.run(TROUBLE).output == ""
    for n in range(4):
        assert sums(tmp_path / "out" / str(n)) == sums(tree)


def test_it_is_mounted_again_after_a_reset(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    (tmp_path / "a").write_text("content")
    with VM.linux("cloud-amd64", folders=[f"{tmp_path}:/a/b/c"]) as vm:
        for _ in range(2):
            assert vm.run("cat /a/b/c/a").output == "content"
            vm.reset()
