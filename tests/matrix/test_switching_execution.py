"""A guest whose technique of execution changes while it runs notices nothing.

What: a run in which the technique changes at random points between all that can hold the guest,
against one that keeps VMX.  Source: none.  Invariant: the same console, instructions, guest time,
registers and memory; each technique really had its turns.
"""

import random
from collections import Counter
from typing import Any

import pytest

from tests.guests.fetched import fetched
from tests.matrix import programs as p
from tests.matrix.lockstep import memory_hash
from understudy.control import actions
from understudy.execution.emulate import Emulate
from understudy.host import Host as SharedHost
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind
from understudy.vm import VM

CPU = "understudy,-pmu,-xsaves"
ALL = ("vmx", "bt", "deprivileged", "emulate")
PROMPT, COMMANDS = b"understudy# ", b"uname -a; ls / | wc -l; poweroff -f\n"
MOST = 4_000_000_000


def run(guest: str, chance: random.Random | None, step: int, **options: Any) -> dict[str, Any]:
    """All that could be seen at its end; `chance`: who changes the technique, and when.

    The interpreter gets a thousandth of a step, as it takes a thousand times as long.
    """
    turns: Counter[str] = Counter()
    with LinuxVM.linux(guest, cpu=CPU, virtualizable_isa=True, **options) as vm:
        said, is_asked = bytearray(), False
        vm.console.on_output.append(said.extend)
        stop = None
        while stop is None or stop.kind is StopKind.BUDGET:
            if PROMPT in said and not is_asked:
                is_asked = True
                vm.console.send(COMMANDS)
            budget = None
            if chance is not None:
                turns[vm.execution] += 1
                short = max(step // 1000, 20) if vm.execution == "emulate" else step
                budget = chance.randrange(1, short)
            elif not is_asked and guest != "hello":
                budget = MOST
            until = None if is_asked else lambda: PROMPT in said
            stop = vm.go(budget=budget, until=until)
            if stop.kind is StopKind.UNTIL:
                stop = None
            elif stop.kind is StopKind.BUDGET and chance is not None:
                name = chance.choice([one for one in ALL if one != vm.execution])
                vm.execution = name
                if "emulate" not in (name, vm.execution) and chance.random() < 0.3:
                    vm.paging = chance.choice(("eager", "lazy", "vtlb"))
        return {
            "turns": turns, "end": stop.kind, "console": bytes(said), "retired": vm.instructions,
            "now": vm.clock.now(), "memory": memory_hash(vm),
            "registers": vm.vcpus[0].registers(), "fx": vm.processors[0].fxsave(),
            "ymm": [vm.processors[0].ymm(n) for n in range(16)],
        }  # fmt: skip


def check(guest: str, step: int, at_least: int, seed: int, **options: Any) -> None:
    expected = run(guest, None, 0, **options)
    got = run(guest, random.Random(seed), step, **options)
    assert expected.pop("end") == got.pop("end") == StopKind.POWEROFF
    assert not expected.pop("turns")
    turns = got.pop("turns")
    assert min(turns[name] for name in ALL) >= at_least, turns
    differ = {name for name in expected if expected[name] != got[name]}
    assert not differ, {name: (expected[name], got[name]) for name in differ - {"memory"}}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_built_in_guest(seed: int) -> None:
    check("hello", 15, 2, seed)


@pytest.mark.parametrize(("guest", "seed"), [("teaching", 1), ("teaching-32", 2)])
def test_the_teaching_kernel(guest: str, seed: int) -> None:
    check(guest, 200_000, 4, seed, append="check", memory="16M")


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_a_whole_boot(guest: str) -> None:
    fetched(guest)
    check(guest, 6_000_000, 20, 3, memory="128M")


def hello(**options: Any) -> VM:
    vm = VM("16M", **options)
    p.start(vm, p.HELLO)
    return vm


def test_the_change_comes_with_the_next_exit() -> None:
    with hello(cpu=CPU) as vm:
        heard: list[str] = []
        vm.console.on_output.append(lambda data: heard.append(vm.execution))
        vm.execution = "emulate"
        assert vm.execution == "vmx"
        assert vm.go().status == 42
        assert set(heard) == {"emulate"} and vm.paging == "ept"
        guest = vm.vcpus[0].guest
        assert isinstance(guest, Emulate) and guest.interpreted > 10


def test_a_paging_technique_that_does_not_go_with_it_changes_too() -> None:
    with hello(cpu=CPU) as vm:
        vm.change_execution("bt")
        assert vm.paging == vm.counts()["paging"] == "eager"
        vm.change_execution("vmx")
        assert (vm.execution, vm.paging) == ("vmx", "eager")
        assert "pmu" not in vm.vcpus[0].model.shown
        assert vm.go().status == 42


def test_a_copy_has_the_technique_of_then() -> None:
    with hello(cpu=CPU, virtualizable_isa=True) as vm:
        vm.go(budget=5)
        vm.change_execution("deprivileged")
        vm.go(budget=3)
        with VM.restore(vm.save()) as copy:
            assert copy.execution == "deprivileged"
            assert copy.go().status == vm.go().status == 42
            assert copy.instructions == vm.instructions


@pytest.mark.parametrize("name", ALL)
def test_no_frame_is_lost(name: str) -> None:
    with hello(cpu=CPU, virtualizable_isa=True, paging="lazy") as vm:
        vm.go(budget=5)
        before = vm.host.frames.free_count
        vm.change_execution(name)
        vm.go(budget=5)
        vm.change_execution("vmx")
        vm.change_paging("ept")
        vm.change_paging("lazy")
        vm.go(budget=5)
        assert vm.host.frames.free_count == before


REFUSED = [
    ("none", {}, "expected one of"),
    ("bt", {"cpu": "understudy"}, "has been shown .*--cpu understudy,-pmu,-xsaves"),
    ("deprivileged", {"cpu": CPU}, "expected --virtualizable-isa"),
    ("pv", {"cpu": CPU}, "a paravirtual kernel is made for its own"),
]


@pytest.mark.parametrize(("name", "options", "why"), REFUSED)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], why: str) -> None:
    with hello(**options) as vm:
        with pytest.raises(ValueError, match=why):
            vm.execution = name
        with pytest.raises(ValueError, match=why):
            actions.execution(vm, {"to": name})
        assert actions.execution(vm, {}) == "vmx"
        assert vm.go().status == 42


def test_processors_that_are_shared_have_one_technique() -> None:
    refused = pytest.raises(ValueError, match="processors VMs do not share")
    with SharedHost(pcpus=1) as host, VM("16M", host=host, cpu=CPU) as vm, refused:
        vm.execution = "emulate"
