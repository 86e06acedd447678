"""The same kernel under every way to virtualise its memory is the same run.

Source: none.  Invariants: the console, the instructions and guest time do not depend on the
technique; what exits, does; EPT asks for no #PF, INVLPG or CR3 exits.
"""

import functools
from typing import Any, NamedTuple

import pytest

from tests.guests.fetched import fetched
from understudy import vm as machine
from understudy.linux import VM
from understudy.paging import Paging
from understudy.verdict import StopKind

COMMAND = "sh -c 'for n in 1 2 3; do uname -a | wc -c; done; dmesg | tail -1; exit 3'"
OF_SHADOWS = {"EXCEPTION_OR_NMI", "INVLPG", "INVPCID"}


class Run(NamedTuple):
    """What must be the same under every technique, and what must not."""

    console: str
    output: str
    status: int
    end: str
    instructions: int
    now: int
    counts: dict[str, Any]


@functools.cache
def run(guest: str, paging: str) -> Run:
    """Boot, run a command, power off."""
    fetched(guest)
    with VM.linux(guest, paging=paging, memory="128M") as vm:
        result = vm.run(COMMAND)
        vm.send("poweroff -f\n")
        stop = vm.go(wall_seconds=600)
        return Run(
            vm.console_text, result.output, result.status, stop.kind, vm.instructions,
            vm.clock.now(), vm.counts(),
        )  # fmt: skip


def check(guest: str, paging: str) -> None:
    expected, got = run(guest, "ept"), run(guest, paging)
    assert (got.status, got.end) == (3, StopKind.POWEROFF)
    assert got[:-1] == expected[:-1]
    shadowed, plain = got.counts["exits"], expected.counts["exits"]
    assert not OF_SHADOWS & plain.keys()
    assert "CR3 write" not in expected.counts["cr_accesses"]
    assert shadowed["EXCEPTION_OR_NMI"] == sum(got.counts["faults"].values())
    assert got.counts["cr_accesses"]["CR3 write"] > 1000
    assert got.counts["faults"]["device"] == plain["EPT_VIOLATION"]
    assert bool(got.counts["faults"]["trace"]) == (paging != "vtlb")
    assert (set(shadowed) - OF_SHADOWS - {"MONITOR_TRAP_FLAG"}) == set(plain) - {"EPT_VIOLATION"}


SHADOWED = sorted(Paging.ALL.keys() - {"ept"})


@pytest.mark.real_guest
@pytest.mark.timeout(600)
@pytest.mark.parametrize("paging", SHADOWED)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_a_kernel_of_64_and_one_of_32_bits(guest: str, paging: str) -> None:
    check(guest, paging)


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paging", SHADOWED)
@pytest.mark.parametrize("guest", ["686-pae", "amd64"])
def test_the_other_kernels(guest: str, paging: str) -> None:
    check(guest, paging)


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", SHADOWED)
def test_a_saved_and_loaded_run_is_the_same_run(paging: str) -> None:
    """Shadows are saved, too: not even a hidden fault more."""
    fetched("cloud-amd64")
    outcomes = []
    for is_saved in (False, True):
        vm: machine.VM = VM.linux("cloud-amd64", paging=paging, memory="128M")
        vm.go(budget=20_000_000)
        if is_saved:
            saved = vm.save()
            vm.close()
            vm = machine.VM.restore(saved)
        vm.go(budget=40_000_000)
        counts = vm.counts()
        outcomes.append([counts[name] for name in ("instructions", "exits", "faults", "fills")])
        vm.close()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2]["hidden"] > 100
