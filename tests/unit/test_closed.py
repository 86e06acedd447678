"""A closed thing says so, for each of its public names."""

import inspect

import pytest

from tests.unit.fakes import fake_machine
from understudy.closed import says_closed
from understudy.linux import VM

STILL = {
    "name", "engine", "clock_kind", "close", "console_text", "on_slice", "last_words",
    "state_in_words", "restore", "linux", "whole", "root_of",
}  # fmt: skip


def test_methods_and_properties_but_those_that_are_named() -> None:
    @says_closed("color")
    class Thing:
        name, is_closed = "thing", False
        color = property(lambda self: "red")
        size = property(lambda self: 3, lambda self, value: None)

        def grow(self, by: int) -> int:
            return by

    thing = Thing()
    assert (thing.size, thing.grow(2)) == (3, 2)
    thing.is_closed = True
    assert thing.color == "red"
    with pytest.raises(RuntimeError, match=r"^thing is closed$"):
        thing.grow(2)
    with pytest.raises(RuntimeError, match=r"^thing is closed$"):
        _ = thing.size
    with pytest.raises(RuntimeError, match=r"^thing is closed$"):
        thing.size = 7


def test_every_method_of_a_closed_vm_says_so() -> None:
    with fake_machine():
        vm = VM("16M")
        vm.close()
        vm.close()
        names = [n for n in dir(VM) if not n.startswith("_") and n not in STILL]
        assert {"go", "counts", "run", "save", "describe", "inspect", "paging"} <= set(names)
        for name in names:
            attribute = inspect.getattr_static(VM, name)
            with pytest.raises(RuntimeError, match=r"^vm is closed$"):
                if isinstance(attribute, property):
                    getattr(vm, name)
                else:
                    getattr(vm, name)("", "", "", "")
        assert vm.console_text == ""
