"""What is said about a shared folder: on the command line, in Python, in a snapshot."""

import json
from pathlib import Path
from typing import Any

import pytest

from understudy import state
from understudy.backends.folder import ShareError
from understudy.config import Config
from understudy.devices.virtio.fs import Fs
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
