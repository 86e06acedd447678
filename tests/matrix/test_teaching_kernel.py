"""The teaching kernel runs its self-check under every technique, and its shell obeys."""

import itertools
from typing import Any

import pytest

from understudy.execution import Execution
from understudy.execution.pv import Pv
from understudy.linux import VM
from understudy.verdict import StopKind

NATIVE, PARAVIRTUAL = ("teaching", "teaching-32"), ("teaching-pv", "teaching-pv-32")
SWITCHES = ("no-if", "no-lazy", "no-batch", "no-clock", "no-console")
TECHNIQUES = [
    (name, paging)
    for name, kind in Execution.ALL.items() if name != "pv"
    for paging in kind.goes_with()
]  # fmt: skip
CHECKS = 17
BUDGET = 200_000_000


def ran(guest: str, append: str, **options: Any) -> list[str]:
    """The lines that it prints until it powers off."""
    if options.get("execution") == "deprivileged":
        options["virtualizable_isa"] = True
    out = bytearray()
    with VM.linux(guest, append=append, memory="16M", **options) as vm:
        vm.console.on_output.append(out.extend)
        stop = vm.go(budget=BUDGET)
        assert stop.kind is StopKind.POWEROFF, f"{out.decode()}{stop.detail}"
        if isinstance(own := vm.vcpus[0].guest, Pv):
            assert not own.handed_over
            assert not own.refused, own.last_refused
            assert own.traps.keys() <= {"IN", "OUT", "CPUID"}
            assert vm.processors[0].counters()["entries"] == 0  # none of it is VMX's
    return out.decode().splitlines()


def is_well(lines: list[str]) -> None:
    assert [line for line in lines if line.startswith("failed")] == []
    assert sum(line.startswith("ok") for line in lines) == CHECKS
    assert "self-check: ok, failed 0" in lines


@pytest.mark.parametrize("guest", NATIVE)
@pytest.mark.parametrize(("execution", "paging"), TECHNIQUES)
def test_the_self_check(guest: str, execution: str, paging: str) -> None:
    is_well(ran(guest, "check", execution=execution, paging=paging))


@pytest.mark.parametrize("guest", PARAVIRTUAL)
@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_the_self_check_of_a_paravirtual_one(guest: str, engine: str) -> None:
    is_well(ran(guest, "check", execution="pv", paging="pv", engine=engine))


@pytest.mark.parametrize("guest", PARAVIRTUAL)
@pytest.mark.parametrize("off", [*SWITCHES, " ".join(SWITCHES)])
def test_without_a_feature(guest: str, off: str) -> None:
    is_well(ran(guest, f"check {off}", execution="pv", paging="pv"))


def test_two_runs_are_the_same() -> None:
    def run() -> tuple[dict[str, Any], int]:
        with VM.linux("teaching-pv", append="check", execution="pv", paging="pv") as vm:
            assert vm.go(budget=BUDGET).kind is StopKind.POWEROFF
            return vm.counts(), vm.instructions

    assert run() == run()


@pytest.mark.parametrize(
    ("guest", "execution", "paging"),
    [*itertools.product(NATIVE, ["vmx"], ["ept"]), *itertools.product(PARAVIRTUAL, ["pv"], ["pv"])],
)
def test_the_shell(guest: str, execution: str, paging: str) -> None:
    out = bytearray()
    with VM.linux(guest, memory="16M", execution=execution, paging=paging) as vm:
        vm.console.on_output.append(out.extend)
        for said, answer in (("echo so it is", "\nso it is\n"), ("many fork 3", "\nend\n")):
            vm.console.send(f"{said}\r".encode())
            vm.go(budget=BUDGET, until=lambda answer=answer: answer.encode() in out)  # type: ignore[misc]
            assert answer.encode() in out
        vm.console.send(b"off\r")
        assert vm.go(budget=BUDGET).kind is StopKind.POWEROFF
