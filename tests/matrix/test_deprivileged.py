"""A guest without privileges does exactly what it does in VMX operation, if its ISA lets it.

What: the same guest deprivileged, on a processor whose sensitive instructions all trap, and under
VMX with the same paging technique; after every so many instructions all registers, what was retired
and the TSC are the same.  Source: Popek and Goldberg, "Formal Requirements for Virtualizable Third
Generation Architectures": what they prove is asserted.
Invariant: VM entries are counted, so that a comparison of VMX with itself does not pass for one.
"""

import pytest
from iced_x86 import Mnemonic

from tests.matrix import programs as p
from tests.matrix.beside_vmx import agree, guest_of, linux, seen, small
from understudy.execution.deprivileged import instructions
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind

PAGINGS = ("eager", "lazy", "vtlb")


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
    assert traps == {"OUT": 14, "STI": 5, "HLT": 5, "IRETQ": 5}
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
    assert not handed_over


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_a_whole_boot(guest: str) -> None:
    _, traps, handed_over = agree(linux(guest, "lazy"), 1_000_000, 280_000_000)
    assert sum(traps.values()) > 500_000
    assert sum(handed_over.values()) <= 1  # an OUT of a program that has IOPL 3


STRING = """
    66 ba f8 03          | mov dx, 0x3f8
    be 00 00 12 00       | mov esi, DATA
    b9 06 00 00 00       | mov ecx, 6
    f3 6e                | rep outsb
    e6 f4                | out 0xf4, al
"""


def test_a_string_instruction_that_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What VMX says of its operand comes through."""
    monkeypatch.setitem(instructions.KERNEL, Mnemonic.OUTSB, instructions.handed_over)
    heard: list[bytes] = []
    with small(STRING, "dbt", "lazy")("deprivileged") as vm:
        vm.memory.write(p.DATA, b"hello\n")
        vm.console.on_output.append(heard.append)
        assert vm.go(budget=1000).kind == StopKind.DEBUG_EXIT
        assert guest_of(vm).handed_over["OUTSB"] > 0
    assert b"".join(heard) == b"hello\n"


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.parametrize(
    ("guest", "paging"), [("686", "lazy"), ("686", "vtlb"), ("cloud-amd64", "eager")]
)
def test_commands_and_a_power_off(guest: str, paging: str) -> None:
    with linux(guest, paging)("deprivileged") as vm:
        assert isinstance(vm, LinuxVM)
        result = vm.run("uname -s; ls / | wc -l", timeout_wall_s=900)
        assert result.output.startswith("Linux\n")
        vm.power_off(timeout_wall_s=300)


def test_a_snapshot_goes_on_as_the_guest_would() -> None:
    make = small(p.PIT, "dbt", "lazy", v20=p.PIT_HANDLER)
    with make("deprivileged") as vm:
        vm.go(budget=12)
        image = vm.snapshot()
        (clone,) = image.fork(1)
        with clone:
            assert clone.go(budget=100_000).kind == StopKind.DEBUG_EXIT
            assert vm.go(budget=100_000).kind == StopKind.DEBUG_EXIT
            assert seen(clone) == seen(vm)
            assert guest_of(clone).traps["IRETQ"] > 0
        image.close()
