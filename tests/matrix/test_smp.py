"""Guests with several processors: they find them, start them, and use them.

Source: SDM 3A, "Multiple-Processor (MP) Initialization"; for what Linux says of its processors,
Documentation/admin-guide/cputopology.rst and cpu-hotplug.rst.
Invariant: in virtual time two runs are one, to the last instruction of each processor.
"""

import itertools
import math
import re
from typing import Any

import pytest

from tests.guests.fetched import KERNELS
from tests.matrix.lockstep import PROMPT, linux
from understudy.guests.entry import GuestError
from understudy.linux import VM
from understudy.paging import Paging
from understudy.quantities import bytes_of
from understudy.vcpu.cpu_model import BRAND
from understudy.verdict import StopKind

TOPOLOGY = "/sys/devices/system/cpu/cpu*/topology"
TECHNIQUES = sorted(Paging.ALL)
STARTED = 200_000_000  # instructions by which both processors run


def booted(guest: str = "cloud-amd64", **options: Any) -> VM:
    """A Linux at its prompt."""
    try:
        return VM.linux(guest, **options)
    except GuestError as problem:
        pytest.skip(f"no guest: {problem}")


def rows() -> list[object]:
    """Every guest under every technique."""
    found = []
    for guest, paging, cpus in itertools.product(KERNELS, TECHNIQUES, (2, 4)):
        is_quick = guest in ("cloud-amd64", "686-pae") and paging in ("ept", "lazy") and cpus == 2
        marks = [] if is_quick else [pytest.mark.slow]
        found.append(pytest.param(guest, paging, cpus, marks=marks, id=f"{guest}-{paging}-{cpus}"))
    return found


@pytest.mark.parametrize(("guest", "paging", "cpus"), rows())
def test_a_guest_uses_them_all(guest: str, paging: str, cpus: int) -> None:
    with booted(guest, cpus=cpus, paging=paging) as vm:
        assert vm.run("nproc").output == f"{cpus}\n"
        assert vm.counts()["real_mode"] == (0 if paging == "ept" else cpus - 1)
        busy(vm)
        assert "warp" not in vm.run("dmesg").output


def busy(vm: VM) -> None:
    """All processors have something to do, and do it."""
    count = len(vm.vcpus)
    numbers = " ".join(map(str, range(count)))
    before = [vcpu.retired for vcpu in vm.vcpus]
    vm.run(f"for n in {numbers}; do while :; do :; done & done; sleep 0.4; kill $(jobs -p)")
    each = [vcpu.retired - old for vcpu, old in zip(vm.vcpus, before, strict=True)]
    assert min(each) > max(each) / 3, each


def test_the_technique_changes_while_they_run() -> None:
    with booted(cpus=2, memory="128M") as vm:
        for paging in ("lazy", "vtlb", "ept", "eager", "lazy"):
            vm.paging = paging
            vm.wait_for_agent()  # the first time it comes up under it: that is not equal work
            busy(vm)
            assert vm.pages.name == paging
            switch = "/sys/devices/system/cpu/cpu1/online"  # so that one starts under it
            assert vm.run(f"echo 0 > {switch}; nproc; echo 1 > {switch}; nproc").output == "1\n2\n"


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


def lscpu(vm: VM) -> dict[str, str]:
    """What it says, by its own words."""
    said = vm.run("lscpu").check().output.splitlines()
    return {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in said)}


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.parametrize(
    ("guest", "cpus", "grouped", "cores"),
    [
        ("cloud-amd64", "1", (1, 1, 1), 1),
        ("cloud-amd64", "2", (1, 2, 1), 2),
        ("cloud-amd64", "4,cores=2,threads=2", (2, 2, 1), 2),
        ("cloud-amd64", "8,sockets=2,threads=2", (2, 2, 2), 4),
        ("cloud-amd64", "12,sockets=2,cores=3,threads=2", (2, 3, 2), 6),
        ("amd64", "4,threads=4", (4, 1, 1), 1),
        ("cloud-amd64-6.12", "4,sockets=4", (1, 1, 4), 4),
    ],
)
def test_lscpu_shows_what_was_asked_for(
    guest: str, cpus: str, grouped: tuple[int, int, int], cores: int
) -> None:
    """util-linux's lscpu(1), which reads /proc/cpuinfo and /sys/devices/system/cpu.

    NUMA: there is no SRAT, so a kernel that knows of nodes makes one of all memory.
    """
    with booted(guest, cpus=cpus, packages=["util-linux"], memory="256M") as vm:
        told = lscpu(vm)
        count = len(vm.vcpus)
        names = ("Thread(s) per core", "Core(s) per socket", "Socket(s)")
        assert tuple(int(told[name]) for name in names) == grouped
        assert int(told["CPU(s)"]) == count == math.prod(grouped)
        assert (told["Vendor ID"], told["Model name"]) == ("GenuineIntel", BRAND.decode())
        assert (told["CPU family"], told["Model"], told["Stepping"]) == ("6", "240", "0")
        assert (told["Hypervisor vendor"], told["Virtualization type"]) == ("KVM", "full")
        assert told["BogoMIPS"] == "2000.00"
        assert told["NUMA node(s)"] == "1"
        assert "No NUMA configuration found" in vm.run("dmesg").output
        sockets = grouped[2]
        for name, kbytes, times in (
            ("L1d", 48, cores), ("L1i", 32, cores), ("L2", 2048, cores), ("L3", 16384, sockets),
        ):  # fmt: skip
            text = told[f"{name} cache"]
            size = bytes_of(re.sub(r"(?: (.)iB)? \(.*", r"\1", text))
            assert (size, text.partition("(")[2].split()[0]) == (kbytes * times << 10, f"{times}")
        rows = vm.run("lscpu -p=CPU,CORE,SOCKET,NODE,ONLINE").output.splitlines()
        threads = grouped[0]
        assert [row for row in rows if not row.startswith("#")] == [
            f"{n},{n // threads},{n // (threads * grouped[1])},0,Y" for n in range(count)
        ]


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

    def __init__(self, paging: str) -> None:
        self.heard = bytearray()
        self.take(linux("dbt", "cloud-amd64", cpus=2, paging=paging))

    def take(self, vm: Any) -> None:
        """Go on with this VM."""
        self.vm = vm
        vm.console.on_output.append(self.heard.extend)

    def outcome(self) -> dict[str, Any]:
        """What must be the same in every run."""
        vm = self.vm
        names = {f"exits{n}": vcpu.counts.named_exits() for n, vcpu in enumerate(vm.vcpus)}
        names["paging"] = {name: vm.counts()[name] for name in ("fills", "flushes", "faults")}
        retired = [vcpu.retired for vcpu in vm.vcpus]
        return {"heard": bytes(self.heard), "now": vm.clock.now(), "retired": retired} | names


EACH = pytest.mark.parametrize(
    "paging", ["ept", "lazy", *(pytest.param(p, marks=pytest.mark.slow) for p in ("eager", "vtlb"))]
)


@EACH
def test_one_run_is_every_run(paging: str) -> None:
    outcomes = []
    for budget in (STARTED, STARTED, 7_654_321):
        run = Run(paging)
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


@EACH
def test_a_run_goes_on_elsewhere(paging: str) -> None:
    straight, moved = Run(paging), Run(paging)
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
