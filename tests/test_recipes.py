"""Adding a technique is one file: what CONTRIBUTING.md promises, tried in a folder of its own.

(A device is tried in tests/unit/devices, an option in tests/unit/commands/test_vm_options.py.)
Source: CONTRIBUTING.md, the recipes.  Invariant: nothing of understudy/ is edited for it; the class
line is enough.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from understudy.cli import main
from understudy.config import Config
from understudy.execution import Execution
from understudy.guests import hello, loader
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

STUB = '''
"""Execution somewhere else: a technique that is not here yet."""

from understudy.execution.vmx import Vmx


class Elsewhere(Vmx, name="elsewhere"):
    """Has registers, but no way into a guest."""

    def _launch(self, budget):
        raise NotImplementedError("not here")
'''

PAGING = '''
"""A virtual TLB that counts how often it is flushed by a load of CR3."""

from understudy.paging.vtlb import Vtlb


class Counting(Vtlb, name="counting"):
    """The virtual TLB, and one number more."""

    loads = 0

    def cr3_write(self):
        self.loads += 1
        super().cr3_write()
'''

Add = Callable[[str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Writes a module to a folder outside of the package and imports it; undone at the end."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []
    known = dict(Execution.ALL), dict(Paging.ALL)

    def module(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        importlib.import_module(name)

    yield module
    for name in names:
        sys.modules.pop(name, None)
    for registry, before in zip((Execution.ALL, Paging.ALL), known, strict=True):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def test_an_execution_technique_is_one_file(add: Add) -> None:
    add("elsewhere_technique", STUB)
    with VM("16M", execution="elsewhere") as vm:
        vm.enter(loader.load(vm.memory, hello.image()))
        with pytest.raises(NotImplementedError, match="not here"):
            vm.go()
        assert vm.config.execution == "elsewhere"
        assert vm.vcpus[0].guest.registers()["rip"] != 0
    with pytest.raises(ValueError, match=r"expected one of .*elsewhere"):
        VM("16M", execution="nowhere")


def test_a_paging_technique_is_one_file(add: Add, capfd: pytest.CaptureFixture[str]) -> None:
    add("counting_technique", PAGING)
    with VM("16M", paging="counting") as vm:
        vm.enter(loader.load(vm.memory, hello.image()))
        assert vm.go().kind is StopKind.POWEROFF
        assert vm.counts()["paging"] == "counting"
        assert vm.counts()["faults"]["hidden"] > 0
    assert main(["run", "--guest", "hello", "--paging", "counting"]) == 0
    assert "Hello" in capfd.readouterr().out
    assert main(["run", "--guest", "hello", "--paging", "nothing"]) == 2
    assert "counting" in capfd.readouterr().err


def test_two_of_one_name_are_refused(add: Add) -> None:
    add("counting_technique", PAGING)
    with pytest.raises(TypeError, match="two paging techniques are named 'counting'"):
        add("counting_again", PAGING)


def test_an_option_is_one_entry() -> None:
    """What a VM is made of, what a snapshot says of it and the command line come from one field."""
    with VM("16M", largest_page="4K") as vm:
        state = vm._state()
        assert state["config"].keys() == set(Config.__dataclass_fields__)
        assert state["config"]["largest_page"] == "4K"
