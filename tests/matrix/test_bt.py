"""A guest whose kernel is translated does exactly what it does in VMX operation, on any ISA.

What: the same guest under binary translation, on a processor whose sensitive instructions do not
all trap, and under VMX with the same paging technique; after every so many instructions all
registers, what was retired and the TSC are the same.
Invariant: VM entries are counted, so that a comparison of VMX with itself does not pass for one.
"""

from collections import Counter

import pytest

from tests.matrix import lockstep
from tests.matrix import programs as p
from tests.matrix.lockstep import Make
from understudy.verdict import StopKind

PAGINGS = ("eager", "lazy", "vtlb")


def agree(make: Make, step: int, most: int) -> tuple[str, Counter[str], Counter[str]]:
    return lockstep.agree(make, step, most, "bt")


def small(program: str, engine: str, paging: str, **handlers: str) -> Make:
    return lockstep.small(program, engine, paging, virtualizable=False, **handlers)


def linux(guest: str, paging: str, engine: str = "dbt") -> Make:
    return lockstep.linux(guest, paging, engine, virtualizable=False)


@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_a_line_is_printed(engine: str, paging: str) -> None:
    stop, traps, handed_over = agree(small(p.HELLO, engine, paging), 1, 1000)
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 7}
    assert not handed_over


@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_a_timer_interrupts(engine: str) -> None:
    make = small(p.PIT, engine, "lazy", v20=p.PIT_HANDLER)
    stop, traps, handed_over = agree(make, 7, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 14, "HLT": 5, "IRETQ": 5}
    assert not handed_over


def test_the_built_in_guest() -> None:
    stop, _, handed_over = agree(linux("hello", "lazy"), 1, 100_000)
    assert stop == StopKind.POWEROFF
    assert not handed_over


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_the_beginning_of_a_boot(guest: str, paging: str) -> None:
    _, traps, handed_over = agree(linux(guest, paging), 100_000, 6_000_000)
    assert traps["CLI"] or traps["PUSHFQ"] or traps["PUSHFD"]
    assert handed_over.total() < 1000
