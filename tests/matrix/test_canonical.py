"""INVLPG of an address that is not canonical does nothing, under each technique.

Source: SDM 2A, "INVLPG": no translation has such an address.
"""

import pytest

from tests.matrix import programs as p
from understudy.execution import Execution
from understudy.vm import VM

PAIRS = [
    (execution, paging)
    for execution, technique in sorted(Execution.ALL.items())
    if technique.holds_any_guest
    for paging in sorted(technique.goes_with())
]
EDGES = (1 << 47, (1 << 47) + 0x1000, 1 << 63, (1 << 64) - (1 << 47) - 1)
INVALIDATE = """
    0f 01 38             | invlpg [rax]
    0f 01 3b             | invlpg [rbx]
    64 0f 01 39          | invlpg fs:[rcx]
    b0 05                | mov al, 5
    e6 f4                | out 0xf4, al
"""
OF_INVPCID = """
    66 0f 38 82 0f       | invpcid rcx, [rdi]
    b0 05                | mov al, 5
    e6 f4                | out 0xf4, al
"""
REFUSED = "b0 0d e6 f4 | mov al, 13; out 0xf4, al"


def _vm(execution: str, paging: str, *exits: str) -> VM:
    is_isa = Execution.ALL[execution].needs_all_traps
    return VM("16M", execution=execution, paging=paging, exits=exits, virtualizable_isa=is_isa)


@pytest.mark.parametrize("exits", [(), ("invlpg",)])
@pytest.mark.parametrize(("execution", "paging"), PAIRS)
def test_invlpg_there_does_nothing(execution: str, paging: str, exits: tuple[str, ...]) -> None:
    for at in EDGES:
        with _vm(execution, paging, *exits) as vm:
            p.start(vm, INVALIDATE, rax=at, rbx=at + 8, rcx=at - 1, fs_base=1)
            assert vm.go(budget=1000).status == 5
            assert vm.instructions == 4


@pytest.mark.parametrize(("execution", "paging"), PAIRS)
def test_invpcid_of_one_is_refused(execution: str, paging: str) -> None:
    for at in EDGES:
        with _vm(execution, paging) as vm:
            vm.memory.write(p.DATA, bytes(8) + at.to_bytes(8, "little"))
            p.start(vm, OF_INVPCID, rcx=0, rdi=p.DATA, **p.handle(vm, 13, REFUSED))
            assert vm.go(budget=1000).status == 13
