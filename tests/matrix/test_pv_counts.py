"""What a paravirtual kernel's features cost, and what they save: exact counts.

Source: lecture, "Para-virtualization"; P. Barham et al., "Xen and the Art of Virtualization", SOSP
2003, for batches of 2048.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from understudy.lab.teaching import booted, counted
from understudy.linux import VM

BITS = (64, 32)
AROUND = 3  # calls: two returns from system calls, and the line that says that it ends


@pytest.fixture(params=BITS)
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def one(bits: int, append: str, what: str, times: int) -> dict[str, Any]:
    with booted("pv", "pv", bits, append) as vm:
        counted(vm, what, times)  # the tables that it takes are there
        return counted(vm, what, times)


@pytest.mark.parametrize("times", [1, 1000])
def test_interrupts_off_and_on_cost_nothing(bits: int, times: int) -> None:
    found = one(bits, "", "irq", times)
    assert found["exits"]["VMCALL"] == AROUND == sum(found["exits"].values())
    assert "set_if" not in found["execution"]["calls"]


@pytest.mark.parametrize("times", [1, 1000])
def test_without_the_virtual_flag_each_costs_a_call(bits: int, times: int) -> None:
    none, found = (one(bits, "no-if", "irq", n)["execution"]["calls"]["set_if"] for n in (0, times))
    assert found - none == 2 * times


def test_state_that_changes_a_thousand_times_is_looked_at_once(bits: int) -> None:
    found = one(bits, "", "state", 1000)
    assert sum(found["exits"].values()) == AROUND
    assert found["execution"]["synchronized"] == 1


def test_state_that_does_not_change_is_not_looked_at(bits: int) -> None:
    assert one(bits, "", "state", 0)["execution"]["synchronized"] == 0


def test_without_lazy_state_each_change_costs_a_call(bits: int) -> None:
    found = one(bits, "no-lazy", "state", 1000)
    assert found["exits"]["VMCALL"] == 4 * 1000 + AROUND
    assert found["execution"]["synchronized"] == 0


@pytest.mark.parametrize("pages", [1, 2047, 2048, 2049, 4096])
def test_changes_of_page_tables_go_in_batches(bits: int, pages: int) -> None:
    found = one(bits, "", "map", pages)  # mapped, and unmapped again
    assert found["execution"]["updates"] == 2 * pages
    assert found["execution"]["calls"]["update"] == 2 * -(-pages // 2048)


def test_without_batches_each_is_a_call(bits: int) -> None:
    found = one(bits, "no-batch", "map", 100)
    assert found["execution"]["calls"]["update"] == found["execution"]["updates"] == 200


def test_an_interrupt_that_comes_while_they_are_off_waits(bits: int) -> None:
    """It is in the pending mask, and comes when the kernel turns them on and sees that."""
    with booted("pv", "pv", bits) as vm:
        found = counted(vm, "irq", 3_000_000)  # some 60 ms: six ticks, most while they are off
        assert found["execution"]["calls"]["timer"] >= 3
        assert found["execution"]["calls"]["look"] >= 1


@pytest.mark.parametrize(
    ("off", "call", "exit"), [("no-clock", "time", ""), ("no-console", "", "IO_INSTRUCTION")]
)
def test_clock_and_console_without_and_with(bits: int, off: str, call: str, exit: str) -> None:
    """The clock is read without a call; a text is one, and no access to a port for each byte."""
    seen = []
    for append in ("", off):
        with booted("pv", "pv", bits, append) as vm:
            vm.console.send(b"sleep 30\r")
            vm.go(deadline_ns=vm.clock.now() + 100_000_000)
            told = vm.counts()
        seen.append((told["execution"]["calls"].get(call, 0), told["exits"].get(exit, 0)))
    assert seen[0] == (0, 0)
    assert max(seen[1]) > 3


@pytest.mark.parametrize(
    ("off", "exits"),
    [("", (7, 7)), ("no-if", (49, 43)), ("no-lazy", (15, 15)), ("no-batch", (25, 23))],
)
def test_a_fork_its_exit_and_the_wait_for_it(bits: int, off: str, exits: tuple[int, int]) -> None:
    """As docs/techniques/pv.md has them; on 32 bits there is a table less."""
    with booted("pv", "pv", bits, off) as vm:
        counted(vm, "fork", 2)
        few, many = (sum(counted(vm, "fork", n)["exits"].values()) for n in (0, 10))
    assert many - few == 10 * exits[BITS.index(bits)]


@pytest.fixture
def kernel() -> Iterator[VM]:
    with booted("pv", "pv") as vm:
        yield vm


def test_a_fault_of_a_program_is_one_exit_and_its_answer_one_call(kernel: VM) -> None:
    """The new entry goes with the return."""
    counted(kernel, "touch", 1)
    base, found = counted(kernel, "touch", 1), counted(kernel, "touch", 101)
    assert found["exits"]["EXCEPTION_OR_NMI"] - base["exits"].get("EXCEPTION_OR_NMI", 0) == 100
    own, before = found["execution"], base["execution"]
    assert "update" not in own["calls"] or own["calls"]["update"] == 0
    assert own["updates"] - before["updates"] == 100
    assert own["crossings"] - before["crossings"] == 200
