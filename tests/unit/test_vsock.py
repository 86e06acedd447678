"""What is said about a VM's socket to its host: on the command line, in Python, in a snapshot."""

import json
from pathlib import Path
from typing import Any

import pytest

from understudy import state
from understudy.backends.unix_ports import VsockError
from understudy.config import Config
from understudy.devices.virtio.vsock import Vsock as Part
from understudy.image_file import SnapshotError
from understudy.linux import VM, LinuxError
from understudy.vsock import Vsock


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b", Vsock("/a/b")),
        ("/a,,b,cid=77,name=door", Vsock("/a,b", 77, name="door")),
    ],
)
def test_words_of_the_command_line(text: str, expected: Vsock) -> None:
    assert Vsock.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a,cid=x", r"^vsock '/a,cid=x': expected PATH\[,cid=N\]"),
        ("/a,cid=2", "expected cid= from 3 to 4294967294"),
        ("/a,cid=4294967295", "expected cid= from 3"),
        (",cid=3", "expected PATH"),
        ("", "expected PATH"),
        ("/a,name=A", "name= of at most"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Vsock.parse(text)


@pytest.mark.parametrize("wrong", [7, [None], ["/a", "/b"], ["/a,b"]])
def test_a_vm_has_one(wrong: Any) -> None:
    with pytest.raises(ValueError, match="vsock"):
        Config(vsock=wrong)


def test_plain_values_and_back() -> None:
    config = Config(vsock="/a,cid=9")  # type: ignore[arg-type]
    assert state.restore(Config, json.loads(json.dumps(state.plain(config)))) == config
    assert config.has_outside and config.is_linked and config.has_virtio_agent


def test_a_path_in_use_is_one_line_and_a_vm_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "v"
    with VM("16M", vsock=str(path)):
        with pytest.raises(VsockError, match="another VM has it") as refused:
            VM("16M", vsock=str(path))
        assert "\n" not in str(refused.value) and path.is_socket()
    assert not path.exists()


def test_a_snapshot_has_no_path(tmp_path: Path) -> None:
    path, other = tmp_path / "v", tmp_path / "w"
    with VM("16M", vsock=f"{path},cid=7") as vm:
        saved = vm.save()
        with vm.snapshot() as moment, moment.fork(1)[0] as clone:
            part = clone.pc.part("vsock0", Part)
            assert (part.cid, part.ports) == (7, None)
    with VM.restore(saved) as again:
        assert again.pc.part("vsock0", Part).ports is None and not path.exists()
    with VM.restore(saved, vsock=str(other)) as again:
        assert other.is_socket()
        assert again.pc.part("vsock0", Part).cid == 7
    with VM("16M") as vm:
        plain = vm.save()
    with pytest.raises(SnapshotError, match="has 0 vsocks"):
        VM.restore(plain, vsock=str(other))


def test_who_connects_while_there_is_no_driver_is_told(tmp_path: Path) -> None:
    with VM("16M", vsock=str(tmp_path / "v")) as vm:
        with pytest.raises(LinuxError, match="has no driver of its vsock"):
            vm.vsock(1)
        with pytest.raises(ValueError, match="port -1"):
            vm.vsock(-1)
    with VM("16M") as vm, pytest.raises(LinuxError, match="has no vsock: say vsock=PATH"):
        vm.vsock(1)
