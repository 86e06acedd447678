"""The stages in which a Debian is made, in a VM that plays a script."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.backends.qcow2_file import content
from understudy.agent.result import LinuxError, Result
from understudy.config import Config
from understudy.guests.entry import GuestError
from understudy.whole_debian import making


class Scripted:
    """A VM: what each stage prints, and with which status it ends."""

    def __init__(self, answers: dict[str, tuple[str, int]] | None = None) -> None:
        self.answers, self.log = answers or {}, list[str]()
        self.configs: list[Config] = []

    @contextmanager
    def boot(self, config: Config) -> Iterator["Scripted"]:
        self.configs.append(config)
        self.log.append("boot")
        yield self

    def run(
        self, command: str, *, timeout_guest_s: float, timeout_wall_s: float,
        on_output: Callable[[bytes], None],
    ) -> Result:  # fmt: skip
        stage = command.split()[-1]
        self.log.append(stage)
        if stage == "stop":
            raise LinuxError("the guest ended")
        text, status = self.answers.get(stage, ("", 0))
        for at in range(0, len(text), 7):
            on_output(text[at : at + 7].encode())
        return Result(text, status, text.encode(), text.encode(), b"", None)

    def write_file(self, path: str, data: bytes) -> None:
        assert data.startswith(b"#!/bin/busybox sh\n")
        self.log.append(path)

    def power_off(self) -> None:
        self.log.append("off")


def _carry_out(vm: Scripted, stages: dict[str, str]) -> list[tuple[str, float | None]]:
    told: list[tuple[str, float | None]] = []
    making.carry_out(
        vm.boot, Path("/d/disk.img"), Path("/d/packages.tar"), b"#!/bin/busybox sh\n", stages,
        4, lambda text, share: told.append((text, share)),
    )  # fmt: skip
    return told


def test_stages_in_their_order_between_open_and_close() -> None:
    said = "Unpacking one (1) ...\nPreparing\nUnpacking two (2) ...\n"
    vm = Scripted({"unpack": (said, 0)})
    told = _carry_out(vm, {"spread": "", "unpack": "Unpacking packages"})
    assert vm.log == ["boot", "/second-stage", "open", "spread", "unpack", "close", "off"]
    assert [one for one in told if one[1] is not None] == [
        ("Unpacking packages", 0.25), ("Unpacking packages", 0.5),
    ]  # fmt: skip
    (config,) = vm.configs
    assert config.clock == "virtual"  # two runs are the same run
    assert [(disk.is_read_only, disk.format) for disk in config.disks] == [
        (False, "auto"), (True, "raw"),
    ]  # fmt: skip


def test_a_stage_that_fails_is_said_in_a_line() -> None:
    said = "Setting up x\ndpkg: error processing package x (--configure):\nErrors were met\n x\n"
    vm = Scripted({"configure": (said, 1)})
    words = "the stage configure ended with status 1: Errors were met"
    with pytest.raises(GuestError, match=words):
        _carry_out(vm, {"configure": "Configuring", "settle": ""})
    assert "settle" not in vm.log and "off" not in vm.log
    with pytest.raises(GuestError, match="making a disk: the guest ended"):
        _carry_out(Scripted(), {"stop": ""})
    with pytest.raises(GuestError, match="it said nothing"):
        _carry_out(Scripted({"settle": ("", 2)}), {"settle": ""})


def _mke2fs(tmp_path: Path, name: str) -> bytes:
    file = tmp_path / name
    making.file_system(file, making.uuid_of("a key"), "x", making.SIZE)
    assert file.stat().st_size == making.SIZE
    assert file.stat().st_blocks * 512 < making.SIZE // 16
    image = tmp_path / f"{name}.qcow2"
    making.packed(file, image)
    return image.read_bytes()


def test_an_empty_file_system_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    first = _mke2fs(tmp_path, "a")
    assert _mke2fs(tmp_path, "b") == first
    assert making.uuid_of("a key") != making.uuid_of("another")


def test_no_program_for_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making.shutil, "which", lambda name, path: None)
    with pytest.raises(GuestError, match="install e2fsprogs"):
        making.file_system(tmp_path / "x", making.uuid_of("x"), "x", making.SIZE)


def test_a_program_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mke2fs").write_text("#!/bin/sh\necho a >&2; echo no room >&2; exit 1\n")
    (tmp_path / "mke2fs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(GuestError, match="mke2fs cannot make a file system: no room"):
        making.file_system(tmp_path / "x", making.uuid_of("x"), "x", making.SIZE)


def test_packed_and_copied_are_the_same_content(tmp_path: Path) -> None:
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    raw, image, copy = (tmp_path / name for name in ("raw", "image.qcow2", "copy"))
    with raw.open("wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), b"here" * 50_000, 1_000_000)
        os.pwrite(file.fileno(), bytes(1 << 17), 3 << 20)
        os.pwrite(file.fileno(), b"end", (8 << 20) - 3)
    making.packed(raw, image)
    making.copied(raw, copy)
    expected = raw.read_bytes()
    assert content(image) == expected == copy.read_bytes()
    assert image.stat().st_size < 1 << 20
    assert copy.stat().st_blocks <= raw.stat().st_blocks
