"""Root file systems from folders, archives and image layouts, as guests see them.

Source: what busybox and the kernel in the guest say.
"""

import stat
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.unit.rootfs.layouts import layer, layout
from understudy.guests import debian
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.linux import VM

pytestmark = pytest.mark.real_guest
INIT = b"#!/bin/sh\necho it is mine >/dev/console\nexec sleep 100000\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images are made anew; the kernel and its drivers are those of the usual cache."""
    fetched("cloud-amd64")
    usual, own = Cache().root, tmp_path / "cache" / "understudy"
    own.mkdir(parents=True)
    (own / "items").mkdir()
    for item in (usual / "items").glob("[!r]*"):
        (own / "items" / item.name).symlink_to(item)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return own / "items"


def test_a_folder_without_an_init_gets_a_shell_and_commands(cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "bin" / "busybox").write_bytes(debian.busybox())
    (root / "bin" / "busybox").chmod(0o755)
    for name in ("sh", "cat", "ls", "stat", "id", "echo", "mount", "ps", "hostname"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc" / "secret").write_text("mine\n")
    (root / "etc" / "secret").chmod(0o4640)
    with VM.linux(rootfs=root) as vm:
        assert vm.run("cat /etc/secret; stat -c '%u %g %a' /etc/secret").output == (
            "mine\n0 0 4640\n"
        )
        assert vm.run("ls /").output.split() == [
            "bin", "dev", "etc", "lost+found", "proc", "run", "sys", "tmp",
        ]  # fmt: skip
        vm.wait_for_text("# ")
        vm.send("echo $((6 * 7)) is what the console says\n")
        vm.wait_for_text("42 is what the console says")
        vm.run("echo gone >/etc/secret").check()
        vm.power_off()
    made = {path.name for path in cache.glob("rootfs-*")}
    with VM.linux(rootfs=root) as vm:  # from the cache, as it was
        assert vm.run("cat /etc/secret").output == "mine\n"
    assert len(made) == 1 and {path.name for path in cache.glob("rootfs-*")} == made


def test_a_layout_with_an_init_of_its_own(cache: Path, tmp_path: Path) -> None:
    lower = layer(
        {"bin": None, "bin/busybox": debian.busybox(), "bin/sh": "busybox", "bin/sleep": "busybox",
         "bin/cat": "busybox", "sbin": None, "sbin/init": b"replaced",
         "etc": None, "etc/gone": b"x"}
    )  # fmt: skip
    upper = layer({"sbin/init": INIT, "etc/.wh.gone": b"", "etc/there": b"there\n"})
    with VM.linux(rootfs=layout(tmp_path / "image", [lower, upper])) as vm:
        vm.wait_for_text("it is mine")
        assert vm.run("cat /etc/there; cat /proc/1/cmdline").output.startswith("there\nsleep")
        assert vm.run("cat /etc/gone").status == 1


def test_an_archive_and_what_it_goes_with(cache: Path, tmp_path: Path) -> None:
    archive = tmp_path / "root.tar"
    archive.write_bytes(layer({"bin": None, "bin/sh": debian.busybox()}))
    with VM.linux("cloud-amd64", rootfs=archive) as vm:
        assert vm.run("echo $HOME").output == "/root\n"
    assert stat.S_IMODE(next(cache.glob("rootfs-*/root.qcow2")).stat().st_mode) == 0o444
    for guest in ("debian", "memtest86+", tmp_path / "kernel"):
        with pytest.raises(GuestError, match="root"):
            VM.linux(guest, rootfs=archive)
