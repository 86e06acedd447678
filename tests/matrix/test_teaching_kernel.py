"""The teaching kernel runs its self-check under every technique, and its shell obeys."""

from typing import Any

import pytest

from understudy.linux import VM
from understudy.paging import Paging
from understudy.verdict import StopKind

NATIVE = ("teaching", "teaching-32")
TECHNIQUES = [
    *(("vmx", paging) for paging in Paging.ALL), ("emulate", "ept"),
    *(("deprivileged", paging) for paging in ("eager", "lazy", "vtlb")),
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
        assert vm.go(budget=BUDGET).kind is StopKind.POWEROFF, out.decode()
    return out.decode().splitlines()


@pytest.mark.parametrize("guest", NATIVE)
@pytest.mark.parametrize(("execution", "paging"), TECHNIQUES)
def test_the_self_check(guest: str, execution: str, paging: str) -> None:
    lines = ran(guest, "check", execution=execution, paging=paging)
    assert [line for line in lines if line.startswith("failed")] == []
    assert sum(line.startswith("ok") for line in lines) == CHECKS
    assert "self-check: ok, failed 0" in lines


@pytest.mark.parametrize("guest", NATIVE)
def test_the_shell(guest: str) -> None:
    out = bytearray()
    with VM.linux(guest, memory="16M") as vm:
        vm.console.on_output.append(out.extend)
        for said, answer in (("echo so it is", "\nso it is\n"), ("many fork 3", "\nend\n")):
            vm.console.send(f"{said}\r".encode())
            vm.go(budget=BUDGET, until=lambda answer=answer: answer.encode() in out)  # type: ignore[misc]
            assert answer.encode() in out
        vm.console.send(b"off\r")
        assert vm.go(budget=BUDGET).kind is StopKind.POWEROFF
