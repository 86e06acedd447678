"""What is said about a shared folder: on the command line, in Python, in a snapshot."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.backends.real_virtiofsd import needs_virtiofsd
from tests.unit.devices.virtio.test_fs_daemon import Function, obedient
from understudy import state
from understudy.backends import virtiofsd
from understudy.backends.folder import ShareError
from understudy.config import Config
from understudy.control import ControlError, actions
from understudy.devices.virtio.fs import Fs
from understudy.devices.virtio.fs_daemon import Daemon
from understudy.image_file import SnapshotError
from understudy.share import Share
from understudy.vm import VM


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b", Share("/a/b", "/mnt/b")),
        ("/a/b/:/c/d/", Share("/a/b", "/c/d")),
        ("/a,,b:/c,rw", Share("/a,b", "/c", is_writable=True)),
        ("/a:b,ro,name=one", Share("/a:b", "/mnt/a:b", name="one")),
        ("/", Share("/", "/mnt/host")),
        ("/a,rw,server=auto", Share("/a", is_writable=True, server="auto")),
    ],
)
def test_words_of_the_command_line(text: str, expected: Share) -> None:
    assert Share.parse(text) == expected


def test_a_folder_is_found_from_another_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Share("x").folder, Share(".").mount) == (str(tmp_path / "x"), f"/mnt/{tmp_path.name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a,w", r"^share '/a,w': expected FOLDER\[:MOUNT\].*, not 'w'; a comma in a folder's"),
        ("", "expected the path of a folder"),
        ("/a:/", "expected a place in the guest like /mnt/data"),
        ("/a:/b/../c", "not '/b/../c'"),
        ("/a:/" + "x" * 1024, "expected a place in the guest"),
        ("/a,server=qemu", "expected server= one of python, virtiofsd, auto"),
        ("/a,name=A", "name= of at most 20 small letters"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Share.parse(text)


@pytest.mark.parametrize("wrong", [7, [7], [None], ["/a"] * 9, ["/a,w"]])
def test_folders_of_a_vm_are_folders(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"share|folders"):
        Config(folders=wrong)


def test_two_folders_at_one_place() -> None:
    with pytest.raises(ValueError, match="folders: 2 of them are to be at /mnt/a, expected one"):
        Config(folders=["/x/a", "/y/a"])  # type: ignore[arg-type]
    assert len(Config(folders=["/x/a", "/y/a:/mnt/b"]).folders) == 2  # type: ignore[arg-type]


def test_plain_values_and_back() -> None:
    config = Config(folders=["/a,rw", Share("/b", "/c")])  # type: ignore[arg-type]
    assert state.restore(Config, json.loads(json.dumps(state.plain(config)))) == config


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, words in ((tmp_path / "none", "there is no such folder"), (file, "a file, and a")):
        with pytest.raises(ShareError, match=words) as refused:
            VM("16M", folders=[str(path)])
        assert "\n" not in str(refused.value)


def test_a_snapshot_opens_no_folder_by_itself(tmp_path: Path) -> None:
    with VM("16M", folders=[f"{tmp_path},rw"]) as vm:
        part = vm.pc.part("share0", Fs)
        assert part.folder is not None and part.folder.is_writable
        saved = vm.save()
        with vm.snapshot() as moment, moment.fork(1)[0] as clone:
            assert clone.config.folders == vm.config.folders
    with pytest.raises(SnapshotError, match=r"the snapshot's VM has folders .*say which they are"):
        VM.restore(saved)
    with VM.restore(saved, folders=[str(tmp_path)]) as again:
        part = again.pc.part("share0", Fs)
        assert part.folder is not None and not part.folder.is_writable


def _server(vm: VM) -> str:
    part = vm.pc.part("share0", Fs)
    assert (part.folder is None) != (part.daemon is None)
    return "python" if part.daemon is None else "virtiofsd"


def test_in_virtual_time_python_serves(tmp_path: Path) -> None:
    with VM("16M", folders=[f"{tmp_path},server=auto"]) as vm:
        assert _server(vm) == "python"
    with pytest.raises(ValueError, match="expected clock wall, or server=python") as refused:
        VM("16M", folders=[f"{tmp_path},server=virtiofsd"])
    assert "\n" not in str(refused.value)


def test_without_virtiofsd_python_serves_who_has_not_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(virtiofsd, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with VM("16M", clock="wall", folders=[f"{tmp_path},server=auto"]) as vm:
        assert _server(vm) == "python"
    with pytest.raises(ShareError, match="there is no virtiofsd on this computer"):
        VM("16M", clock="wall", folders=[f"{tmp_path},server=virtiofsd"])
    with pytest.raises(ShareError, match="there is no such folder"):
        VM("16M", clock="wall", folders=[f"{tmp_path}/none,server=auto"])


@needs_virtiofsd
def test_a_snapshot_of_one_is_a_snapshot_for_the_other(tmp_path: Path) -> None:
    for server, other in (("auto", "python"), ("virtiofsd", "auto"), ("python", "virtiofsd")):
        with VM("16M", clock="wall", folders=[f"{tmp_path},server={server}"]) as vm:
            assert _server(vm) == ("python" if server == "python" else "virtiofsd")
            saved = vm.save()
        with VM.restore(saved, folders=[f"{tmp_path},server={other}"]) as again:
            assert _server(again) == ("python" if other == "python" else "virtiofsd")


def test_a_mounted_folder_of_virtiofsd_refuses_a_snapshot_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VM("16M", folders=[str(tmp_path)]) as vm:
        part, daemon = vm.pc.part("share0", Fs), Daemon(tmp_path, Function(obedient))
        daemon.is_mounted = True
        monkeypatch.setattr(part, "daemon", daemon)
        for attempt in (vm.save, vm.snapshot, lambda: vm.write(tmp_path / "x")):
            with pytest.raises(ShareError, match="unmount it in the guest before a snapshot"):
                attempt()
        with pytest.raises(ControlError, match="unmount it in the guest") as refused:
            actions.save(vm, {"file": str(tmp_path / "x")})
        assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())
