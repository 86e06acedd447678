"""An instruction that exits leaves the guest as the same instruction leaves a bare processor.

What: each instruction that exits x single step, resume flag with a breakpoint, interrupt shadow and
an NMI that waits, at each edge of canonical space; registers, debug registers, the stack, memory
and the device at the end are those of the bare processor.
Source: SDM 3C, "VM Exits"; SDM 3A, "Priority Among Concurrent Events".
"""

import random
from itertools import product

import pytest

from tests.matrix.exit_machine import (
    CR3,
    DATA,
    EDGES,
    RF,
    SHADOWS,
    TF,
    WINDOW,
    Bare,
    Case,
    Guest,
    Instruction,
)
from understudy.execution.vmx.optional_exits import OPTIONAL
from understudy.paging import Paging

CR0, CR4, NE = 0x8001_0033, 0x6A0, 0x20
MISC_ENABLE, DEBUGCTL, NO_MSR, APIC_BASE = 0x1A0, 0x1D9, 0x1234, 0x1B
ON_DEVICE = {"rsi": WINDOW, "rdi": DATA}
TO_DEVICE = {"rsi": DATA, "rdi": WINDOW + 8}
PORT = {"rdx": 0x80, "rdi": DATA, "rax": 0xFF, "rcx": 3}

INSTRUCTIONS = [
    Instruction("cpuid", "0f a2"),
    Instruction("hlt", "f4"),
    Instruction("in", "e4 80", alike="b0 ff"),
    Instruction("out", "e6 80", alike="66 90"),
    Instruction("insb", "6c", PORT, alike="aa"),
    Instruction("rep insb", "f3 6c", PORT, alike="f3 aa"),
    Instruction("rep outsb", "f3 6e", PORT, alike="f3 ac"),
    Instruction("rdmsr", "0f 32", {"rcx": MISC_ENABLE}),
    Instruction("rdmsr of APIC_BASE", "0f 32", {"rcx": APIC_BASE}),
    Instruction("rdmsr of none", "0f 32", {"rcx": NO_MSR}),
    Instruction("wrmsr", "0f 30", {"rcx": MISC_ENABLE, "rax": 0x1_1809}),
    Instruction("wrmsr of a reserved bit", "0f 30", {"rcx": MISC_ENABLE, "rax": 2}),
    Instruction("wrmsr of BTF", "0f 30", {"rcx": DEBUGCTL, "rax": 2}),
    Instruction("wrmsr of none", "0f 30", {"rcx": NO_MSR}),
    Instruction("invd", "0f 08"),
    Instruction("wbinvd", "0f 09"),
    Instruction("invlpg", "0f 01 3f"),
    Instruction("invpcid", "66 0f 38 82 0f", {"rcx": 2}),
    Instruction("mov rax, cr3", "0f 20 d8"),
    Instruction("mov cr3, rax", "0f 22 d8", {"rax": CR3}),
    Instruction("mov cr0, rax", "0f 22 c0", {"rax": CR0 ^ NE}),
    Instruction("mov cr0, rax, refused", "0f 22 c0", {"rax": 1 << 31}),
    Instruction("mov cr4, rax", "0f 22 e0", {"rax": CR4 ^ 0x80}),
    Instruction("mov cr4, rax, refused", "0f 22 e0", {"rax": 1 << 31}),
    Instruction("mov cr8, rax", "44 0f 22 c0", {"rax": 5}),
    Instruction("mov cr8, rax, refused", "44 0f 22 c0", {"rax": 16}),
    Instruction("mov rax, cr8", "44 0f 20 c0"),
    Instruction("lmsw", "0f 01 f0", {"rax": 0xB}),
    Instruction("clts", "0f 06"),
    Instruction("rdpmc", "0f 33"),
    Instruction("xsetbv", "0f 01 d1"),
    Instruction("vmxoff", "0f 01 c4"),
    Instruction("vmread", "0f 78 c8"),
    Instruction("rsm", "0f aa"),
    Instruction("pause", "f3 90"),
    Instruction("load", "8b 06", ON_DEVICE),
    Instruction("store", "89 07", TO_DEVICE),
    Instruction("add", "01 07", TO_DEVICE),
    Instruction("push of memory", "ff 36", ON_DEVICE),
    Instruction("rep movsb", "f3 a4", {**TO_DEVICE, "rcx": 3}),
    Instruction("cmpsb", "a6", ON_DEVICE),
]  # fmt: skip
CASES = [
    Case(instruction, edge, shadow, tf | rf, nmi)
    for instruction, edge, shadow, tf, rf, nmi in product(
        INSTRUCTIONS, EDGES, SHADOWS, (0, TF), (0, RF), (False, True)
    )
]
SAMPLE = 2_000
SMALL = 150  # for the other techniques and engines


def differences(
    paging: str, engine: str, cases: list[Case], exits: tuple[str, ...] = ()
) -> list[str]:
    out = []
    guest = Guest(paging, engine, exits)
    with guest.vm:
        answer = guest.vm.vcpus[0].answer
        bare = Bare({leaf: answer(leaf, 0) for leaf in (0, 1)})
        for case in cases:
            expected, found = bare.run(case), guest.run(case)
            words = [f"{name} {_text(found[name])}, bare {_text(value)}"
                     for name, value in expected.items() if found[name] != value]  # fmt: skip
            if words:
                out.append(f"{case.name}: {'; '.join(words)}")
    return out


def _text(value: int | bytes) -> str:
    return hex(value) if isinstance(value, int) else value.hex()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 2_000
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_trap_within_a_repeated_instruction(paging: str) -> None:
    """Its frame has RF set, though its delivery faults where the tables are not complete."""
    within = [c for c in CASES if c.flags & TF and c.instruction.name.startswith("rep")]
    assert differences(paging, "dbt", within) == []


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_exits_that_were_asked_for(paging: str) -> None:
    """Of these instructions all are run; of the others a sample."""
    optional = {"mov cr3, rax", "mov rax, cr3", "invlpg", "invpcid", "pause", "wbinvd", "rdpmc"}
    cases = [case for case in CASES if case.instruction.name in optional]
    cases = random.Random(1).sample(cases, SMALL) + random.Random(2).sample(CASES, SMALL)
    assert differences(paging, "dbt", cases, tuple(OPTIONAL)) == []


def test_exits_are_as_on_the_bare_processor() -> None:
    assert differences("ept", "dbt", random.Random(SAMPLE).sample(CASES, SAMPLE)) == []


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_some_under_every_technique(paging: str, engine: str) -> None:
    chosen = random.Random(f"{paging} {engine}").sample(CASES, SMALL)
    assert differences(paging, engine, chosen) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_all_under_every_technique(paging: str, engine: str) -> None:
    assert differences(paging, engine, CASES) == []
