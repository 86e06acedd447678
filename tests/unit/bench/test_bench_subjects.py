"""The adapter to understudy, held to the interface that it uses (`VM.linux`, `go`, two ports)."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench.build import Built
from bench.markers import Failed
from bench.subjects import Understudy


class Port:
    """A serial port: what it was sent, and who listens to it."""

    def __init__(self) -> None:
        self.on_output: list[Callable[[bytes], object]] = [lambda data: pytest.fail("the agent")]
        self.sent = b""

    def send(self, data: bytes) -> None:
        self.sent += data


class Machine:
    """A VM that says one line of `script` at each step, until it is told to stop or has no more."""

    def __init__(self, script: list[bytes]) -> None:
        self.script, self.com2, self.console = script, Port(), SimpleNamespace(on_output=[])
        self.closed = False

    def go(self, *, until: Callable[[], bool], wall_seconds: float) -> Any:
        while not until():
            if not self.script:
                return SimpleNamespace(kind="triple-fault", detail="rip=0")
            for listener in self.com2.on_output:
                listener(self.script.pop(0))
        return SimpleNamespace(kind="until", detail="")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def place(tmp_path: Path) -> Understudy:
    return Understudy(tmp_path / "vmlinuz", Built(tmp_path, tmp_path, tmp_path), tmp_path)


def pretend(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes `understudy.linux` give out `machine`; the answer collects how it was asked for."""
    asked: list[dict[str, Any]] = []

    def linux(kernel: Path, **options: Any) -> Machine:
        asked.append({"kernel": kernel, **options})
        return machine

    module = ModuleType("understudy.linux")
    module.VM = SimpleNamespace(linux=linux)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "understudy.linux", module)
    return asked


def test_a_program_runs_by_the_second_serial_port(
    place: Understudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine([b"R\n", b"S\n", b"E 1234\n", b"X 0\n"])
    asked = pretend(machine, monkeypatch)

    assert place.start(tmp_path / "bench.cpio") > 0
    sample = place.run(["bench/crc", "5"], 60)
    place.stop()

    assert (asked[0]["clock"], asked[0]["initrd"].name) == ("wall", "bench.cpio")
    assert machine.com2.sent == b"run bench/crc 5\n"
    assert sample.checksum == "1234"
    assert machine.closed


def test_a_guest_that_dies_is_a_failure_with_its_reason(
    place: Understudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(Machine([b"R\n", b"S\n"]), monkeypatch)
    place.start(tmp_path)
    with pytest.raises(Failed, match="triple-fault"):
        place.run(["bench/crc", "5"], 60)
    place.stop()
