"""The teaching kernel without a hypervisor does what it does in a VM.

What: its self-check on a bare processor and a PC's board, beside a VM's under VMX.
Source: none.  Invariant: the same text, and as many instructions; no entry, no exit.
"""

import pytest

from understudy.lab.native import Computer
from understudy.lab.teaching import BUDGET, PROMPT, Machine, bare, booted
from understudy.verdict import StopKind


def checked(machine: Machine) -> tuple[bytes, int]:
    """What it says of its self-check, and its instructions before it waited for the command."""
    with machine:
        begun, said = machine.instructions, bytearray()
        machine.console.on_output.append(said.extend)
        machine.console.send(b"check\r")
        stop = machine.go(budget=BUDGET, until=lambda: PROMPT in said)
        assert stop.kind is StopKind.UNTIL
        return bytes(said), begun


@pytest.mark.parametrize("bits", [64, 32])
def test_its_self_check(bits: int) -> None:
    computer = bare(bits)
    assert checked(computer) == checked(booted("vmx", "ept", bits))


def test_nothing_enters_a_guest() -> None:
    with bare() as computer:
        assert isinstance(computer, Computer)
        assert computer.counts() == {"exits": {"entries": 0}, "faults": {}}
        assert computer.go(budget=0, until=lambda: False).kind is StopKind.BUDGET
