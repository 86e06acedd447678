"""Guests with several processors: they find them, start them, and use them.

Source: SDM 3A, "Multiple-Processor (MP) Initialization"; for what Linux says of its processors,
Documentation/admin-guide/cputopology.rst and cpu-hotplug.rst.
Invariant: in virtual time two runs are one, to the last instruction of each processor.
"""

from typing import Any

import pytest

from tests.matrix.lockstep import PROMPT, linux
from understudy.guests.entry import GuestError
from understudy.linux import VM
from understudy.verdict import StopKind

TOPOLOGY = "/sys/devices/system/cpu/cpu*/topology"
STARTED = 200_000_000  # instructions by which both processors run


def booted(guest: str = "cloud-amd64", **options: Any) -> VM:
    """A Linux at its prompt."""
    try:
        return VM.linux(guest, **options)
    except GuestError as problem:
        pytest.skip(f"no guest: {problem}")


@pytest.mark.parametrize("guest", [
    "cloud-amd64",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("amd64", "cloud-amd64-6.12", "686", "686-pae")),
])  # fmt: skip
def test_a_guest_uses_them_all(guest: str) -> None:
    with booted(guest, cpus=2) as vm:
        assert vm.run("nproc").output == "2\n"
        twice = "for n in 1 2; do while :; do :; done & done; sleep 0.2; kill $(jobs -p)"
        before = [vcpu.retired for vcpu in vm.vcpus]
        vm.run(twice)
        both = [vcpu.retired - old for vcpu, old in zip(vm.vcpus, before, strict=True)]
        assert min(both) > max(both) / 2
        assert "warp" not in vm.run("dmesg").output


@pytest.mark.parametrize(
    ("cpus", "threads", "cores"),
    [
        ("4,cores=2,threads=2", ["0-1", "0-1", "2-3", "2-3"], ["0-3"] * 4),
        pytest.param("6,sockets=2", list("012345"), ["0-2"] * 3 + ["3-5"] * 3,
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_they_are_grouped_as_was_asked_for(cpus: str, threads: list[str], cores: list[str]) -> None:
    with booted(cpus=cpus) as vm:
        assert vm.run(f"cat {TOPOLOGY}/core_cpus_list").output.split() == threads
        assert vm.run(f"cat {TOPOLOGY}/package_cpus_list").output.split() == cores


def test_one_goes_and_comes_back() -> None:
    with booted(cpus=2) as vm:
        switch = "/sys/devices/system/cpu/cpu1/online"
        for _ in range(3):
            assert vm.run(f"echo 0 > {switch}; nproc").output == "1\n"
            assert vm.run(f"echo 1 > {switch}; nproc").output == "2\n"


def test_a_reset_starts_them_again() -> None:
    with booted(cpus=2, memory="128M") as vm:
        vm.reset()
        vm.wait_for_prompt()
        assert vm.run("nproc").output == "2\n"


def test_in_real_time_too() -> None:
    with booted(cpus=2, clock="wall") as vm:
        assert vm.run("nproc").output == "2\n"


class Run:
    """A boot of two processors, as far as to where both run."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.take(linux("dbt", "cloud-amd64", cpus=2))

    def take(self, vm: Any) -> None:
        """Go on with this VM."""
        self.vm = vm
        vm.console.on_output.append(self.heard.extend)

    def outcome(self) -> dict[str, Any]:
        """What must be the same in every run."""
        vm = self.vm
        names = {f"exits{n}": vcpu.counts.named_exits() for n, vcpu in enumerate(vm.vcpus)}
        retired = [vcpu.retired for vcpu in vm.vcpus]
        return {"heard": bytes(self.heard), "now": vm.clock.now(), "retired": retired} | names


def test_one_run_is_every_run() -> None:
    outcomes = []
    for budget in (STARTED, STARTED, 7_654_321):
        run = Run()
        with run.vm:
            while (left := STARTED - run.vm.instructions) > 0:
                assert run.vm.go(budget=min(budget, left)).kind == StopKind.BUDGET
            for vcpu in run.vm.vcpus:
                vcpu.leave_guest()
            outcomes.append(run.outcome())
    first, again, chopped = outcomes
    assert min(first["retired"]) > 0
    assert first == again
    assert first == chopped


def test_a_run_goes_on_elsewhere() -> None:
    straight, moved = Run(), Run()
    with straight.vm:
        straight.vm.go(budget=STARTED)
        straight.vm.go(until=lambda: PROMPT in straight.heard)
        expected = straight.outcome()
    moved.vm.go(budget=STARTED)
    saved = moved.vm.save()
    moved.vm.close()
    moved.take(type(moved.vm).restore(saved))
    with moved.vm:
        moved.vm.go(until=lambda: PROMPT in moved.heard)
        assert moved.outcome() == expected
