"""The recipes of docs/: a technique, an option, a part of a snapshot is one file or one entry.

What: files in a temporary folder, outside the package, that do what the guides say, and are then
chosen by name.  (For a device: tests/unit/devices/test_board.py.)  Source: docs/adding-*.md.
Invariant: nothing of the project is changed for it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.programs import HELLO, start
from understudy import cli
from understudy import config as configuration
from understudy.config import Config, check_choice, option
from understudy.execution import Execution
from understudy.paging import Paging
from understudy.state import plain, restore
from understudy.verdict import StopKind
from understudy.vm import VM

Drop = Callable[[str, str], Any]
Run = Callable[..., tuple[int, str, str]]

NOWHERE = '''
"""Execution nowhere: the guest cannot be entered."""

from collections import defaultdict

from understudy.execution import Execution
from understudy.guest import CannotExecute, Control, Guest

ANSWERS = {"registers": defaultdict(int), "control": Control(0, 0, 0, 0), "fxsave": bytes(512)}


def answer(name):
    value = ANSWERS.get(name, 0)
    if isinstance(getattr(Execution, name), property):
        return property(lambda self: value, lambda self, new: None)
    return lambda self, *given, **options: value


class Nowhere(Execution, name="nowhere"):
    """All of the port that there must be, and nothing behind it."""

    locals().update({name: answer(name) for name in Execution.__abstractmethods__})

    def __init__(self, host, processor, paging, model, *, keep_timer=True, exits=()):
        Guest.__init__(self)
        self.processor, self.table, self.timer_shift = processor, {}, 0
        self.read_gpr, self.write_gpr = (lambda n: 0), (lambda n, v: None)
        self.advance, self.arm = (lambda ticks: 0), (lambda ticks: None)
        self.count_retired = self.read_tsc = lambda: 0
        self.read_pmu, self.write_pmu = (lambda index: 0), (lambda index, value: None)
        self.take_pmu_interrupt = lambda: None
        self.view = paging.attach(self)

    def resume(self, budget):
        raise CannotExecute("not here")

    def close(self):
        pass
'''

TWIN = '''
"""A twin of the virtual TLB, for a test."""

from understudy.paging.vtlb import Vtlb, VtlbView


class TwinView(VtlbView):
    """It counts its flushes twice."""

    def flush(self):
        super().flush()
        self.paging.flushes += 1


class Twin(Vtlb, name="twin"):
    """The same under another name."""

    def new_view(self, guest):
        return TwinView(self, guest)
'''


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    """Write a file into a folder and import it: all that somebody does who adds a technique."""
    before = [(kinds, dict(kinds)) for kinds in (Execution.ALL, Paging.ALL)]
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def write(name: str, source: str) -> Any:
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        return importlib.import_module(name)

    yield write
    for kinds, old in before:
        kinds.clear()
        kinds.update(old)  # type: ignore[arg-type]
    for name in names:
        del sys.modules[name]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, where the new files are known."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["understudy", *arguments])
        try:
            status = cli.main()
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return int(status or 0), out, err

    return command


# --- An execution technique ---


def test_an_execution_technique_is_one_file(drop: Drop, run: Run) -> None:
    drop("nowhere_for_the_test", NOWHERE)
    with VM("16M", execution="nowhere") as vm:
        stop = vm.go()
        assert (stop.kind, stop.detail.partition("\n")[0]) == (StopKind.ERROR, "not here")
        assert vm.config.execution == "nowhere"
    with pytest.raises(ValueError, match=r"expected one of .*nowhere.*vmx|vmx.*nowhere"):
        VM("16M", execution="elsewhere")
    _, out, _ = run("run", "--execution", "help")
    assert "nowhere Execution nowhere: the guest cannot be entered" in " ".join(out.split())
    status, _, err = run("run", "--guest", "hello", "--execution", "nowhere")
    assert status
    assert "not here" in err
    assert "Traceback" not in err


# --- A paging technique ---


def test_a_paging_technique_is_one_file(drop: Drop, run: Run) -> None:
    drop("twin_for_the_test", TWIN)
    printed = bytearray()
    with VM("16M", paging="twin") as vm, VM("16M", paging="vtlb") as other:
        vm.console.on_output.append(printed.extend)
        for one in (vm, other):
            start(one, HELLO)
            assert one.go().status == 42
        assert printed == b"hello\n"
        assert vm.counts()["flushes"] == 2 * other.counts()["flushes"] > 0
        with VM.restore(vm.save()) as copy:
            assert copy.paging == "twin"
        vm.change_paging("ept")
        vm.change_paging("twin")
    _, out, _ = run("run", "--paging", "help")
    assert "twin   A twin of the virtual TLB, for a test" in out
    status, _, err = run("run", "--guest", "hello", "--paging", "none")
    assert status
    assert "expected one of eager, ept, lazy, pv, twin, vtlb" in err
    status, out, _ = run("run", "--guest", "hello", "--paging", "twin")
    assert status == 0
    assert "ello" in out


# --- An option, a part of a snapshot ---


def test_an_option_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is in tests/unit/commands/test_vm_options.py; here is all the rest."""

    @dataclass(frozen=True)
    class More(Config):
        color: str = option(
            "red",
            "Its color.",
            "--color",
            check=lambda what, v: check_choice(what, v, ("red", "tan")),
        )

    monkeypatch.setattr("understudy.vm.Config", More)
    with VM("16M", color="tan") as vm:
        start(vm, HELLO)
        with VM.restore(vm.save()) as copy:
            assert copy.config == vm.config == More("16M", color="tan")
    with pytest.raises(ValueError, match=r"^color 'blue': expected one of red, tan$"):
        VM(color="blue")
    assert restore(More, plain(More(color="tan"))).color == "tan"
    assert configuration.Config is Config


def test_a_part_of_a_snapshot_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Diary:
        """Keeps what was written."""

        def __init__(self) -> None:
            self.lines: list[str] = []

        def save(self) -> dict[str, Any]:
            return {"lines": list(self.lines)}

        def load(self, saved: dict[str, Any]) -> None:
            self.lines = restore(list[str], saved["lines"], "diary")

    class WithDiary(VM):
        def _make(self, *given: Any) -> None:
            super()._make(*given)
            self.diary = Diary()

        @property
        def parts(self) -> dict[str, Any]:
            return {**super().parts, "diary": self.diary}

    with WithDiary("16M") as vm:
        start(vm, HELLO)
        vm.diary.lines.append("began")
        with vm.snapshot() as image:
            (clone,) = image.fork()
            vm.diary.lines.append("went on")
            assert clone.diary.lines == ["began"]
            clone.close()
        with WithDiary.restore(vm.save()) as copy:
            assert copy.diary.lines == ["began", "went on"]
