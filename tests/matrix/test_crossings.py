"""How often a guest without VM exits comes to the hypervisor: every way is counted, once."""

import pytest

from understudy.lab.teaching import between, booted


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("execution", ["deprivileged", "bt"])
@pytest.mark.parametrize(
    ("what", "faults", "others"), [("divzero", 0, 2), ("pgfault", 1, 1), ("in", 0, 1)]
)
def test_an_event_of_the_kernels_own_is_a_crossing_and_so_is_its_return(
    execution: str, bits: int, what: str, faults: int, others: int
) -> None:
    """A divide error goes straight to the handler: no question is asked, no exit counted."""
    with booted(execution, "lazy", bits) as vm:
        between(vm, what, 0, 10)
        found = between(vm, what, 0, 10)
    assert found.pop("called out") == 0
    assert found == {"true": 10 * faults, "trace": 0, "hidden": 0, "other": 10 * others}


@pytest.mark.parametrize("execution", ["deprivileged", "bt", "pv"])
def test_a_kernel_that_made_faults_runs_on_as_before(execution: str) -> None:
    with booted(execution, "pv" if execution == "pv" else "lazy") as vm:
        between(vm, "divzero", 0, 5)
        said = bytearray()
        vm.console.on_output.append(said.extend)
        vm.console.send(b"check\r")
        vm.go(budget=200_000_000, until=lambda: b"self-check: " in said and said.endswith(b"$ "))
    assert b"self-check: ok, failed 0" in said
