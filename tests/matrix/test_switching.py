"""A guest whose paging technique changes while it runs notices nothing.

What: a whole boot, a command and a power-off, with the technique changed round the four every so
many instructions, against a run that keeps one.  Source: none.  Invariant: the same console, the
same instructions, the same guest time.
"""

import itertools

import pytest

from tests.guests.fetched import fetched
from understudy.guests import hello, loader
from understudy.linux import VM
from understudy.verdict import StopKind

PROMPT, COMMANDS = "understudy# ", b"uname -a; ls / | wc -l; poweroff -f\n"
ROUND = ("vtlb", "eager", "lazy", "ept")


def run(guest: str, step: int | None) -> tuple[str, str, int, int, int]:
    """How it ended, what it printed, instructions, guest time; and how often it changed."""
    fetched(guest)
    changes = 0
    with VM.linux(guest, memory="128M") as vm:
        typed = False

        def hear(_data: bytes) -> None:
            nonlocal typed
            if not typed and PROMPT in vm.console_text:
                typed = True
                vm.console.send(COMMANDS)

        vm.console.on_output.append(hear)
        for name in itertools.cycle(ROUND):
            stop = vm.go(budget=step, wall_seconds=600)
            if stop.kind != StopKind.BUDGET:
                return stop.kind, vm.console_text, vm.instructions, vm.clock.now(), changes
            vm.paging = name
            changes += 1
    raise AssertionError("the round has no end")


def check(guest: str, step: int, at_least: int) -> None:
    expected, got = run(guest, None), run(guest, step)
    assert expected[0] == StopKind.POWEROFF
    assert got[:-1] == expected[:-1]
    assert got[-1] >= at_least


@pytest.mark.real_guest
def test_every_few_million_instructions() -> None:
    check("cloud-amd64", 5_000_000, 200)


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686", "686-pae"])
def test_every_few_hundred_thousand_instructions(guest: str) -> None:
    check(guest, 300_000, 900)


def test_a_technique_that_there_is_not_is_refused() -> None:
    with VM("16M") as vm, pytest.raises(ValueError, match="expected one of eager"):
        vm.paging = "none"


def test_the_change_comes_with_the_next_exit() -> None:
    with VM("16M") as vm:
        vm.enter(loader.load(vm.memory, hello.image()))
        vm.paging = "lazy"
        assert vm.paging == "ept"
        vm.vcpus[0].attend()
        assert vm.paging == vm.counts()["paging"] == "lazy"


def test_in_real_mode_too() -> None:
    with VM("16M") as vm:
        vm.paging = "lazy"
        vm.vcpus[0].attend()
        assert vm.paging == vm.counts()["paging"] == "lazy"
