"""What is said about a disk: on the command line, in Python, in a snapshot."""

import json
from pathlib import Path
from typing import Any

import pytest

from understudy import state
from understudy.config import Config
from understudy.devices.virtio.blk import Blk
from understudy.devices.virtio.net import Net
from understudy.disk import Disk
from understudy.vm import VM


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b.img", Disk("/a/b.img")),
        ("/a,,b.img,ro", Disk("/a,b.img", is_read_only=True)),
        (
            "/b,overlay,format=raw,serial=S-1,on-error=stop",
            Disk("/b", is_overlay=True, format="raw", serial="S-1", on_error="stop"),
        ),
    ],
)
def test_words_of_the_command_line(text: str, expected: Disk) -> None:
    assert Disk.parse(text) == expected


def test_a_file_is_found_from_another_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Disk("x.img").file == str(tmp_path / "x.img")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a,rw", r"^disk '/a,rw': expected FILE\[,ro\].*, not 'rw'; a comma in a file's name"),
        ("/a,", "not ''"),
        ("/a,ro=1", "not 'ro=1'"),
        ("/a,format=vdi", "^disk '/a': expected format=auto or raw or qcow2 or nocloud$"),
        ("/a,on-error=panic", "expected on-error=report or stop"),
        ("/a,serial=" + "x" * 21, "at most 20 characters"),
        (",ro", "expected the path of a file"),
        ("", "expected the path of a file"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Disk.parse(text)


@pytest.mark.parametrize("wrong", [7, [7], [None], {"a": 1}.values(), ["/a"] * 25, ["/a,rw"]])
def test_disks_of_a_vm_are_disks(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"disk"):
        Config(disks=wrong)


def test_a_snapshot_keeps_them() -> None:
    config = Config(disks=["/a,ro", Disk("/b", serial="x")], snapshot=True)  # type: ignore[arg-type]
    assert config.disks == (Disk("/a", is_read_only=True), Disk("/b", serial="x"))
    assert Config(disks="/a").disks == (Disk("/a"),)  # type: ignore[arg-type]
    kept = json.loads(json.dumps(state.plain(config)))
    assert state.restore(Config, kept) == config
    kept["disks"][0]["is_read_only"] = "yes"
    with pytest.raises(ValueError, match="is_read_only"):
        state.restore(Config, kept)


def test_a_disk_has_a_queue_for_each_processor_however_these_are_grouped(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    with VM("16M", cpus="4,cores=2,threads=2", disks=[f"{image},ro"], net="none") as vm:
        assert len(vm.pc.part("disk0", Blk).sizes) == 4
        assert len(vm.pc.part("net0", Net).sizes) == 9


def test_a_limit_of_speed() -> None:
    assert Disk.parse("/a,rate=50M").rate == 50_000_000
    for text, words in (("/a,rate=fast", "bytes a second"), ("/a,rate=1K", "4K to 1000G")):
        with pytest.raises(ValueError, match=words):
            Disk.parse(text)
