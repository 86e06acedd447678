"""What a VM starts with, decided before there is a VM."""

import shutil
from pathlib import Path

import pytest

from tests.unit.guests.disks import ext4
from tests.unit.test_plugging import agree
from understudy import cli, starting
from understudy.backends.qcow2_new import create
from understudy.config import Config
from understudy.guests import hello
from understudy.guests.entry import GuestError
from understudy.guests.release import usual
from understudy.linux import VM


@pytest.mark.parametrize(
    ("guest", "said", "has_passt", "kinds"),
    [
        ("debian", (), True, ["user"]),
        ("debian-12", (), False, []),
        ("debian", ("none",), True, ["none"]),
        ("cloud-amd64", (), True, []),
        (Path("debian"), (), True, []),
        (None, (), True, []),
    ],
)
def test_a_whole_debian_has_a_network_where_passt_is(
    guest: str | Path | None,
    said: tuple[str, ...],
    has_passt: bool,
    kinds: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/passt" if has_passt else None)
    assert [nic.kind for nic in usual(guest, Config(net=said)).net] == kinds


def test_a_whole_debians_disk_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    image = tmp_path / "cache" / "debian-12" / "disk-1.qcow2"
    create(image, 1 << 20)
    config = Config(disks=("data.img",))
    own, data = starting.with_image(config, image).disks
    assert own.file == str(tmp_path / "understudy" / "debian-12.qcow2")
    assert data.file.endswith("data.img")
    forgotten = starting.with_image(Config(snapshot=True), image)
    assert [disk.file for disk in forgotten.disks] == [str(image)]


def test_nothing_to_start() -> None:
    with pytest.raises(GuestError, match="without a guest, a kernel or a disk"):
        VM.linux(None)


def test_a_disk_with_nothing_to_boot_from(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with pytest.raises(GuestError, match="the first disk has no file system that is known here"):
        VM.linux(None, disks=[str(disk)])
    with pytest.raises(GuestError, match="packages go with a guest by name"):
        VM.linux(None, disks=[str(disk)], packages=["hello"])


def test_it_is_said_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk, seed = tmp_path / "disk.img", tmp_path / "user-data"
    disk.write_bytes(bytes(1 << 20))
    seed.write_bytes(b"no user-data\n")
    assert cli.main(["run", "--disk", str(disk)]) == 1
    line = "understudy: the first disk has no file system that is known here, to boot from: "
    assert capsys.readouterr().err.startswith(line)
    assert cli.main(["run", "--disk", str(disk), "--seed", str(seed)]) == 1
    assert f"seed {seed} does not begin as user-data" in capsys.readouterr().err


def bootable(folder: Path) -> Path:
    """A disk that starts a guest which halts."""
    files: dict[str, bytes | str] = {
        "boot/extlinux/extlinux.conf": b"label a\nlinux /kernel\n", "kernel": hello.image(),
    }  # fmt: skip
    disk = folder / "boot.img"
    disk.write_bytes(ext4(folder, files))
    return disk


def test_it_starts_again_from_the_same_disk_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data.img"
    data.write_bytes(bytes(1 << 20))
    disks = [f"{bootable(tmp_path)},ro", f"{data},ro,name=data"]
    with VM.linux(None, disks=disks, hotplug=True) as vm:
        vm.unplug("disk0")
        agree(vm)
        with pytest.raises(GuestError, match="disk0, from which the VM started, was unplugged"):
            vm.reset()
        vm.plug(f"disk={disks[0]}")
        assert list(vm.pc.parts)[-2:] == ["data", "disk0"]
        vm.reset()
