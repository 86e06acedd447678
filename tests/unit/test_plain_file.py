"""Whatever file a user names to be read: a FIFO there is refused, and nobody waits for a writer."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from understudy import plain_file
from understudy.backends.opening import ImageError, open_disk
from understudy.cli import main
from understudy.disk import Disk
from understudy.execution.bt.layout import Layout
from understudy.execution.bt.library import Library
from understudy.execution.bt.translate import translate
from understudy.fleet import plan
from understudy.guests import loader, rom
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.rootfs import source
from understudy.rootfs.tree import Tree
from understudy.vm import VM

CODE = b"\xf4" * 16


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def _tree(file: Path) -> Tree:
    with ExitStack() as given:
        return source.tree(file, given, file.parent)


READERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "itself": (plain_file.read, OSError, "no plain file"),
    "kernel": (lambda file: loader.read(file, "kernel x"), GuestError, "no plain file"),
    "firmware": (rom.read, GuestError, "no plain file"),
    "raw disk": (lambda file: open_disk(Disk(str(file), format="raw")), ImageError, "is no file"),
    "read-only disk": (
        lambda file: open_disk(Disk(str(file), is_read_only=True)), ImageError, "is no file"
    ),
    "qcow2": (
        lambda file: open_disk(Disk(str(file), format="qcow2", is_read_only=True)), ImageError,
        "is no file",
    ),
    "seed": (lambda file: open_disk(Disk(str(file), format="nocloud")), ImageError, "no plain"),
    "host": (plan.read, OSError, "no plain file"),
    "snapshot": (VM.restore, OSError, "no plain file"),
    "archive": (_tree, GuestError, "no plain file"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
def test_it_is_refused_in_one_line(name: str, fifo: Path) -> None:
    read, kind, words = READERS[name]
    with pytest.raises(kind, match=words) as refused:
        read(fifo)
    assert "\n" not in str(refused.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "command",
    [
        ("run", "--kernel"), ("run", "--firmware"), ("run", "--guest", "hello", "--disk"),
        ("up",), ("up", "--check"), ("inspect", "0", "--snapshot"),
    ],
)  # fmt: skip
def test_so_it_is_on_the_command_line(
    command: tuple[str, ...], fifo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(fifo)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("understudy: ") and said.count("\n") == 1
    assert str(fifo) in said


@pytest.mark.timeout(20)
def test_kept_translations_are_made_again(tmp_path: Path) -> None:
    where, cache = Layout(0xFFFF << 47, 64), Cache(tmp_path)
    library = Library(where, is_virtual=True, cache=cache)
    (tmp_path / "translations").mkdir()
    os.mkfifo(tmp_path / library.name)
    library = Library(where, is_virtual=True, cache=cache)
    assert library.find(0x1000, CODE, 0x2000) is None
    library.note(translate(where, 0x2000, CODE, 0x1000, is_virtual=True), CODE)
    library.save()
    assert (tmp_path / library.name).is_file()
    assert Library(where, is_virtual=True, cache=cache).find(0x1000, CODE, 0x2000)


def test_others_are_read_and_folders_called_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"all of it")
    assert plain_file.read(tmp_path / "file") == b"all of it"
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        plain_file.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        plain_file.read(tmp_path / "none")


def test_no_descriptor_is_left(fifo: Path) -> None:
    before = _descriptors()
    for _ in range(3):
        with suppress(OSError):
            plain_file.read(fifo)
    assert _descriptors() == before


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
